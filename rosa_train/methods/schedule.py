"""Learning rates and phases as functions of the step.

Nothing here has state, so a resumed run has no scheduler state to restore.
"""

from __future__ import annotations

import dataclasses
import math
import re

from rosa_train.methods.method import Method


def learning_rate_factor(step: int, total: int, warmup: int, kind: str = "linear") -> float:
    """The factor of the peak learning rate at a step, in (0, 1].

    With t = (step - warmup) / (total - warmup):

        step < warmup    (step + 1) / warmup
        linear           1 - t
        cosine           (1 + cos(pi t)) / 2
        constant         1

    `step` counts optimizer steps from 0, and `total` is the number of steps. The factor of the
    first step is not 0. Hugging Face's schedules begin with 0, and so waste a batch.

    Raises:
        ValueError: `kind` is another one.
    """
    if kind not in ("linear", "cosine", "constant"):
        raise ValueError(f"learning_rate_factor: expected linear, cosine or constant, got {kind!r}")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2


def plan(method: Method, schedule: str | None, steps: int) -> tuple[Method, int | None]:
    """The method with the branches that train, and how many steps come before the masks.

    The second is None if no masks are chosen.

    `wl<N>` trains only the low-rank branch for N steps, then chooses the masks, and then trains
    both branches. `default` is wl0. `lora_only` and `spa_only` drop the other branch of a method
    with both. Without a schedule, a method with both branches gets wl64, the authors' choice.

    Raises:
        ValueError: the schedule does not fit the method, or would never choose masks.

    Source: RoSA, arXiv 2401.04679, section 4.
    """
    both = method.low_rank and method.sparse
    if schedule is None:
        schedule = "wl64" if both else "spa_only" if method.sparse else "lora_only"
        if method.full:
            return method, None
    if schedule == "lora_only" and method.low_rank:
        return dataclasses.replace(method, sparse=False), None
    if schedule == "spa_only" and method.sparse:
        return dataclasses.replace(method, low_rank=False), 0
    match = re.fullmatch(r"wl(\d+)", "wl0" if schedule == "default" else schedule)
    if match is None or not both:
        fitting = ["wl<N>", "default"] * both + ["lora_only"] * method.low_rank
        fitting += ["spa_only"] * method.sparse
        raise ValueError(
            f"--schedule: expected {', '.join(fitting) or 'none'} for method {method.name}, "
            f"got {schedule}"
        )
    if int(match[1]) >= steps:
        raise ValueError(
            f"--schedule: expected wl<N> with N below the {steps} steps of the run, "
            f"got {schedule}: the sparse branch would never train"
        )
    return method, int(match[1])
