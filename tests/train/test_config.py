"""The arguments: refused values, parsing, units and the fingerprint of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rosa_train.config import (
    ARGUMENTS,
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
    fingerprint,
    flat,
)

from .train_runs import arguments

HERE = Path("here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 3}, r"--density: expected a number in \(0, 1\), got 3"),
        ({"density": 0.0}, r"--density: expected a number in \(0, 1\), got 0.0"),
        ({"density": float("nan")}, "--density: .* got nan"),
        ({"rank": -1}, "--rank: expected an integer >= 0, got -1"),
        ({"rank": 1.5}, "--rank: expected an integer >= 0, got 1.5"),
        ({"rank": True}, "--rank: expected an integer >= 0, got True"),
        ({"dropout": 1.0}, r"--dropout: expected a number in \[0, 1\), got 1.0"),
        ({"alpha": 0}, "--alpha: expected a number > 0, got 0"),
        ({"schedule": "wl"}, "--schedule: expected wl<N>, default, lora_only or spa_only"),
        ({"rank_pattern": "{"}, "--rank_pattern: expected a JSON object such as"),
        ({"rank_pattern": "[1]"}, r"--rank_pattern: expected a JSON object, got \[1\]"),
        ({"rank_pattern": {"q_proj": -2}}, "--rank_pattern: expected integers >= 0, got q_"),
        ({"density_pattern": {"q": 1}}, r"--density_pattern: .* in \[0, 1\), got q: 1"),
        ({"target_modules": []}, r"--target_modules: .* names or a regex, got \[\]"),
        ({"mask_steps": 0}, "--mask_steps: expected a positive integer, got 0"),
        ({"mask_scope": "row"}, "--mask_scope: expected one of layer, global, got 'row'"),
        ({"mask_memory": "many"}, "--mask_memory: expected bytes such as 512M or 2G, got 'many'"),
        ({"train_file": None}, "--train_file: expected it or --dataset_name, got 0 of them"),
        ({"dataset_name": "x"}, "--train_file: expected it or --dataset_name, got 2 of them"),
        ({"max_length": 1}, "--max_length: expected at least 2 tokens, got 1"),
        ({"on_too_long": "cut"}, "--on_too_long: expected one of error, truncate, drop"),
        ({"max_train_examples": 0}, "--max_train_examples: expected a positive integer, got 0"),
        ({"dtype": "int8"}, "--dtype: expected one of auto, float32, bfloat16, float16"),
        ({"max_steps": 0}, "--max_steps: expected a positive integer, or -1, got 0"),
        ({"num_train_epochs": 0}, "--num_train_epochs: expected a number > 0, got 0"),
        ({"learning_rate": -1.0}, "--learning_rate: expected a number >= 0, got -1.0"),
        ({"learning_rate": float("inf")}, "--learning_rate: expected a number >= 0, got inf"),
        ({"adam_beta2": 1.0}, r"--adam_beta2: expected a number in \[0, 1\), got 1.0"),
        ({"save_steps": -1}, "--save_steps: expected an integer >= 0, got -1"),
        ({"logging_steps": None}, "--logging_steps: expected a positive integer, got None"),
        ({"mixed_precision": "fp8"}, "--mixed_precision: expected one of no, bf16, fp16"),
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": "last"},
            "--overwrite_output_dir: expected it or --resume_from_checkpoint, got both",
        ),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(HERE, HERE, **changes)


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (["all-linear"], "all-linear"),
        ("all-linear", "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj", "v_proj"], ["self_attn.q_proj", "v_proj"]),
        ([r".*\.layers\.[01]\..*"], r".*\.layers\.[01]\..*"),
    ],
)
def test_target_modules_accepts_names_or_a_regex(given: Any, targets: Any) -> None:
    assert MethodArguments(target_modules=given).targets == targets


def test_an_optional_number_may_be_none() -> None:
    assert TrainArguments("out", save_total_limit=None).save_total_limit is None


def test_excluded_modules() -> None:
    assert MethodArguments().excluded is None
    assert MethodArguments(exclude_modules=["lm_head"]).excluded == ["lm_head"]


@pytest.mark.parametrize(
    ("given", "count"), [("512", 512), ("1.5K", 1536), ("2G", 2 << 30), ("3MiB", 3 << 20)]
)
def test_memory_units_are_binary(given: str, count: int) -> None:
    assert MethodArguments(mask_memory=given).mask_bytes() == count


@pytest.mark.parametrize(("given", "kept"), [("True", "last"), ("False", None), ("x", "x")])
def test_resume_accepts_true_and_false_as_text(given: str, kept: str | None) -> None:
    assert TrainArguments("out", resume_from_checkpoint=given).resume_from_checkpoint == kept


def test_hf_argument_parser_reads_the_command_line() -> None:
    transformers = pytest.importorskip("transformers")
    line = (
        "--model_name_or_path m --train_file t.jsonl --output_dir o --density 0.1 --packing "
        '--rank_pattern {"q_proj":3} --target_modules q_proj v_proj --eval_steps 7'
    )
    parser = transformers.HfArgumentParser(ARGUMENTS)
    model, data, method, run = parser.parse_args_into_dataclasses(line.split())
    assert (model.model_name_or_path, data.packing, run.eval_steps) == ("m", True, 7)
    assert method.targets == ["q_proj", "v_proj"]
    assert method.rank_pattern == {"q_proj": 3}
    assert (method.density, method.rank, method.schedule) == (0.1, None, None)


def test_argument_file_reads_back_unchanged(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given = arguments(HERE, HERE, rank_pattern={"q_proj": 3}, packing=True)
    (tmp_path / "args.json").write_text(json.dumps(flat(*given)))
    parser = transformers.HfArgumentParser(ARGUMENTS)
    assert list(parser.parse_json_file(str(tmp_path / "args.json"))) == given


def test_fingerprint_covers_arguments_that_change_the_weights() -> None:
    first = fingerprint(*arguments(HERE, HERE))
    for name, value in {"rank": 4, "seed": 1, "learning_rate": 1.0, "packing": True}.items():
        assert fingerprint(*arguments(HERE, HERE, **{name: value})) != first, name
    for name, value in {"save_steps": 4, "output_dir": "o", "report_to": "tensorboard"}.items():
        assert fingerprint(*arguments(HERE, HERE, **{name: value})) == first, name


def test_argument_names_are_unique_and_have_help() -> None:
    kinds = (ModelArguments, DataArguments, MethodArguments, TrainArguments)
    fields = [f for kind in kinds for f in kind.__dataclass_fields__.values()]
    assert len({f.name for f in fields}) == len(fields)
    assert all(f.metadata["help"].endswith((".", ")")) for f in fields)


def test_templates_hold_any_text() -> None:
    texts = {"prompt_template": "\\nabla {q}\n\\theta", "completion_template": "\\\\ {a}"}
    args = DataArguments(train_file="x.jsonl", **texts)
    assert args.prompt_template == texts["prompt_template"]
    assert args.completion_template == texts["completion_template"]


def test_a_single_name_may_be_a_string() -> None:
    args = MethodArguments(exclude_modules="k_proj", modules_to_save="lm_head")
    assert (args.excluded, args.modules_to_save) == (["k_proj"], ["lm_head"])
    assert MethodArguments(exclude_modules="").excluded is None
