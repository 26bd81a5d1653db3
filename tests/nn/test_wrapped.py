"""Plain names through wrappers, and tensors that share memory."""

from __future__ import annotations

import pytest
import torch
from conftest import sweep
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from rosa_kernels.nn.wrapped import (
    get_module,
    named_modules,
    named_parameters,
    set_module,
    shared_tensors,
    unwrapped,
)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))


def compiled_inside() -> nn.Module:
    model = make()
    model[1][1] = checkpoint_wrapper(model[1][1])
    model[1] = compiled(model[1])
    return compiled(model)


WRAPPED = {
    "plain": make,
    "compiled": lambda: compiled(make()),
    "compiled parallel": lambda: compiled(nn.DataParallel(make())),
    "checkpointed": lambda: checkpoint_wrapper(make()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(make()),
    "inside": compiled_inside,
}


@sweep(model=WRAPPED)
def test_names_are_those_of_the_plain_model(model: nn.Module) -> None:
    assert [name for name, _ in named_modules(model)] == ["", "0", "1", "1.0", "1.1"]
    assert [n for n, _ in named_parameters(model)] == [n for n, _ in make().named_parameters()]
    for name, module in named_modules(model):
        assert get_module(model, name) is module
        assert unwrapped(module) is module
    with pytest.raises(AttributeError, match=r"Sequential has no module '7', of '1.7'"):
        get_module(model, "1.7")
    new = nn.Linear(2, 2)
    set_module(model, "1.1", new)
    assert get_module(model, "1.1") is new
    x = torch.randn(3, 2)
    assert torch.equal(model(x), new(get_module(model, "0")(x).relu()))


def test_a_compiled_module_is_replaced_with_its_wrapper() -> None:
    model = make()
    model[0] = compiled(model[0])
    set_module(model, "0", new := nn.Linear(2, 2))
    assert model[0] is new


def test_tensors_that_share_memory_are_found() -> None:
    names = ["own", "tied", "head", "aliased", "part", "q", "k", "v", "left", "right", "meta"]
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    model["head"].weight = model["tied"].weight
    model["aliased"].weight.data = model["tied"].weight.data
    model["part"].weight.data = model["tied"].weight.data[2:]
    rows, columns = torch.zeros(12, 4), torch.zeros(4, 8)
    for name, part in zip(["q", "k", "v"], rows.chunk(3), strict=True):
        model[name].weight.data = part
    for name, part in zip(["left", "right"], columns.chunk(2, 1), strict=True):
        model[name].weight.data = part
    model["meta"].to("meta")
    model["part"].register_buffer("table", rows[7:9])
    shared = {name: {*others} for name, others in shared_tensors(model).items()}
    tied = {f"{name}.weight" for name in ("tied", "head", "aliased", "part")}
    assert shared == {name: tied - {name} for name in tied} | {
        "part.table": {"k.weight", "v.weight"},
        "k.weight": {"part.table"},
        "v.weight": {"part.table"},
    }
