"""Adapters in models that accelerate hooks and offloads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import sweep
from torch import nn

import rosa_kernels as rk
from rosa_kernels.masks.targets import find_targets
from rosa_train.adapters.attach import set_masks
from rosa_train.adapters.load import load_adapter
from rosa_train.adapters.merge import export_merged, merge, unload, unmerge
from rosa_train.adapters.save import save_adapter
from rosa_train.adapters.switch import disable_adapter, rosa_modules, set_adapter

from .train_models import give, groups_of, logits, make_llama, make_masks

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
ON_CPU = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
PLACES = dict.fromkeys(ON_CPU, "cpu")


def on_host(model: nn.Module, _: Path) -> None:
    accelerate.cpu_offload(model, CPU)


def on_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), CPU)


def by_block(model: nn.Module, _: Path) -> None:
    accelerate.cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])


def dispatched(model: nn.Module, folder: Path) -> None:
    places = PLACES | {"model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, "cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADED = [on_host, on_disk, by_block, dispatched]


def without_hooks(model: nn.Module) -> nn.Module:
    return accelerate.hooks.remove_hook_from_module(model, recurse=True)


@sweep(offload=OFFLOADED)
def test_adapters_survive_a_later_offload(offload, tmp_path_factory):
    model = make_llama()
    give(model)
    out = logits(model)
    offload(model, tmp_path_factory.mktemp("offload"))
    assert torch.equal(logits(model), out)
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(make_llama()))
    assert torch.equal(logits(model), out)
    assert torch.equal(logits(without_hooks(model)), out)
    unload(model)
    assert torch.equal(logits(model), logits(make_llama()))
    assert len(find_targets(model)) == 14


@sweep(offload=OFFLOADED)
def test_offloaded_weights_are_refused_with_the_reason(offload, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    model = make_llama()
    offload(model, folder / "plain")
    reason = "whose weight accelerate has offloaded" if offload is by_block else "whose forward was"
    with pytest.raises(ValueError, match=f"left out: model.layers.0.self_attn.q_proj {reason}"):
        find_targets(model)
    with pytest.raises(ValueError, match=reason):
        load_adapter(model, saved)
    assert not rosa_modules(model)
    model = make_llama()
    targets = give(model)
    offload(model, folder / "adapted")
    with pytest.raises(RuntimeError, match=r"that may change, got .*: the weight is on the meta"):
        merge(model)
    with pytest.raises(RuntimeError, match=r"weights with data, got model.* on the meta device"):
        export_merged(model, None, folder / "export")
    with pytest.raises(ValueError, match=r"save_adapter: .* got one on the meta device in model"):
        save_adapter(model, folder / "adapter")
    with pytest.raises(ValueError, match=r"set_masks: .* got model.* on the meta device"):
        set_masks(model, make_masks(targets))
    with pytest.raises(RuntimeError, match="unload: expected a model without accelerate's hooks"):
        unload(model)
    assert not (folder / "export").exists()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
def test_a_dispatched_model_merges_and_exports(tmp_path):
    model = make_llama()
    give(model)
    out = logits(model)
    places = PLACES | {"model.layers.1": "cpu"}
    accelerate.dispatch_model(model, places, "cpu", force_hooks=True)
    merge(model)
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), out)
    export_merged(model, None, tmp_path / "export")
    save_adapter(model, tmp_path / "adapter")
    other = make_llama()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), out)


@sweep(how=["resident", "merged"])
def test_offloading_a_weight_with_an_adapter_is_refused(how):
    """accelerate takes W from the state_dict, so S would be lost without a word."""
    model = make_llama()
    give(model)
    if how == "merged":
        merge(model)
    else:
        rk.nn.make_resident(model, torch.optim.SGD(groups_of(model)))
    on_host(model, Path())
    with pytest.raises(RuntimeError, match="weight that holds the adapter, got another Parameter"):
        logits(model)


def test_offloaded_modules_to_save_are_refused(tmp_path):
    model = make_llama()
    give(model, modules_to_save=["lm_head"])
    out = logits(model)
    on_host(model, tmp_path)
    assert torch.equal(logits(model), out)
    for switch in (lambda: disable_adapter(model).__enter__(), lambda: give(model, name="other")):
        with pytest.raises((RuntimeError, ValueError), match=r"meta|forward was replaced"):
            switch()
    set_adapter(model, "default")
    assert torch.equal(logits(model), out)
