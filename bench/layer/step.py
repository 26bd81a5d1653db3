"""The timed call of a layer: forward and backward, and AdamW if the mode has it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from .case import FWD_BWD, STEP_FUSED, Adapted, LayerProblem

# The checked step moves every parameter by about 1e-2, the size of the weights themselves. So a
# weight that was not rewritten is noticed. The timed steps hardly move the parameters.
_CHECKED_LR, _TIMED_LR = 1e-2, 1e-7


class Step:
    """The timed call: forward and backward, and AdamW if the mode has it."""

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
        # The gradients of the last call are freed first, in every mode: training holds one set of
        # them.
        self.clear()
        self._problem.run(self._module, self._leaf).backward(self._problem.dy)
        if self._stepped is not None:
            self._stepped.step()

    def clear(self) -> None:
        """Free the gradients."""
        self._leaf.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def step_visibly(self) -> None:
        """Make one call whose step is large enough to be checked."""
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
    """Suppress torch's notices about sparse tensors, and PEFT's about its configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
