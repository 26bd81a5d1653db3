"""Which layers of a model get an adapter, by PEFT's matching rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from rosa_kernels.nn import RosaLinear
from rosa_kernels.nn.replaced import why_not_plain

ALL_LINEAR = "all-linear"
# Most candidates in an error. SmolLM2-135M has 8 suffixes, models of vision and text about 20.
_CANDIDATES_SHOWN = 20
# A string with one of these characters is a regular expression, and not a name.
_REGEX = re.compile(r"[*+?()\[\]|^$\\{]")
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
    """The layers that `target_modules` selects, by their names in `model`, in the model's order.

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
            (the message says why); a match shares its weight with another module.
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
    shared = _shared_with_others(model)
    head = _output_embeddings(model)
    targets: dict[str, nn.Module] = {}
    inside = tuple[str, ...]()  # prefixes of the submodules of a RosaLinear
    for name, module in model.named_modules():
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
                f"{name}, which shares it with {shared[name]}; exclude it, or untie the two"
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
    module = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    reader = type(model.get_submodule(parent)).__name__
    if isinstance(module, nn.Linear) and child in _READ_WITHOUT_A_CALL.get(reader, ()):
        return f"in {reader}, which reads its weight and does not always call it"
    return _why_not_a_layer(module)


def _why_not_a_layer(module: nn.Module) -> str:
    if isinstance(module, RosaLinear):
        return ""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"of class {type(module).__name__}"
    return why_not_plain(module)


def matches(rule: str | Sequence[str], name: str) -> bool:
    """Whether a module's name matches names or a regular expression, by PEFT's rules.

    A string without a character of regular expressions is a name. PEFT would match it only with a
    module right inside the model.
    """
    if isinstance(rule, str):
        if is_regex(rule):
            return re.fullmatch(rule, name) is not None
        rule = [rule]
    return any(name == key or name.endswith(f".{key}") for key in rule)


def is_regex(rule: str) -> bool:
    """Whether a string is a regular expression, and not a name. A name may have dots."""
    return _REGEX.search(rule) is not None


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
        matched = {n: m for n, m in model.named_modules() if n.endswith(key)}
        if not key or not any(True for m in matched.values() for _ in m.parameters()):
            leaves = Counter(
                name.rpartition(".")[2]
                for name, module in model.named_modules()
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
    names = [name for name, _ in model.named_modules() if name]
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
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _shared_with_others(model: nn.Module) -> dict[str, str]:
    """Layers that share their weight (a tied head), each with the name of the other module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            owners.setdefault(id(weight), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def _candidates(model: nn.Module) -> str:
    shared = _shared_with_others(model)
    counts: Counter[str] = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name and name not in shared and not why_not_a_target(model, name)
    )
    return _counted(counts)


def _left_out(model: nn.Module) -> str:
    """A linear layer that cannot have an adapter, with the reason: all of a model may be such."""
    for name, module in model.named_modules():
        reason = why_not_a_target(model, name) if name and isinstance(module, nn.Linear) else ""
        if reason:
            return f"; left out: {name} {reason}"
    return ""


def _counted(counts: Counter[str]) -> str:
    shown = [f"{name} ({count})" for name, count in counts.items()]
    more = len(shown) - _CANDIDATES_SHOWN
    return ", ".join(shown[:_CANDIDATES_SHOWN]) + (f" and {more} more" if more > 0 else "") or "-"
