"""What is timed of a layer: forward and backward, and AdamW where the mode has it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from .case import FWD_BWD, STEP_FUSED, Adapted, LayerProblem

# The step that is checked moves every parameter by about this much, as the weights themselves are
# of this size: a weight that was not written anew is seen. Those that are timed hardly move.
_CHECKED_LR, _TIMED_LR = 1e-2, 1e-7


class Step:
    """What is timed: forward and backward, and AdamW if the mode has it."""

    def __init__(self, problem: LayerProblem, adapted: Adapted, mode: str) -> None:
        self._problem, self._module = problem, adapted.module
        self._parameters, self._leaf = adapted.parameters, problem.leaf()
        self.optimizer: torch.optim.Optimizer | None = None
        self._handle: object = None
        if self._parameters:
            fused = True if mode == STEP_FUSED else None
            self.optimizer = torch.optim.AdamW(self._parameters, lr=_TIMED_LR, fused=fused)
            self._handle = adapted.attach(self.optimizer)
        self._stepped = self.optimizer if mode != FWD_BWD else None

    def __call__(self) -> None:
        # Gradients of the last call go first, in every mode: who trains holds one set of them.
        self.clear()
        self._problem.run(self._module, self._leaf).backward(self._problem.dy)
        if self._stepped is not None:
            self._stepped.step()

    def clear(self) -> None:
        """Let go of the gradients."""
        self._leaf.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def step_visibly(self) -> None:
        """One call whose step moves the parameters visibly."""
        assert self._stepped is not None
        for group in self._stepped.param_groups:
            group["lr"] = _CHECKED_LR
        self()
        for group in self._stepped.param_groups:
            group["lr"] = _TIMED_LR


def step_of(problem: LayerProblem, adapted: Adapted, mode: str) -> Step:
    """The call of a mode."""
    return Step(problem, adapted, mode)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of torch about sparse tensors and of PEFT about its configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
