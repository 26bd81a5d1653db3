"""Which layers of a model get an adapter, by PEFT's matching rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from rosa_kernels.bounds import is_regex
from rosa_kernels.nn import RosaLinear
from rosa_kernels.nn.replaced import why_not_plain
from rosa_kernels.nn.wrapped import (
    at_place,
    get_module,
    named_modules,
    shared_tensors,
    unwrapped,
    wrappers,
)

ALL_LINEAR = "all-linear"
# Most candidates in an error. SmolLM2-135M has 8 suffixes, models of vision and text about 20.
_CANDIDATES_SHOWN = 20
# Modules, by class name, that read the weight of a child and do not call it: transformers' Mamba
# mixers (x_proj and out_proj in fused kernels only), and torch's fused loss.
_READ_WITHOUT_A_CALL = {
    "LinearCrossEntropyLoss": ("linear",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: str | Sequence[str] = (),
    *,
    strict: bool = True,
) -> dict[str, nn.Module]:
    """The layers that `target_modules` selects, by their names, in the model's order.

    Names are those of the plain model, also if torch.compile, DistributedDataParallel, FSDP or
    activation checkpointing wraps the model or parts of it.

    A layer is ``nn.Linear``, the Conv1D of transformers (GPT-2's layer, with a transposed weight)
    or a :class:`rosa_kernels.RosaLinear` that replaced one of them. An adapter would change or miss
    what some layers compute, so they are no targets: those with a forward of their own, with a
    parametrized or quantised weight, and those whose parent reads the weight and does not call them
    (``nn.MultiheadAttention.out_proj``, ``dt_proj`` of Mamba).

    Args:
        model: the model.
        target_modules: ``"all-linear"`` selects every layer except the output head and layers that
            share their weight with another module. Another string is a regular expression, which
            must match the whole name, or a single name. A sequence holds names: a name selects the
            module of that name, and modules whose name ends in a dot and that name.
        exclude_modules: names or a regular expression, by the same rules; matches are left out.
        modules_to_save: modules that train in full. Nothing inside them is a target.
        strict: every name must match a module. False is for files of PEFT, whose lists may name
            modules that only other models have.

    Raises:
        ValueError: nothing matches, or a name or `exclude_modules` matches no module (the message
            names it and lists candidates); a match cannot have an adapter
            (the message says why); a match shares its weight's memory with another tensor; the
            model has an adapter of PEFT.
    """
    everything = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
    if not target_modules or (not everything and not _is_names(target_modules)):
        raise ValueError(
            f"target_modules: expected {ALL_LINEAR!r}, a regular expression or a list of names, "
            f"got {target_modules!r}"
        )
    if isinstance(modules_to_save, str):
        modules_to_save = [modules_to_save]
    for option, rule in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        _check_rule(option, rule)
        if rule and strict and not (rule is target_modules and everything):
            _check_matches(option, rule, model)
    check_without_peft(model, "find_targets")
    shared = shared_weights(model)
    head = _output_embeddings(model)
    targets: dict[str, nn.Module] = {}
    inside = tuple[str, ...]()  # prefixes of the submodules of a RosaLinear
    for name, module in named_modules(model):
        if not name or name.startswith(inside):
            continue
        if isinstance(module, RosaLinear):
            inside += (f"{name}.",)
        if _excluded(name, exclude_modules, modules_to_save):
            continue
        if everything:
            if module is not head and name not in shared and not why_not_a_target(model, name):
                targets[name] = module
            continue
        if not matches(target_modules, name):
            continue
        reason = why_not_a_target(model, name)
        if reason:
            raise ValueError(
                f"target_modules: expected plain modules of class Linear or Conv1D, got {name} "
                f"{reason}; candidates: {_candidates(model)}"
            )
        if name in shared:
            raise ValueError(
                "target_modules: expected modules that share their weight with no other, got "
                f"{name}, which is tied: it shares its memory with {shared[name]}; exclude it, or "
                "untie the two"
            )
        targets[name] = module
    if not targets:
        raise ValueError(
            f"target_modules: expected to match a module, got {target_modules!r}"
            + (f" without {exclude_modules!r}" if exclude_modules else "")
            + f"; candidates: {_candidates(model)}{_left_out(model)}"
        )
    return targets


def target_shapes(targets: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """The (m, n) = (outputs, inputs) of each layer, even if its weight is stored transposed."""
    return {name: layer_shape(module) for name, module in targets.items()}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """The (m, n) = (outputs, inputs) of one layer."""
    if isinstance(layer, RosaLinear):
        return layer.out_features, layer.in_features
    rows, cols = layer.weight.shape  # type: ignore[misc]
    return (int(cols), int(rows)) if is_conv1d(layer) else (int(rows), int(cols))


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, by its name: importing that takes seconds."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def is_layer(module: nn.Module) -> bool:
    """Whether `module` can have an adapter, whatever its parent does with it."""
    return not _why_not_a_layer(module)


def why_not_a_target(model: nn.Module, name: str) -> str:
    """Why the module of that name cannot have an adapter, to follow the name; "" if it can."""
    module = get_module(model, name)
    parent, _, child = name.rpartition(".")
    reader = type(get_module(model, parent)).__name__
    if any("_orig_mod" in wrapper._modules for wrapper in wrappers(at_place(model, name))):
        return "that torch.compile wraps alone; compile it later, or a module around it"
    if is_layer(module) and module.weight.is_meta and _is_offloaded(model, name):
        return "whose weight accelerate has offloaded; attach before that"
    if isinstance(module, nn.Linear) and child in _READ_WITHOUT_A_CALL.get(reader, ()):
        return f"in {reader}, which reads its weight and does not always call it"
    return _why_not_a_layer(module)


def _is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether a hook of accelerate, on the module or around it, may bring its weight."""
    parts = name.split(".")
    around = (get_module(model, ".".join(parts[:count])) for count in range(len(parts) + 1))
    return any(hasattr(module, "_hf_hook") for module in around)


def _why_not_a_layer(module: nn.Module) -> str:
    if isinstance(module, RosaLinear):
        return ""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"of class {type(module).__name__}"
    if type(module).__module__.startswith("bitsandbytes."):
        return f"of class {type(module).__name__}: bitsandbytes has quantised its weight"
    return why_not_plain(module)


def matches(rule: str | Sequence[str], name: str) -> bool:
    """Whether a module's name matches names or a regular expression, by PEFT's rules.

    A single name may be a string.
    """
    rule = as_rule(rule)
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in rule)


def as_rule(rule: str | Sequence[str]) -> str | Sequence[str]:
    """A rule as PEFT reads it: a string that is a single name becomes a list of that name.

    PEFT takes every string but "all-linear" as a regular expression for the whole name.
    """
    name = isinstance(rule, str) and rule.lower() != ALL_LINEAR and not is_regex(rule)
    return [rule] if name else rule  # type: ignore[list-item]


def check_pattern(pattern: Iterable[str], names: Iterable[str], option: str) -> None:
    """Raise `ValueError` for a key of a PEFT pattern that matches none of the layers' names."""
    names = list(names)
    for key in pattern:
        _check_rule(option, key)
    unused = [key for key in pattern if all(pattern_key([key], name) is None for name in names)]
    if unused:
        raise ValueError(
            f"{option}: expected keys that match a layer, got {unused} on layers like "
            f"{next(iter(names), 'none')}"
        )


def pattern_key(keys: Iterable[str], name: str) -> str | None:
    """The first key of a PEFT pattern (``rank_pattern``, ...) that matches the end of `name`."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


def saved_modules(model: nn.Module, modules_to_save: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose name ends in an entry of `modules_to_save`, which is PEFT's rule.

    No dot is needed before the entry. So "norm" also selects "input_layernorm", as in PEFT.

    Raises:
        ValueError: an entry selects no module, or only modules without parameters.
    """
    found: dict[str, nn.Module] = {}
    for key in [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save:
        matched = {n: m for n, m in named_modules(model) if n.endswith(key)}
        if not key or not any(True for m in matched.values() for _ in m.parameters()):
            leaves = Counter(
                name.rpartition(".")[2]
                for name, module in named_modules(model)
                if name and any(True for _ in module.parameters(recurse=False))
            )
            raise ValueError(
                f"modules_to_save: expected the name of a module with parameters, got {key!r}; "
                f"candidates: {_counted(leaves)}"
            )
        found.update(matched)
    return found


def _check_rule(option: str, rule: str | Sequence[str] | None) -> None:
    if isinstance(rule, str):
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(
                f"{option}: expected a regular expression, got {rule!r}: {error}"
            ) from error


def _check_matches(option: str, rule: str | Sequence[str], model: nn.Module) -> None:
    names = [name for name, _ in named_modules(model) if name]
    parts = [rule] if isinstance(rule, str) else [[one] for one in rule]
    unused = [part for part in parts if not any(matches(part, name) for name in names)]
    if unused:
        got = unused[0] if isinstance(rule, str) else [one for part in unused for one in part]
        raise ValueError(
            f"{option}: expected to match a module, got {got!r}; candidates: {_candidates(model)}"
        )


def _is_names(rule: str | Sequence[str]) -> bool:
    return isinstance(rule, str) or all(isinstance(name, str) and name for name in rule)


def _excluded(
    name: str, exclude_modules: str | Sequence[str] | None, modules_to_save: Sequence[str]
) -> bool:
    if exclude_modules and matches(exclude_modules, name):
        return True
    return any(f".{key}." in f".{name}." for key in modules_to_save)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(unwrapped(model), "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return unwrapped(head) if isinstance(head, nn.Module) else None


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Modules whose weight shares memory with another tensor (a tied head), with its name."""
    return {
        name.rpartition(".weight")[0]: others[0]
        for name, others in shared_tensors(model).items()
        if name.endswith(".weight") or name == "weight"
    }


def check_without_peft(model: nn.Module, op: str) -> None:
    """Raise `ValueError` for a model with an adapter of PEFT.

    Its factors are linear layers, too, and files hold the names of a model without them.
    """
    for name, module in named_modules(model):
        if any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__):
            raise ValueError(
                f"{op}: expected a model without adapters of PEFT, got PEFT's "
                f"{type(module).__name__}{f' in {name}' if name else ''}; call its "
                "merge_and_unload() or unload() first"
            )


def _candidates(model: nn.Module) -> str:
    shared = shared_weights(model)
    counts: Counter[str] = Counter(
        name.rpartition(".")[2]
        for name, module in named_modules(model)
        if name and name not in shared and not why_not_a_target(model, name)
    )
    return _counted(counts)


def _left_out(model: nn.Module) -> str:
    """A linear layer that cannot have an adapter, with the reason: all of a model may be such."""
    for name, module in named_modules(model):
        reason = why_not_a_target(model, name) if name and isinstance(module, nn.Linear) else ""
        if reason:
            return f"; left out: {name} {reason}"
    return ""


def _counted(counts: Counter[str]) -> str:
    shown = [f"{name} ({count})" for name, count in counts.items()]
    more = len(shown) - _CANDIDATES_SHOWN
    return ", ".join(shown[:_CANDIDATES_SHOWN]) + (f" and {more} more" if more > 0 else "") or "-"
