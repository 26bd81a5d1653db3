"""The contenders: our layers, torch's, and PEFT's tuners, all with the same initial numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import rosa_kernels as rk

from ..measuring.names import DEVICES, OP
from . import peft
from .case import FWD_BWD, LAYER, Adapted, LayerCase, LayerProblem
from .parametrization import ALPHA, Parametrization, TooFewEntries

# RoSA is compared with our own LoRA first. That is the same code without the sparse branch, and in
# float32 on a CPU it is faster than PEFT's LoRA.
REFERENCE, PEFT_REFERENCE, OURS = "lora", "peft-lora", "rosa"
SUPER_TUNING, SHIRA, FULL, FROZEN = "peft-supra", "peft-shira", "full", "frozen"
Adapt = Callable[[nn.Module, dict[str, Parametrization], float], Adapted]


@dataclass(frozen=True)
class LayerContender:
    """One way to train a layer, in one mode.

    Attributes not listed here are those of `bench.contenders.base.Contender`.

    Attributes:
        kind: which :class:`Parametrization` it trains.
        adapt: (model, parametrizations by layer, dropout) -> the model with its layers in it.
        missing: () -> the reason why it cannot run here at all, or None.
    """

    op: str
    name: str
    backend: str
    kind: str
    adapt: Adapt = field(repr=False)
    mode: str = FWD_BWD
    missing: Callable[[], str | None] = field(repr=False, default=lambda: None)
    devices: frozenset[str] = DEVICES
    charges: tuple[str, ...] = (OP,)

    @property
    def label(self) -> str:
        """A name that is unique among the contenders of a case."""
        return f"{self.name} [{self.mode}]"

    def reject(self, problem: LayerProblem) -> str | None:
        """The reason why it cannot run on a problem, or None."""
        reason = self.missing()
        if reason is None and problem.case.op != LAYER:
            reason = peft.missing("transformers")
        if reason is not None:
            return reason
        try:
            self.parametrizations(problem)
        except TooFewEntries as error:
            return str(error)
        return None

    def parametrizations(self, problem: LayerProblem) -> dict[str, Parametrization]:
        """The parametrization of each layer."""
        return {name: spec.parametrization(self.kind) for name, spec in problem.specs.items()}

    def build(self, problem: LayerProblem, parametrizations: dict[str, Parametrization]) -> Adapted:
        """A new model with this contender's layers in it."""
        # Under autocast, full fine-tuning has float32 weights, as with AMP, because small steps
        # vanish in a 16-bit weight. The optimizer's states are float32 with them.
        wide = self.kind == "full" and problem.case.is_16_bit
        root = problem.base(torch.float32 if wide else None)
        root.train()
        return self.adapt(root, parametrizations, problem.case.dropout)


def contenders(case: LayerCase, device: str = "cpu") -> list[LayerContender]:
    """All contenders of a case, by mode.

    With dropout these are the contenders that have dropout, frozen, and full.
    """
    found = []
    for mode in case.modes:
        for name, backend, kind, adapt, missing in _CONTENDERS:
            if mode != FWD_BWD and kind == "frozen":
                continue  # nothing to step
            if case.dropout and kind == "sparse":
                continue  # no low-rank branch, so no dropout
            found.append(LayerContender(case.op, name, backend, kind, adapt, mode, missing))
    return [contender for contender in found if device in contender.devices]


def replace_layer(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer of a model."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)


def _ours(
    root: nn.Module, parametrizations: dict[str, Parametrization], dropout: float, *, path: str
) -> Adapted:
    layers: dict[str, rk.nn.RosaLinear] = {}
    for name, parametrization in parametrizations.items():
        layer = rk.nn.RosaLinear.from_linear(
            root.get_submodule(name),
            parametrization.rank,
            parametrization.pattern,
            ALPHA,
            dropout,
            selector=parametrization.selector,
        )
        if path == "separate":
            layer._cannot_be_written = lambda: "asked for"  # type: ignore[method-assign]
        replace_layer(root, name, layer)
        layers[name] = layer
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, parametrization in parametrizations.items():
        adapter = layers[name].adapter()
        own = {"a": adapter.lora_a, "b": adapter.lora_b, "values": adapter.values}
        trained[name] = {part: own[part] for part in parametrization.trains}  # type: ignore[misc]
        parametrization.initialize(trained[name])

    def attach(optimizer: torch.optim.Optimizer) -> object:
        if path != "resident":
            return None
        handle = rk.nn.make_resident(root, optimizer)
        wrong = {name: path for name, path in handle.paths.items() if path != "resident"}
        if wrong:
            raise RuntimeError(f"make_resident: expected every layer resident, got {wrong}")
        return handle

    def keeps(name: str, x: Tensor) -> Tensor:
        mask = layers[name].adapter().dropout_mask(x)
        assert mask is not None
        return mask

    return Adapted(root, trained, attach, keeps if dropout else None)


def _torch(
    root: nn.Module, parametrizations: dict[str, Parametrization], dropout: float
) -> Adapted:
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, parametrization in parametrizations.items():
        weight = root.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.requires_grad_(bool(parametrization.trains))
        trained[name] = {"weight": weight} if parametrization.trains else {}
    return Adapted(root, trained)


def _present() -> None:
    """Nothing is missing."""


# name, backend, kind of parametrization, adapt, missing
_CONTENDERS: tuple[tuple[str, str, str, Adapt, Callable[[], str | None]], ...] = (
    (OURS, "rosa-kernels, resident", "rosa", partial(_ours, path="resident"), _present),
    ("rosa-scatter", "rosa-kernels, scatter", "rosa", partial(_ours, path="scatter"), _present),
    ("rosa-separate", "rosa-kernels, separate", "rosa", partial(_ours, path="separate"), _present),
    (REFERENCE, "rosa-kernels", "lora", partial(_ours, path="none"), _present),
    ("spa", "rosa-kernels, resident", "sparse", partial(_ours, path="resident"), _present),
    ("cla", "rosa-kernels", "cla", partial(_ours, path="none"), _present),
    (PEFT_REFERENCE, "peft", "lora", peft.lora, partial(peft.missing, "peft")),
    (SUPER_TUNING, "peft", "rosa", peft.super_tuning, partial(peft.missing, "peft")),
    ("peft-super", "peft", "sparse", peft.super_tuning, partial(peft.missing, "peft")),
    (SHIRA, "peft", "sparse", peft.shira, partial(peft.missing, "peft")),
    (FULL, "torch", "full", _torch, _present),
    (FROZEN, "torch", "frozen", _torch, _present),
)


def contender_of(case: LayerCase, name: str, mode: str, device: str) -> LayerContender:
    """The contender with this name and mode."""
    (found,) = (c for c in contenders(case, device) if (c.name, c.mode) == (name, mode))
    return found
