"""Exact merging and unmerging, unloading, and export to an ordinary model folder."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rosa_kernels as rk
from rosa_kernels import RosaLinear
from rosa_train.adapters.attach import set_masks
from rosa_train.adapters.merge import export_merged, merge, merged_adapter, unload, unmerge
from rosa_train.adapters.switch import delete_adapter, disable_adapter, rosa_modules, set_adapter
from rosa_train.files import replacing

from .train_models import (
    assert_same,
    give,
    groups_of,
    logits,
    make_llama,
    snapshot,
    transformers,
)

# -- merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "spa", "rosa"])
@pytest.mark.parametrize("resident", [False, True])
def test_unmerge_restores_every_bit(model, method, resident):
    give(model, method)
    if resident:
        rk.nn.make_resident(model, torch.optim.SGD(groups_of(model)))
    before, out = snapshot(model), logits(model)
    merge(model, safe=True)
    assert merged_adapter(model) == "default"
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert merged_adapter(model) is None
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize(
    "run",
    [
        merge,
        unload,
        lambda model: set_adapter(model, "default"),
        lambda model: delete_adapter(model, "default"),
        lambda model: disable_adapter(model).__enter__(),
        lambda model: set_masks(model, {}),
        lambda model: give(model, name="other"),
    ],
    ids=["merge", "unload", "set", "delete", "disable", "set_masks", "attach"],
)
def test_merged_model_refuses_other_operations(run):
    model = make_llama()
    give(model)
    merge(model)
    out = logits(model)
    with pytest.raises(RuntimeError, match="no merged adapter, got 'default' merged; unmerge fi"):
        run(model)
    assert torch.equal(logits(model), out)


def test_unmerge_without_the_base_is_refused():
    model = make_llama()
    give(model)
    with pytest.raises(RuntimeError, match="expected a merged adapter, got none"):
        unmerge(model)
    merge(model, keep_base=False)
    out = logits(model)
    with pytest.raises(RuntimeError, match=r"keep_base=False.*same bits"):
        unmerge(model)
    assert torch.equal(logits(model), out)


def test_failed_safe_merge_changes_nothing():
    model = make_llama()
    give(model)
    *_, last = rosa_modules(model)
    with torch.no_grad():
        model.get_submodule(last).adapters["default"].values[0] = math.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"finite merged weights, got NaN or Inf in {last}"):
        merge(model, safe=True)
    assert_same(before, snapshot(model))
    merge(model)
    assert not model.get_submodule(last).weight.isfinite().all()
    unmerge(model)
    assert_same(before, snapshot(model))


def test_merge_that_fails_midway_is_undone(monkeypatch):
    model = make_llama()
    give(model)
    before = snapshot(model)
    done = []

    def fail_late(self, *args, real=RosaLinear.merge, **kwargs):
        if len(done) == 5:
            raise MemoryError("full")
        done.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(RosaLinear, "merge", fail_late)
    with pytest.raises(MemoryError):
        merge(model)
    assert merged_adapter(model) is None
    assert_same(before, snapshot(model))


def test_unload_restores_the_base_model(model):
    model.get_input_embeddings().weight.requires_grad_(False)
    before = snapshot(model)
    base = logits(model)
    norm = "ln_f" if hasattr(model, "transformer") else "model.norm"
    give(model, "lora", "gone")
    delete_adapter(model, "gone")
    give(model, "rosa", modules_to_save=[norm])
    give(model, "lora", "two")
    set_adapter(model, "default")
    rk.nn.make_resident(model, torch.optim.SGD(groups_of(model, full_lr=1.0)))
    assert unload(model) is model
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), base)
    assert not rosa_modules(model)
    give(model)  # adapters can be attached again


# -- export ----------------------------------------------------------------------------------------


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def load(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["lora", "spa", "rosa"])
@pytest.mark.parametrize("resident", [False, True])
def test_exported_model_has_the_same_logits(model, method, resident, tmp_path):
    give(model, method)
    if resident:
        handle = rk.nn.make_resident(model, torch.optim.SGD(groups_of(model)))
        assert set(handle.paths.values()) == {"resident"} or method == "lora"
    before, out = snapshot(model), logits(model)
    export_merged(model, Tokenizer(), tmp_path / "merged")
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), out)
    exported = load(tmp_path / "merged")
    assert type(exported) is type(model)
    torch.testing.assert_close(logits(exported), out, rtol=1e-4, atol=1e-5)
    merge(model)
    assert torch.equal(logits(exported), logits(model))
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_adapter_can_be_exported(keep_base, tmp_path):
    model = make_llama()
    give(model)
    merge(model, keep_base=keep_base)
    export_merged(model, None, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("untied", [False, True])
def test_export_keeps_bfloat16_and_tied_weights(untied, tmp_path):
    model = make_llama(tie_word_embeddings=True).to(torch.bfloat16)
    give(model, modules_to_save=["model.norm"] + ["embed_tokens"] * untied)
    export_merged(model, None, tmp_path)
    exported = load(tmp_path)
    assert exported.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) is not untied
    assert torch.equal(exported.lm_head.weight, model.lm_head.weight)
    merge(model)
    weights = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_export_holds_one_merged_weight_at_a_time(monkeypatch, tmp_path):
    model = make_llama()
    give(model)
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def counted(self, *args, real=RosaLinear.merged_weight):
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive))
        weight = real(self, *args)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(RosaLinear, "merged_weight", counted)
    export_merged(model, None, tmp_path)
    assert len(most) == 14
    assert max(most) <= 1


def test_failed_export_leaves_the_old_one(tmp_path):
    model = make_llama()
    give(model)
    export_merged(model, None, tmp_path / "merged")
    files = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    *_, last = rosa_modules(model)
    with torch.no_grad():
        model.get_submodule(last).adapters["default"].lora_b[0, 0] = math.nan
    before = snapshot(model)
    for folder in ("merged", "new"):
        with pytest.raises(ValueError, match=f"NaN or Inf in {last}"):
            export_merged(model, None, tmp_path / folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    after = snapshot(model)
    assert list(before) == list(after)
    export_merged(model, None, tmp_path / "new", safe=False)
    assert not load(tmp_path / "new").get_submodule(last).weight.isfinite().all()


def test_overwriting_an_export_keeps_other_files(tmp_path):
    model = make_llama()
    give(model)
    export_merged(model, None, tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    export_merged(model, None, tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "merged_from.json",
        "model.safetensors",
        "notes.txt",
    }


@pytest.mark.parametrize("overwrite", [False, True])
def test_export_refuses_folders_of_others(overwrite, tmp_path):
    base, export, other = tmp_path / "base", tmp_path / "export", tmp_path / "other"
    make_llama().save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    give(model)
    export_merged(model, None, export)
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (base / "merged_from.json").write_text("{}")  # a base model may be an export, too
    (tmp_path / "link").symlink_to(base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = {base: "base model's", tmp_path / "link": "base model's", other: "new or empty"}
    for folder, words in (folders if overwrite else folders | {export: "--overwrite"}).items():
        with pytest.raises(FileExistsError, match=words):
            export_merged(model, None, folder, overwrite=overwrite)
    with pytest.raises(NotADirectoryError, match="expected a folder, got the file"):
        export_merged(model, None, other / "notes.txt", overwrite=overwrite)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_weights_tied_after_attach_are_refused(tmp_path):
    model = make_llama()
    give(model)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight.data = second.weight.data
    for run in (merge, lambda model: export_merged(model, None, tmp_path / "new")):
        with pytest.raises(RuntimeError, match=r"got .*0\.mlp\.up_proj, which is tied to .*1\.mlp"):
            run(model)
    assert [*tmp_path.iterdir()] == []


def test_export_of_other_model_classes_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    give(model)
    with pytest.raises(TypeError, match="expected a transformers model, got Sequential"):
        export_merged(model, None, tmp_path)


# -- files -----------------------------------------------------------------------------------------


def test_interrupted_replacing_removes_the_completion_marker(tmp_path, monkeypatch):
    folder = tmp_path / "folder"

    def write(text: str) -> None:
        with replacing(folder, last="last") as new:
            for name in ("a", "b", "last"):
                (new / name).write_text(text)

    write("old")
    monkeypatch.setattr(Path, "replace", _replace_until(folder / "b"))
    with pytest.raises(OSError, match="pulled the plug"):
        write("new")
    # The process stops between two renames. The file `last`, which marks the folder as complete,
    # is gone.
    assert not (folder / "last").exists()
    assert ((folder / "a").read_text(), (folder / "b").read_text()) == ("new", "old")


def _replace_until(stop: Path):
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == stop:
            raise OSError("pulled the plug")
        return real(self, target)

    return replace


def test_replacing_handles_nested_folders_and_file_modes(tmp_path):
    folder = tmp_path / "new" / "folder"
    for text in ("old", "new"):
        with replacing(folder, last="last") as new:
            (new / "inner").mkdir()
            (new / "inner" / text).write_text(text)
            (new / "inner" / text).chmod(0o600)
            (new / "last").write_text(text)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == [
        "inner",
        "inner/new",
        "last",
    ]
    plain = tmp_path / "plain"
    plain.write_text("")
    modes = {path.stat().st_mode for path in (plain, folder / "inner" / "new", folder / "last")}
    assert len(modes) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
