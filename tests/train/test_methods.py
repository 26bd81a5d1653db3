"""The methods, and how a budget is divided among layers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_train.methods.budget import Allocation, allocate, parse_budget, spread
from rosa_train.methods.method import METHODS, Method, method_named

SHAPES = {"layers.0.q_proj": (32, 32), "layers.0.up_proj": (48, 32), "layers.1.q_proj": (32, 32)}
ELEMENTS = 32 * 32 * 2 + 48 * 32
PER_RANK = 64 + 80 + 64

# The linear layers of LLaMA2-7B, for which the paper compares methods at equal budgets.
LLAMA_7B = {
    f"layers.{i}.{name}": shape
    for i in range(32)
    for name, shape in [
        *((f"{p}_proj", (4096, 4096)) for p in "qkvo"),
        ("gate_proj", (11008, 4096)),
        ("up_proj", (11008, 4096)),
        ("down_proj", (4096, 11008)),
    ]
}


# -- methods -------------------------------------------------------------------------------------


def test_methods_are_named_frozen_and_read_only():
    assert set(METHODS) >= {"full", "lora", "lora+", "spa", "rosa"}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.source
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.low_rank = True
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["lora"]


@pytest.mark.parametrize(
    ("name", "full", "low_rank", "sparse", "ratio"),
    [
        ("full", True, False, False, 1),
        ("lora", False, True, False, 1),
        ("lora+", False, True, False, 16),
        ("spa", False, False, True, 1),
        ("rosa", False, True, True, 1),
    ],
)
def test_branches_and_learning_rates_of_each_method(name, full, low_rank, sparse, ratio):
    method = method_named(name)
    assert (method.full, method.low_rank, method.sparse) == (full, low_rank, sparse)
    assert method.lr_b_ratio == ratio


def test_unknown_method_error_lists_known_methods():
    with pytest.raises(ValueError, match=r"expected one of full, lora, lora\+, spa, rosa.*'lorra'"):
        method_named("lorra")
    with pytest.raises(ValueError, match="expected one of"):
        allocate("lorra", SHAPES)


def test_frozen_lora_a_is_not_counted():
    frozen = Method("asym", "B alone", "-", low_rank=True, train_a=False)
    assert allocate(frozen, SHAPES, rank=3).trainable == 3 * (32 + 48 + 32)
    assert method_named(frozen) is frozen


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ("1%", 100),
        ("0.6%", 60),
        (" 12.5 % ", 1250),
        ("1.5M", 1_500_000),
        ("200k", 200_000),
        ("2B", 2_000_000_000),
        ("1_234", 1234),
        ("1,234", 1234),
        (77, 77),
        ("0.29%", 29),  # 28.999... in binary floating point
    ],
)
def test_parse_budget(budget, count):
    assert parse_budget(budget, 10_000) == count


@pytest.mark.parametrize("budget", ["", "%", "lots", "1%%", "0", "0.001%", -5, 0, 1.5, True, None])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="budget: expected"):
        parse_budget(budget, 10_000)


def test_rank_and_density_set_the_allocation():
    allocation = allocate("rosa", SHAPES, rank=4, density=0.03)
    assert allocation.ranks == dict.fromkeys(SHAPES, 4)
    assert allocation.nnz == {name: math.floor(0.03 * m * n) for name, (m, n) in SHAPES.items()}
    assert allocation.trainable == 4 * PER_RANK + sum(allocation.nnz.values())


def test_density_is_not_rounded_in_binary():
    assert allocate("spa", {"x": (10, 10)}, density=0.29).nnz == {"x": 29}


def test_patterns_match_layer_names_like_peft():
    allocation = allocate(
        "rosa",
        SHAPES,
        rank=4,
        density=0.1,
        rank_pattern={"layers.1.q_proj": 2, "q_proj": 3},
        density_pattern={r"layers\.\d\.up_proj": 0.0, ".*proj": 0.5},
    )
    assert allocation.ranks == {
        "layers.0.q_proj": 3,
        "layers.0.up_proj": 4,
        "layers.1.q_proj": 2,
    }
    assert allocation.nnz == {"layers.0.q_proj": 512, "layers.0.up_proj": 0, "layers.1.q_proj": 512}


def test_pattern_without_a_match_is_refused():
    with pytest.raises(ValueError, match=r"rank_pattern: expected keys that match.*\['k_proj'\]"):
        allocate("lora", SHAPES, rank=4, rank_pattern={"k_proj": 2})
    with pytest.raises(ValueError, match="density_pattern: expected keys"):
        allocate("spa", SHAPES, density=0.1, density_pattern={"k_proj": 0.2})
    # A key must match whole parts of a name, and "proj" is only a part of "q_proj".
    with pytest.raises(ValueError, match=r"got \['proj'\] on layers like layers.0.q_proj"):
        allocate("spa", SHAPES, density=0.1, density_pattern={"proj": 0.2})
    with pytest.raises(ValueError, match=r"rank_pattern: expected a regular expression, got '\('"):
        allocate("lora", SHAPES, rank=4, rank_pattern={"(": 2})


@given(budget=st.integers(PER_RANK + 1, ELEMENTS // 2))
def test_a_budget_is_met_exactly(budget):
    spa = allocate("spa", SHAPES, budget=budget)
    assert spa.trainable == sum(spa.nnz.values()) == budget
    density = budget / ELEMENTS
    for name, (m, n) in SHAPES.items():
        assert abs(spa.nnz[name] - density * m * n) < 1
    rosa = allocate("rosa", SHAPES, budget=budget)
    assert rosa.trainable == budget
    (rank,) = set(rosa.ranks.values())
    assert rank == max(1, budget // 2 // PER_RANK)
    assert sum(rosa.nnz.values()) == budget - rank * PER_RANK > 0
    assert allocate("rosa", SHAPES, budget=budget) == rosa


@given(budget=st.integers(PER_RANK // 2, 32 * PER_RANK))
def test_lora_takes_the_nearest_rank(budget):
    lora = allocate("lora", SHAPES, budget=budget)
    (rank,) = set(lora.ranks.values())
    assert rank >= 1
    assert lora.trainable == rank * PER_RANK
    assert abs(lora.trainable - budget) <= PER_RANK / 2


def test_equal_budgets_match_the_paper():
    lora = allocate("lora", LLAMA_7B, rank=16)
    assert lora.trainable == 39_976_960
    rosa = allocate("rosa", LLAMA_7B, budget=lora.trainable)
    spa = allocate("spa", LLAMA_7B, budget=lora.trainable)
    elements = sum(m * n for m, n in LLAMA_7B.values())
    assert set(rosa.ranks.values()) == {8}
    assert sum(rosa.nnz.values()) / elements == pytest.approx(0.003, rel=0.04)
    assert sum(spa.nnz.values()) / elements == pytest.approx(0.006, rel=0.04)
    assert rosa.trainable == spa.trainable == lora.trainable
    # The same budget at rank 12.
    r12 = allocate("rosa", LLAMA_7B, rank=12, budget=lora.trainable)
    assert set(r12.ranks.values()) == {12}
    assert r12.trainable == lora.trainable
    assert sum(r12.nnz.values()) / elements == pytest.approx(0.0015, rel=0.04)


@pytest.mark.parametrize("method", ["lora", "lora+", "spa", "rosa"])
def test_default_budget_is_that_of_lora_rank_16(method):
    assert allocate(method, LLAMA_7B).trainable == 39_976_960


def test_patterns_are_taken_from_the_budget_first():
    rosa = allocate("rosa", SHAPES, budget=1500, rank_pattern={"up_proj": 2})
    assert rosa.ranks["layers.0.up_proj"] == 2
    assert rosa.trainable == 1500
    spa = allocate("spa", SHAPES, budget=500, density_pattern={"up_proj": 0.1})
    assert spa.nnz == {"layers.0.q_proj": 174, "layers.0.up_proj": 153, "layers.1.q_proj": 173}


def test_full_ignores_the_budget():
    assert allocate("full", SHAPES, budget="1%") == Allocation(
        dict.fromkeys(SHAPES, 0), dict.fromkeys(SHAPES, 0), ELEMENTS
    )
    with pytest.raises(ValueError, match="rank: expected none for full, got 4"):
        allocate("full", SHAPES, rank=4)


def test_rosa_can_fill_the_largest_budget():
    largest = 32 * PER_RANK + ELEMENTS - len(SHAPES)
    rosa = allocate("rosa", SHAPES, budget=largest)
    assert rosa.trainable == largest
    assert all(rosa.nnz[name] < m * n for name, (m, n) in SHAPES.items())


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("lora", PER_RANK // 2 - 1, "at least 208 trainable parameters for lora on these 3"),
        ("lora", 33 * PER_RANK, "at most 6,656"),
        ("spa", ELEMENTS, f"at most {ELEMENTS - 3:,}"),
        ("rosa", PER_RANK, f"at least {PER_RANK + 1}"),
        ("rosa", "300%", f"at most {32 * PER_RANK + ELEMENTS - 3:,}"),
    ],
)
def test_unreachable_budgets_are_refused(method, budget, message):
    with pytest.raises(ValueError, match=f"budget: expected {message}"):
        allocate(method, SHAPES, budget=budget)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("spa", {"density": 0}, r"density: expected a number in \(0, 1\), got 0"),
        ("spa", {"density": 1}, "density: expected a number in"),
        ("spa", {"density": 1.5}, "density: expected a number in"),
        ("rosa", {"rank": 4, "density": -0.1}, "density: expected a number in"),
        ("rosa", {"rank": 4, "density": math.nan}, "density: expected a number in"),
        ("spa", {"density": "0.1"}, "density: expected a number in"),
        ("spa", {"density": 0.1, "density_pattern": {"q_proj": 1.0}}, "density_pattern"),
        ("lora", {"rank": 0}, "rank: expected at least 1 for lora, got 0 and no sparse branch"),
        ("lora", {"rank": -1}, "rank: expected an integer >= 0, got -1"),
        ("lora", {"rank": 1.5}, "rank: expected an integer"),
        ("lora", {"rank": True}, "rank: expected an integer"),
        ("lora", {"rank": 4, "density": 0.1}, "density: expected none for lora"),
        ("spa", {"rank": 4, "density": 0.1}, "rank: expected none for spa, got 4"),
        ("rosa", {"rank": 4}, "rosa: expected a rank and a density, or a budget"),
        ("rosa", {"density": 0.1}, "rosa: expected a rank and a density, or a budget"),
        ("spa", {"density": 0.1, "budget": "1%"}, "budget: expected it without a density"),
        ("lora", {"rank": 4, "budget": "1%"}, "budget: expected it without a rank"),
        ("lora", {"rank": 4, "rank_pattern": {"up_proj": 0}}, "in 1 of 3 layers.*up_proj"),
        ("spa", {"density": 0.0001}, "expected a rank or nonzeros"),
    ],
)
def test_bad_arguments_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(method, SHAPES, **arguments)


def test_empty_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the shapes of some layers, got none"):
        allocate("lora", {}, rank=4)


def test_rosa_of_rank_0_equals_spa():
    assert allocate("rosa", SHAPES, rank=0, density=0.1) == allocate("spa", SHAPES, density=0.1)


@given(
    weights=st.dictionaries(st.text(), st.integers(1, 10**9), min_size=1, max_size=20),
    share=st.floats(0, 1),
)
def test_spread_sums_exactly_and_rounds_to_nearest(weights, share):
    whole = sum(weights.values())
    total = int(whole * share)
    parts = spread(total, weights)
    assert sum(parts.values()) == total
    for name, weight in weights.items():
        assert -whole < parts[name] * whole - total * weight < whole
