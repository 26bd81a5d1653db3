"""Saving and loading adapters, also to and from PEFT; a failed save changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sweep
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rosa_kernels as rk
from rosa_kernels.masks.targets import find_targets, target_shapes
from rosa_train import files
from rosa_train.adapters import save as adapter_module
from rosa_train.adapters.attach import attach, set_masks
from rosa_train.adapters.load import load_adapter
from rosa_train.adapters.merge import export_merged, unload
from rosa_train.adapters.save import save_adapter
from rosa_train.adapters.switch import adapter_spec, rosa_modules, set_adapter, trainable_parameters
from rosa_train.methods.budget import allocate

from .train_models import (
    CONFIG,
    KEY,
    Q0,
    WEIGHTS,
    assert_same,
    config_of,
    give,
    groups_of,
    ignore_pefts_warning,
    logits,
    make_gpt2,
    make_llama,
    make_masks,
    perturb,
    snapshot,
)

# -- saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "lora+", "spa", "rosa"])
def test_saved_adapter_loads_with_the_same_logits(make, method, tmp_path):
    model = make()
    give(model, method)
    out = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    other = make()
    spec = load_adapter(other, tmp_path / "adapter", "mine")
    assert torch.equal(logits(other), out)
    assert adapter_spec(other, "mine") is spec
    for field in ("method", "ranks", "alphas", "nnz", "dropout", "target_modules"):
        assert getattr(spec, field) == getattr(adapter_spec(model), field), field
    assert trainable_parameters(other)[0] == 0
    save_adapter(other, tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        again, first = tmp_path / "again" / name, tmp_path / "adapter" / name
        assert again.read_bytes() == first.read_bytes()


def test_saved_files_hold_the_expected_config_and_tensors(saved):
    config = config_of(saved)
    assert config == {
        "peft_type": "ROSA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "exclude_modules": None,
        "modules_to_save": ["lm_head", "model.norm"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "method": "rosa",
        "density": pytest.approx(0.05, rel=0.2),
        "rosa_format_version": 1,
    }
    tensors = load_file(saved / WEIGHTS)
    assert len(tensors) == 14 * 5 + 2
    parts = {
        name.removeprefix(f"{KEY}."): (tensor.dtype, tensor.dim())
        for name, tensor in tensors.items()
        if name.startswith(KEY)
    }
    assert parts == {
        "lora_A.weight": (torch.float32, 2),
        "lora_B.weight": (torch.float32, 2),
        "rosa_S.values": (torch.float32, 1),
        "rosa_S.crow_indices": (torch.int32, 1),
        "rosa_S.col_indices": (torch.int32, 1),
    }
    assert tensors["base_model.model.lm_head.weight"].shape == (64, 32)


def test_each_adapter_saves_its_own_modules_to_save(saved, tmp_path):
    model = make_llama()
    load_adapter(model, saved, "one")
    one = logits(model)
    give(model, "lora", "two", seed=2, modules_to_save=["model.norm"])
    save_adapter(model, tmp_path / "one", "one")
    save_adapter(model, tmp_path / "two")
    two = logits(model)
    for name, expected in [("one", one), ("two", two)]:
        other = make_llama()
        load_adapter(other, tmp_path / name)
        assert torch.equal(logits(other), expected)
        assert torch.equal(logits(model), two)
    set_adapter(model, "one")
    assert torch.equal(logits(model), one)


def test_resident_and_merged_models_save_the_same_tensors(tmp_path):
    from rosa_train.adapters.merge import merge

    model = make_llama()
    give(model)
    save_adapter(model, tmp_path / "plain")
    rk.nn.make_resident(model, torch.optim.SGD(groups_of(model)))
    save_adapter(model, tmp_path / "resident")
    merge(model)
    save_adapter(model, tmp_path / "merged")
    plain = (tmp_path / "plain" / WEIGHTS).read_bytes()
    assert (tmp_path / "resident" / WEIGHTS).read_bytes() == plain
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == plain
    with pytest.raises(RuntimeError, match="expected no merged adapter"):
        load_adapter(model, tmp_path / "plain", "other")


def test_loaded_adapter_can_be_trained_further(saved):
    model = make_llama()
    load_adapter(model, saved, trainable=True)
    names = {group["name"] for group in groups_of(model, full_lr=1e-3)}
    assert names == {"lora_a", "lora_b", "sparse", "full", "full_no_decay"}


def test_bfloat16_model_keeps_the_adapter_in_float32(saved):
    model = make_llama().to(torch.bfloat16)
    load_adapter(model, saved)
    adapter = model.get_submodule(Q0).adapters["default"]
    tensors = load_file(saved / WEIGHTS)
    assert torch.equal(adapter.lora_a, tensors[f"{KEY}.lora_A.weight"])
    assert torch.equal(adapter.values, tensors[f"{KEY}.rosa_S.values"])
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_varying_ranks_alphas_and_missing_branches_round_trip(tmp_path):
    model = make_llama()
    targets = find_targets(model, r".*\.(self_attn|mlp)\..*_proj", ["o_proj"])
    allocation = allocate(
        "rosa",
        target_shapes(targets),
        rank=4,
        density=0.05,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 0, "k_proj": 0},
        density_pattern={"v_proj": 0.0, "k_proj": 0.0},
    )
    options = {"alpha_pattern": {"gate_proj": 2.5}, "target_modules": list(targets)}
    attach(model, "rosa", allocation, targets, **options)
    masks = make_masks(targets)
    none = torch.zeros(16, 32)
    for name in targets:
        if name.endswith(("v_proj", "k_proj")):
            masks[name] = rk.CsrPattern.from_mask(none)
    set_masks(model, masks)
    perturb(model)
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert config["rank_pattern"]["model.layers.1.mlp.up_proj"] == 0
    assert config["alpha_pattern"]["model.layers.0.mlp.gate_proj"] == 2.5
    other = make_llama()
    spec = load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert spec.ranks == allocation.ranks
    assert adapter_spec(model).alphas == spec.alphas


def test_targets_that_differ_from_rule_saved_by_name(tmp_path):
    model = make_llama()
    targets = find_targets(model, ["q_proj"])
    allocation = allocate("lora", target_shapes(targets), rank=2)
    attach(model, "lora", allocation, targets)  # records the rule "all-linear"
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == list(targets)
    assert list(rosa_modules(make_llama())) == []
    other = make_llama()
    load_adapter(other, tmp_path)
    assert list(rosa_modules(other)) == list(targets)


def test_rosa_before_its_masks_is_saved_as_lora(tmp_path):
    model = make_llama()
    targets = find_targets(model)
    attach(model, "rosa", allocate("rosa", target_shapes(targets), rank=2, density=0.1), targets)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "LORA"
    other = make_llama()
    assert load_adapter(other, tmp_path).method.name == "rosa"
    set_masks(other, make_masks(targets))


def test_spa_before_its_masks_cannot_be_saved(tmp_path):
    model = make_llama()
    targets = find_targets(model)
    attach(model, "spa", allocate("spa", target_shapes(targets), density=0.1), targets)
    with pytest.raises(ValueError, match="got 'default' of method spa before its masks are set"):
        save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- wrapped models --------------------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_blocks(model: nn.Module) -> nn.Module:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = compiled(block)
    return model


WRAPPERS = [compiled, compiled_blocks, checkpoint_wrapper, nn.DataParallel]


@sweep(wrap=WRAPPERS)
def test_a_wrapped_model_has_plain_names(wrap, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrapped")
    plain = make_llama()
    load_adapter(plain, saved)
    out = logits(plain)
    # The adapter is loaded before and after wrapping.
    inside, outside = make_llama(), wrap(make_llama())
    load_adapter(inside, saved)
    load_adapter(outside, saved)
    for index, model in enumerate((wrap(inside), outside)):
        assert torch.equal(logits(model), out)
        save_adapter(model, folder / f"adapter{index}")
        for name in (CONFIG, WEIGHTS):
            assert (folder / f"adapter{index}" / name).read_bytes() == (saved / name).read_bytes()
        export_merged(model, None, folder / f"export{index}")
        exported = type(plain).from_pretrained(folder / f"export{index}").eval()
        torch.testing.assert_close(logits(exported), out, rtol=1e-4, atol=1e-5)
        assert find_targets(model, r"model\.layers\..*_proj").keys() == find_targets(plain).keys()
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        assert rk.nn.make_resident(model, optimizer).paths.keys() == rosa_modules(plain).keys()
        assert torch.equal(logits(model), out)
        unload(model)
        assert torch.equal(logits(model), logits(make_llama()))


def test_keys_of_a_wrapper_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    wrapped = "base_model.model._orig_mod."
    changed = {name.replace("base_model.model.", wrapped, 1): t for name, t in tensors.items()}
    save_file(changed, folder / WEIGHTS, {"shapes": "{}", "method": "rosa"})
    with pytest.raises(ValueError, match=r"_orig_mod\.model\.layers[^|]*\|[^|]*\| no such"):
        load_adapter(make_llama(), folder)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group that has only this process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_trainable_adapter_comes_before_ddp(saved):
    model = make_llama()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="DistributedDataParallel does not wrap yet"):
        load_adapter(wrapped, saved, trainable=True)
    load_adapter(wrapped, saved)
    plain = make_llama()
    load_adapter(plain, saved)
    assert torch.equal(logits(wrapped), logits(plain))
    targets = find_targets(plain)
    with pytest.raises(ValueError, match="DistributedDataParallel does not wrap yet"):
        set_masks(wrapped, make_masks(targets))


# -- PEFT ------------------------------------------------------------------------------------------


def peft_model(make: Callable[[], nn.Module], **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    perturb(model, torch.Generator().manual_seed(3))
    return model


@ignore_pefts_warning
@pytest.mark.parametrize("method", ["lora", "lora+"])
def test_peft_loads_our_lora(make, method, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    give(model, method)
    save_adapter(model, tmp_path, base_model_name_or_path="some/model")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


@ignore_pefts_warning
def test_peft_loads_our_rank_patterns_and_saved_modules(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_llama()
    options = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    targets = find_targets(model, **options)
    allocation = allocate("lora", target_shapes(targets), rank=4, rank_pattern={"1.*q_proj": 2})
    attach(model, "lora", allocation, targets, alpha_pattern={"up_proj": 5}, **options)
    perturb(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


TIED = [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]]


@ignore_pefts_warning
@pytest.mark.filterwarnings("ignore:Model with:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has:UserWarning")
@sweep(saved=TIED)
def test_tied_modules_to_save_equal_those_of_peft(saved, tmp_path):
    peft = pytest.importorskip("peft")

    def make() -> nn.Module:
        return make_llama(tie_word_embeddings=True)

    model = make()
    give(model, "lora", modules_to_save=saved)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    again = make()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    theirs = peft_model(make, target_modules=["q_proj"], modules_to_save=saved)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    config = config_of(tmp_path / "theirs") | {"ensure_weight_tying": True}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ensure_weight_tying to be unset"):
        load_adapter(make(), tmp_path / "theirs")


@ignore_pefts_warning
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:You have passed exclude:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "c_attn"], "r": 2, "lora_alpha": 32, "lora_dropout": 0.1},
        {"target_modules": ["up_proj", "c_fc"], "use_rslora": True},
        {"target_modules": r".*\.1\..*(v_proj|c_proj)"},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "nothing": 5}},
        {"target_modules": "all-linear", "alpha_pattern": {"1.mlp.down_proj": 1.5}},
        {"target_modules": ["k_proj", "c_attn"], "layers_to_transform": [1]},
        {"target_modules": ["k_proj", "c_attn"], "modules_to_save": ["norm", "ln_f"]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
    ids=str,
)
def test_load_adapter_reads_peft_lora(make, options, tmp_path):
    if make is make_gpt2:
        options = options | {"fan_in_fan_out": True}
    theirs = peft_model(make, **options)
    theirs.save_pretrained(tmp_path)
    model = make()
    assert load_adapter(model, tmp_path).method.name == "lora"
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    save_adapter(model, tmp_path / "ours")
    again = make()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


@ignore_pefts_warning
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora to be unset \(DoRA is another method\)"),
        ({"bias": "all"}, r"bias to be unset \(biases do not train\).*got 'all'"),
        ({"init_lora_weights": "pissa"}, "others change the base weights.*'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices to be unset"),
    ],
    ids=str,
)
def test_unsupported_peft_options_are_refused(options, message, tmp_path):
    theirs = peft_model(make_llama, target_modules=["q_proj"], **options)
    theirs.save_pretrained(tmp_path)
    model = make_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


# -- failures and other files ----------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["adapter", "new"])
def test_a_full_disk_leaves_the_old_adapter(folder, name, monkeypatch):
    model = make_llama()
    give(model, "rosa", seed=5)
    before = contents(folder)
    written = []

    def write_half(path: Path, *args: Any) -> None:
        path.write_bytes(b"half of it")
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_module, "_write_tensors", write_half)
    with pytest.raises(OSError, match="No space left on device"):
        save_adapter(model, folder.parent / name)
    assert written
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_safetensors_error_on_full_disk_becomes_os_error(folder, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(adapter_module, "_write_tensors", fail)
    model = make_llama()
    give(model)
    with pytest.raises(OSError, match=r"save_adapter: .*No space left on device.*, writing to "):
        save_adapter(model, folder)


def test_saving_over_an_adapter_keeps_unrelated_files(folder):
    (folder / "README.md").write_text("mine")
    model = make_llama()
    give(model, "lora")
    save_adapter(model, folder)
    assert sorted(contents(folder)) == ["README.md", CONFIG, WEIGHTS]
    other = make_llama()
    load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))


def test_saving_syncs_files_before_folders(tmp_path, monkeypatch):
    synced = []

    def fsync(path: Path, real: Callable[[Path], None] = files.fsync) -> None:
        synced.append(path.name)
        real(path)

    monkeypatch.setattr(files, "fsync", fsync)
    model = make_llama()
    give(model)
    save_adapter(model, tmp_path / "adapter")
    # The files and their new folder are synced first, then the parent folder.
    assert set(synced[:2]) == {CONFIG, WEIGHTS}
    assert synced[-1] == tmp_path.name


def test_saving_to_a_file_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    model = make_llama()
    give(model)
    with pytest.raises(NotADirectoryError, match="expected a directory, got the file"):
        save_adapter(model, tmp_path / "file")
