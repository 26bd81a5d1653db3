"""Faulty adapter files are refused, and the model stays unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rosa_kernels as rk
from rosa_train.adapters.load import load_adapter
from rosa_train.adapters.save import save_adapter
from rosa_train.adapters.switch import (
    adapter_names,
    rosa_modules,
)

from .train_models import (
    CONFIG,
    KEY,
    Q0,
    WEIGHTS,
    assert_same,
    config_of,
    give,
    make_gpt2,
    make_llama,
    snapshot,
)


def change_config(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | fields))


def drop_from_config(folder: Path, *names: str) -> None:
    config = {name: value for name, value in config_of(folder).items() if name not in names}
    (folder / CONFIG).write_text(json.dumps(config))


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS, metadata_of(folder))


def refused(folder: Path, message: str, model: nn.Module | None = None) -> None:
    """Loading raises ValueError with this message, and the model keeps all its bits."""
    model = make_llama() if model is None else model
    before, names = snapshot(model), adapter_names(model)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder, "loaded")
    assert str(folder) in str(caught.value) or "target_modules" in str(caught.value)
    assert_same(before, snapshot(model))
    assert [type(module) for module in model.modules()] == modules
    assert adapter_names(model) == names


def test_missing_files_are_named(folder):
    model = make_llama()
    with pytest.raises(FileNotFoundError, match=rf"expected {CONFIG} in .*got no directory"):
        load_adapter(model, folder / "nowhere")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=rf"expected {WEIGHTS} in .*\.bin file is pickled"):
        load_adapter(model, folder)
    assert not rosa_modules(model)


def test_adapter_of_another_model_lists_differing_shapes(folder):
    refused(
        folder,
        r"got one of another: 16 of 16 modules differ\n"
        r"module +\| adapter's shape +\| model's shape\n"
        r"model.layers.0.mlp.down_proj +\| \(32, 48\) +\| \(64, 80\)\n"
        r"(.*\n){9}and 6 more",
        make_llama(hidden_size=64, intermediate_size=80, num_key_value_heads=4),
    )
    # The rule matches no module of this model. The error about shapes comes first.
    change_config(folder, modules_to_save=None, target_modules=["q_proj"])
    refused(
        folder, r"of another: 14 of 16 .*\n.*\n.*down_proj +\| \(32, 48\) +\| no such", make_gpt2()
    )


def test_adapter_of_a_deeper_model_is_refused(tmp_path):
    model = make_llama(num_hidden_layers=3)
    give(model, "lora")
    save_adapter(model, tmp_path)
    refused(tmp_path, r"7 of 21 modules differ\n.*\n.*layers.2.* \| no such layer")
    small = make_llama()
    give(small, "lora")
    save_adapter(small, tmp_path)
    model = make_llama(num_hidden_layers=3)
    refused(tmp_path, r"got 7 missing \(model.layers.2.self_attn.q_proj, .*, \.\.\.\)", model)


def test_sparse_adapter_with_other_column_count_is_refused(tmp_path):
    """The tensors give only the rows. In a wider model, every column index is in range."""
    narrow, wide = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(16, 4))
    give(narrow, "spa")
    save_adapter(narrow, tmp_path)
    refused(tmp_path, r"0 +\| \(4, 8\) +\| \(4, 16\)", wide)


def spoiled_tensors():
    """Yields a name, a function that damages the saved tensors, and the expected message."""

    def tensor(part: str, change: Callable[[Tensor], Tensor | None]):
        def spoil(folder: Path) -> None:
            key = f"{KEY}.{part}"
            change_tensors(folder, {key: change(load_file(folder / WEIGHTS)[key])})

        return spoil

    def at(index: int, value: float):
        def change(x: Tensor) -> Tensor:
            x.view(-1)[index] = value
            return x

        return change

    crow, col, values = "rosa_S.crow_indices", "rosa_S.col_indices", "rosa_S.values"
    a, b = "lora_A.weight", "lora_B.weight"
    of = f"valid indices of {Q0}, got: CsrPattern: expected"
    yield "column too large", tensor(col, at(0, 32)), rf"{of} col_indices in \[0, 32\)"
    yield "negative column", tensor(col, at(3, -1)), rf"{of} col_indices in \[0, 32\)"
    yield "unsorted", tensor(col, lambda x: x.flip(0)), f"{of} sorted, unique .*unsorted columns"
    yield "repeated", tensor(col, torch.zeros_like), f"{of} sorted, unique .*repeated columns 0, 0"
    yield "crow starts late", tensor(crow, at(0, 1)), f"{of} crow_indices to run from 0"
    yield "crow ends early", tensor(crow, at(-1, 2)), f"{of} crow_indices to run from 0"
    yield "crow decreases", tensor(crow, at(1, 2**31 - 1)), f"{of} non-decreasing"
    yield "crow too short", tensor(crow, lambda x: x[:-1]), rf"one shape of {Q0}.* and 31 rows"
    yield "crow empty", tensor(crow, lambda x: x[:0]), rf"one shape of {Q0}.* and -1 rows"
    yield "fewer columns", tensor(col, lambda x: x[:-1]), f"{of} crow_indices to run from 0"
    yield "fewer values", tensor(values, lambda x: x[:-1]), f"values of {Q0}, one per index"
    yield "int64 columns", tensor(col, Tensor.long), "col_indices of I32, got I64"
    yield "float columns", tensor(col, Tensor.float), "col_indices of I32, got F32"
    yield "bf16 values", tensor(values, Tensor.bfloat16), "values of F32 or F64, got BF16"
    yield "int A", tensor(a, Tensor.int), "lora_A.weight of F32 or BF16 or .*, got I32"
    yield "complex A", tensor(a, lambda x: x.to(torch.complex64)), "lora_A.weight of .*got C64"
    yield "NaN value", tensor(values, at(0, torch.nan)), f"got NaN or Inf in {KEY}.rosa_S.values"
    yield "infinite B", tensor(b, at(5, torch.inf)), f"got NaN or Inf in {KEY}.lora_B.weight"
    yield "1-D A", tensor(a, lambda x: x[0].clone()), "lora_A.weight with 2 dimensions, got shape"
    yield "2-D values", tensor(values, lambda x: x[None]), "rosa_S.values with 1 dimensions"
    yield (
        "rank of A",
        tensor(a, lambda x: x[:2].clone()),
        rf"expected rank 3 in {Q0} as adapter_config.json says, got A of shape \(2, 32\)",
    )
    yield "A's columns", tensor(a, lambda x: x[:, :8].clone()), rf"one shape of {Q0}.*\(32, 8\)"
    yield "no A", tensor(a, lambda x: None), f"of rank 3 in {Q0}, got lora_A.weight missing"
    yield "no B", tensor(b, lambda x: None), f"{Q0}, got lora_B.weight missing"
    yield "no values", tensor(values, lambda x: None), f"{Q0}, got rosa_S.values missing"
    yield "no columns", tensor(col, lambda x: None), f"{Q0}, got rosa_S.col_indices missing"

    def without_layer(folder: Path) -> None:
        change_tensors(folder, {k: None for k in load_file(folder / WEIGHTS) if KEY in k})

    def with_tensor(key: str, value: Tensor | None):
        return lambda folder: change_tensors(folder, {key: value})

    one = torch.ones(1)
    prefix = "base_model.model."
    yield "no layer", without_layer, rf"got 1 missing \({Q0}\)"
    yield "no head", with_tensor(f"{prefix}lm_head.weight", None), r"got 1 missing \(lm_head.weig"
    yield (
        "stray name",
        with_tensor("stray", one),
        "called base_model.model.<.*<part>, got stray",
    )
    yield "DoRA", with_tensor(f"{KEY}.lora_magnitude_vector", one), r"1 unexpected \(.*magnitude_v"
    yield "other module", with_tensor(f"{prefix}other.weight", one), r"1 unexpected \(other.weight"
    yield (
        "head of another shape",
        with_tensor(f"{prefix}lm_head.weight", torch.ones(63, 32)),
        r"1 of 16 modules differ\n.*\nlm_head.weight \| \(63, 32\) +\| \(64, 32\)",
    )
    yield (
        "NaN in the head",
        with_tensor(f"{prefix}lm_head.weight", torch.full((64, 32), torch.nan)),
        "NaN or Inf in base_model.model.lm_head.weight",
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [pytest.param(spoil, message, id=name) for name, spoil, message in spoiled_tensors()],
)
def test_invalid_tensors_are_refused(folder, spoil, message):
    spoil(folder)
    refused(folder, message)


def spoiled_configs():
    def fields(**changes: Any):
        return lambda folder: change_config(folder, **changes)

    def text(content: bytes):
        return lambda folder: (folder / CONFIG).write_bytes(content)

    yield "no JSON", text(b"{"), "expected JSON in"
    yield "no text", text(b"\xff\xfe"), "expected JSON in"
    yield "deep", text(b"[" * 100_000), "expected JSON in"
    yield "a list", text(b"[1]"), r"expected a JSON object in .*, got \[1\]"
    yield "no type", lambda f: drop_from_config(f, "peft_type"), "peft_type .*got no such field"
    yield "another type", fields(peft_type="IA3"), "peft_type to be 'LORA' or 'ROSA' in .*'IA3'"
    yield "a list as type", fields(peft_type=["LORA"]), r"peft_type .*got \['LORA'\]"
    yield "newer", fields(rosa_format_version=2), "rosa_format_version to be at most 1, the newest"
    yield "no version", fields(rosa_format_version=None), "to be an integer from 1 to 1"
    yield "odd version", fields(rosa_format_version="1"), "to be an integer from 1 to 1 .*'1'"
    yield "no r", lambda f: drop_from_config(f, "r"), "r to be an integer >= 0 .*no such field"
    yield "negative r", fields(r=-1), "r to be an integer >= 0 .*got -1"
    yield "r as text", fields(r="3"), "r to be an integer >= 0 .*got '3'"
    yield "r as bool", fields(r=True), "r to be an integer >= 0 .*got True"
    yield "another r", fields(r=4), "expected rank 4 in .* says, got A of shape"
    yield "r of 0", fields(r=0), "of rank 0 in .*, got lora_A.weight, lora_B.weight unexpected"
    yield "another rank", fields(rank_pattern={"q_proj": 2}), f"expected rank 2 in {Q0} as"
    yield "rank pattern", fields(rank_pattern={"q_proj": "2"}), "rank_pattern to be a mapping"
    yield "bad pattern", fields(rank_pattern={"(": 2}), "rank_pattern to be a mapping"
    yield "pattern list", fields(alpha_pattern=[1]), "alpha_pattern to be a mapping"
    yield "no targets", fields(target_modules=None), "target_modules to be 'all-linear', a regular"
    yield "targets number", fields(target_modules=3), "target_modules to be 'all-linear'"
    yield "targets empty", fields(target_modules=[]), "target_modules to be 'all-linear'"
    yield "bad regex", fields(target_modules="("), "target_modules to be 'all-linear'"
    yield "fewer targets", fields(target_modules=["q_proj"]), "got 12 unexpected"
    yield "other targets", fields(target_modules=["c_attn"]), "target_modules: expected to match"
    yield "excluded", fields(exclude_modules=["q_proj"]), "got 2 unexpected"
    yield "saved number", fields(modules_to_save=3), "modules_to_save to be a list of names"
    yield (
        "not saved",
        fields(modules_to_save=None),
        r"got 2 unexpected \(lm_head.weight, model.norm",
    )
    yield "alpha", fields(lora_alpha=0), "lora_alpha to be a number > 0 .*got 0"
    yield "alpha text", fields(lora_alpha="16"), "lora_alpha to be a number > 0"
    yield "huge alpha", fields(lora_alpha=10**400), "lora_alpha to be a number > 0"
    yield "NaN alpha", fields(lora_alpha=float("nan")), "lora_alpha to be a number > 0"
    yield "dropout", fields(lora_dropout=1), r"lora_dropout to be a number in \[0, 1\)"
    yield "unknown method", fields(method="lorra"), "method to be one of full, lora"
    yield "method list", fields(method=["rosa"]), "method to be one of full, lora"
    yield "wrong method", fields(method="lora"), "a method with low-rank and sparse branches, .*'lo"
    yield "full", fields(method="full"), "a method with low-rank and sparse branches, got 'full'"
    yield "density", fields(density=2), r"density to be a number in \[0, 1\]"
    yield "fan", fields(fan_in_fan_out="no"), "fan_in_fan_out to be true or false"
    yield "a LoRA with S", fields(peft_type="LORA"), "of a LORA of rank 3 .*rosa_S.col_indices, ros"
    yield "biases", fields(bias="all"), "bias to be unset"
    yield "LoRA's bias", fields(lora_bias=True), "lora_bias to be unset"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [pytest.param(spoil, message, id=name) for name, spoil, message in spoiled_configs()],
)
def test_invalid_configs_are_refused(folder, spoil, message):
    spoil(folder)
    refused(folder, message)


def test_invalid_metadata_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    metadata = metadata_of(folder)
    for shapes in (None, "", "[", "[1]", '{"x": [1]}', f'{{"{Q0}": ["a", 1]}}', f'{{"{Q0}": 3}}'):
        changed = metadata | {"shapes": shapes} if shapes is not None else {"format": "pt"}
        save_file(tensors, folder / WEIGHTS, changed)
        refused(folder, "expected the layers' shapes in the metadata")
    shapes = json.dumps(json.loads(metadata["shapes"]) | {Q0: [32, 33]})
    save_file(tensors, folder / WEIGHTS, metadata | {"shapes": shapes})
    refused(folder, rf"one shape of {Q0}, got \(32, 32\) from its tensors, \(32, 33\) from the me")


def test_adapter_name_already_attached_is_refused(saved):
    model = make_llama()
    give(model, name="loaded")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'loaded', which is attached already"):
        load_adapter(model, saved, "loaded")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500, -1, -100])
def test_truncated_weights_file_is_refused(folder, size):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    refused(folder, "expected a complete safetensors file, got")


@settings(max_examples=150)
@given(data=st.data())
def test_corrupt_bytes_load_completely_or_raise_value_error(saved, tmp_path_factory, data):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / "adapter"))
    path = folder / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(path.read_bytes())
    # The header is a tenth of the file, but gets half of the changed bytes.
    header = st.integers(0, min(len(content), 8 + int.from_bytes(content[:2], "little")) - 1)
    places = st.one_of(header, st.integers(0, len(content) - 1))
    for place in data.draw(st.lists(places, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))])
    model = make_llama()
    before = snapshot(model)
    try:
        load_adapter(model, folder)
    except ValueError:
        assert_same(before, snapshot(model))
        assert not rosa_modules(model)
    else:
        for layer in rosa_modules(model).values():
            adapter = layer.adapters["default"]
            adapter.pattern.check_unchanged()
            rk.CsrPattern(adapter.pattern.crow_indices, adapter.pattern.col_indices, adapter.shape)
            assert adapter.values.shape == (adapter.pattern.nnz,)
            assert adapter.values.isfinite().all()
            assert adapter.shape == (layer.out_features, layer.in_features)
    finally:
        shutil.rmtree(folder.parent)
