"""Learning rate schedules, and the step at which masks are chosen."""

from __future__ import annotations

import math

import pytest

from rosa_train.methods.method import METHODS
from rosa_train.methods.schedule import learning_rate_factor, plan


def test_linear_schedule() -> None:
    factors = [learning_rate_factor(step, 10, 4) for step in range(10)]
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx(expected, abs=1e-15)


def test_cosine_schedule() -> None:
    factors = [learning_rate_factor(step, 4, 0, "cosine") for step in range(4)]
    half = math.sqrt(0.5) / 2
    assert factors == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half], abs=1e-15)


def test_constant_schedule_after_warm_up() -> None:
    assert [learning_rate_factor(step, 5, 2, "constant") for step in range(5)] == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 7, 20])
def test_learning_rate_is_positive_at_every_step(kind: str, warmup: int) -> None:
    # The warm-up may also be as long as the run, or longer.
    factors = [learning_rate_factor(step, 7, warmup, kind) for step in range(7)]
    assert all(0 < factor <= 1 for factor in factors)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected linear, cosine or constant, got 'wavy'"):
        learning_rate_factor(0, 1, 0, "wavy")


@pytest.mark.parametrize(
    ("method", "schedule", "masks", "branches"),
    [
        ("rosa", None, 64, (True, True)),
        ("rosa", "wl3", 3, (True, True)),
        ("rosa", "default", 0, (True, True)),
        ("rosa", "lora_only", None, (True, False)),
        ("rosa", "spa_only", 0, (False, True)),
        ("spa", None, 0, (False, True)),
        ("spa", "spa_only", 0, (False, True)),
        ("lora", None, None, (True, False)),
        ("lora+", "lora_only", None, (True, False)),
        ("full", None, None, (False, False)),
    ],
)
def test_plan_of_each_method_and_schedule(
    method: str, schedule: str | None, masks: int | None, branches: tuple[bool, bool]
) -> None:
    planned, step = plan(METHODS[method], schedule, steps=100)
    assert step == masks
    assert (planned.low_rank, planned.sparse) == branches
    assert planned.name == method


@pytest.mark.parametrize(
    ("method", "schedule", "message"),
    [
        ("lora", "wl3", "expected lora_only for method lora, got wl3"),
        ("lora", "spa_only", "expected lora_only for method lora, got spa_only"),
        ("spa", "lora_only", "expected spa_only for method spa, got lora_only"),
        ("spa", "default", "expected spa_only for method spa, got default"),
        ("full", "wl0", "expected none for method full, got wl0"),
        ("rosa", "soon", r"expected wl<N>, default, lora_only, spa_only for method rosa, got soon"),
        ("rosa", "wl100", r"N below the 100 steps of the run, got wl100: the sparse branch would"),
    ],
)
def test_schedules_unfit_for_the_method_are_refused(
    method: str, schedule: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(METHODS[method], schedule, steps=100)
