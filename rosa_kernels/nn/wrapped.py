"""A model's modules and tensors by the names of the plain model, whatever wraps the parts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rosa_kernels.strides import addresses, share_memory

# Submodules that only wrappers have: of torch.compile, FSDP1 and activation checkpointing.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WITH_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, or the module itself."""
    return wrappers(module)[-1]


def wrappers(module: nn.Module) -> list[nn.Module]:
    """The module, the module that it wraps, and so on."""
    found = [module]
    while (key := _inner(found[-1])) is not None:
        inner = found[-1]._modules[key]
        assert inner is not None
        found.append(inner)
    return found


def _inner(module: nn.Module) -> str | None:
    if isinstance(module, _WITH_MODULE):
        return "module"
    return next((key for key in _INNER if module._modules.get(key) is not None), None)


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without wrappers: neither the modules nor their part of a name."""
    seen = set[int]()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if remove_duplicate:
            if id(module) in seen:
                return
            seen.add(id(module))
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from visit(f"{name}.{key}" if name else key, child)

    yield from visit("", model)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()``, with the names of the plain model."""
    seen = set[int]()
    for prefix, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{key}" if prefix else key, parameter


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that plain name. Raises AttributeError if there is none."""
    return unwrapped(at_place(model, name))


def at_place(model: nn.Module, name: str) -> nn.Module:
    """What is at the place of that plain name: the module, or the wrapper around it."""
    module = model
    for key in name.split(".") if name else []:
        parent = unwrapped(module)
        found = parent._modules.get(key)
        if found is None:
            raise AttributeError(f"{type(parent).__name__} has no module {key!r}, of {name!r}")
        module = found
    return module


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` at the place of that plain name, inside the wrappers that call what they hold.

    torch.compile's wrapper calls the module that it was made of. It is replaced, too.
    """
    parent, _, key = name.rpartition(".")
    holder = get_module(model, parent)
    for wrapper in wrappers(at_place(model, name))[:-1]:
        if "_orig_mod" in wrapper._modules:
            break
        inner = _inner(wrapper)
        assert inner is not None
        holder, key = wrapper, inner
    holder._modules[key] = new


def shared_tensors(model: nn.Module) -> dict[str, list[str]]:
    """Parameters and buffers that share memory with others, by name, each with the others' names.

    Disjoint views of one tensor do not share memory. A module with several names counts once.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in named_modules(model):
        for key, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and tensor.numel():
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    shared: dict[str, list[str]] = {}

    def note(one: str, other: str) -> None:
        shared.setdefault(one, []).append(other)
        shared.setdefault(other, []).append(one)

    same: dict[int, str] = {}
    spans: dict[object, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if id(tensor) in same:
            note(same[id(tensor)], name)
        same.setdefault(id(tensor), name)
        # The meta device and tensors that wrap others have no addresses.
        if not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__"):
            spans.setdefault(tensor.device, []).append((*addresses(tensor), name))
    for found in spans.values():
        ahead: list[tuple[int, str]] = []
        for start, end, name in sorted(found):
            ahead = [(last, other) for last, other in ahead if last > start]
            for _, other in ahead:
                one, two = tensors[other], tensors[name]
                if one is not two and share_memory(one, two):
                    note(other, name)
            ahead.append((end, name))
    return shared
