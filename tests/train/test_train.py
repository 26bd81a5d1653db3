"""What a training run does, what it writes, and what stops it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rosa_train.adapters.load import load_adapter
from rosa_train.data.dataset import read_dataset
from rosa_train.run import evaluate, mask_phase, metrics, setup, step
from rosa_train.run.checkpoint import checkpoints, read_state
from rosa_train.run.evaluate import target_loss
from rosa_train.run.train import train

from .train_runs import arguments, sizes

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

METHODS = ["rosa", "spa", "lora", "lora+", "full"]


def weights(result: Any) -> dict[str, torch.Tensor]:
    (path,) = Path(result.final).glob("*.safetensors")
    return load_file(path)


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same loss with infinite gradients: it adds the root of 0, whose slope is infinite."""
    return loss + (loss - loss.detach()).sqrt()


# -- what a run does ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_first_says_what_it_will_do(
    method: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"max_steps": 4, "save_total_limit": None}
    if method != "full":
        changes["modules_to_save"] = ["model.norm"]
    result = train(*arguments(source, tmp_path / "out", **sizes(method) | changes))
    said_all = capsys.readouterr().err  # transformers' progress bar comes first
    head, *lines = said_all[said_all.index("Training") :].splitlines()
    assert head == f"Training with {method}"
    said = {line[2:14].strip(): line[15:] for line in lines[:7]}
    assert said["model"] == f"{source}, float32, on cpu, 1 threads"
    assert said["targets"].startswith("all para" if method == "full" else "14 layers (q_proj, k_")
    share = f"{result.trainable / 18_208:.2%} of the model's 18,208"
    assert said["trainable"] == f"{result.trainable:,} parameters, {share}"
    assert said["examples"] == "41 to train, none to evaluate (--eval_file)"
    masks = {"rosa": "; masks are chosen after step 3", "spa": "; masks are chosen after step 0"}
    assert said["steps"] == "4 of 8 rows" + masks.get(method, "")
    at = " and at the masks" if method in masks else ""
    assert said["checkpoints"] == f"every 10 minutes{at}, in {tmp_path / 'out'}; all are kept"
    assert said["result"].startswith(str(result.final))
    assert lines[7].startswith("step 0: choosing" if method == "spa" else "step 1 of 4: loss ")


@pytest.mark.parametrize(
    ("base", "method"), [*(("source", m) for m in METHODS), ("gpt2_source", "rosa")]
)
def test_each_method_learns(
    base: str, method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(base)
    settings = sizes(method) | {
        "max_steps": 20,
        "eval_file": str(source / "eval.jsonl"),
        "eval_steps": 10,
        "lr_scheduler_type": "constant",
    }
    if method == "spa":
        settings |= {"density": 0.3, "sparse_learning_rate": 3e-2}
    if method == "lora+":
        settings |= {"learning_rate": 1e-3}  # B trains at 16 times this rate
    result = train(*arguments(source, tmp_path / "out", **settings))
    assert len(result.losses) == result.steps == 20
    assert list(result.eval_losses) == [10, 20]
    first, last = result.losses[0], sum(result.losses[-5:]) / 5
    assert first > 3.5
    assert last < 0.65 * first
    assert result.eval_loss == result.eval_losses[20] < 0.65 * first
    phases = {"rosa": {"warmup", "mask"}, "spa": {"mask"}}.get(method, set())
    assert result.seconds.keys() == phases | {"train", "eval", "load"}
    assert result.peak_bytes.keys() == phases | {"train", "eval"}
    assert min(result.peak_bytes.values()) > 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["losses"] == result.losses
    assert Path(result.final).name == ("model" if method == "full" else "adapter")


@pytest.mark.parametrize(("method", "rate"), [("spa", 2e-3), ("rosa", 2e-4)])
def test_default_sparse_learning_rate(
    method: str, rate: float, source: Path, tmp_path: Path
) -> None:
    for given, expected in ((None, rate), (5e-3, 5e-3)):
        out = tmp_path / str(given)
        settings = sizes(method) | {"max_steps": 4, "lr_scheduler_type": "constant"}
        settings |= {"sparse_learning_rate": given, "warmup_steps": 0}
        train(*arguments(source, out, **settings))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["sparse_learning_rate"] == expected


@pytest.mark.parametrize("method", METHODS)
def test_saved_model_has_the_reported_loss(method: str, source: Path, tmp_path: Path) -> None:
    settings = sizes(method) | {"max_steps": 6, "eval_file": str(source / "eval.jsonl")}
    result = train(*arguments(source, tmp_path / "out", **settings))
    if method == "full":
        model = transformers.AutoModelForCausalLM.from_pretrained(result.final)
        assert transformers.AutoTokenizer.from_pretrained(result.final).eos_token_id == 0
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        load_adapter(model, result.final)
        assert result.trainable == sum(
            tensor.numel() for name, tensor in weights(result).items() if tensor.is_floating_point()
        )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    _, data, _, _ = arguments(source, tmp_path, eval_file=str(source / "eval.jsonl"))
    rows = read_dataset(data, tokenizer, training=False)
    with torch.no_grad():
        loss = target_loss(model, rows.collate(range(len(rows))), torch.device("cpu"))
    assert loss.item() / sum(rows.targets) == pytest.approx(result.eval_loss, rel=1e-5)


@pytest.mark.parametrize("method", ["rosa", "full"])
def test_accumulation_equals_a_large_batch(method: str, gpt2_source: Path, tmp_path: Path) -> None:
    # Rows have different lengths, and the last batch of the 41 rows is short.
    settings = sizes(method) | {"dropout": 0.0, "mask_score": "grad_mean", "max_steps": 7}
    settings |= {"learning_rate": 1e-3, "full_learning_rate": 1e-3}
    results = [
        train(
            *arguments(
                gpt2_source,
                tmp_path / str(size),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                **settings,
            )
        )
        for size in (8, 2)
    ]
    assert results[0].tokens == results[1].tokens
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)
    norms = [
        [
            row["grad_norm"]
            for row in metrics.read(tmp_path / size / "metrics.jsonl")
            if "loss" in row
        ]
        for size in "82"
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_packing_does_not_change_the_loss(source: Path, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 41, "dropout": 0.0, "max_steps": 3}
    settings |= {"schedule": "wl1", "mask_score": "grad_mean"}
    losses = [
        train(*arguments(source, tmp_path / str(packing), packing=packing, **settings)).losses
        for packing in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_packing_of_a_leaking_model_is_refused(source: Path, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "opt")
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = transformers.OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=32)
    transformers.OPTForCausalLM(config).save_pretrained(model)
    with pytest.raises(ValueError, match=r"--packing: .* got OPTForCausalLM: a change in one exam"):
        train(*arguments(model, tmp_path / "out", packing=True))
    assert not (tmp_path / "out").exists()


def test_memory_for_one_mask_pass_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "schedule": "wl1"}
    ample = train(*arguments(source, tmp_path / "ample", **settings))
    assert "masks:" not in capsys.readouterr().err  # there is memory for one pass
    monkeypatch.setattr(mask_phase, "default_memory", lambda *_: 4 * 48 * 32)
    little = train(*arguments(source, tmp_path / "little", **settings))
    said = re.search(
        r"masks: (\d+) forwards for 2 batches, .*; 2 forwards with --mask_memory (\d+)",
        capsys.readouterr().err,
    )
    assert said is not None
    assert int(said[1]) > 2
    for memory, passes in ((int(said[2]), 2), (int(said[2]) - 1, 4)):
        given = settings | {"mask_memory": str(memory)}
        exact = train(*arguments(source, tmp_path / str(memory), **given))
        err = capsys.readouterr().err
        assert ("masks:" in err) == (passes > 2)
        assert passes == 2 or f"masks: {passes} forwards for 2 batches" in err
        assert exact.losses == little.losses == ample.losses


def test_gradient_checkpointing_gives_the_same_losses(source: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "dropout": 0.2}
    plain = train(*arguments(source, tmp_path / "plain", **settings))
    settings |= {"gradient_checkpointing": True}
    assert train(*arguments(source, tmp_path / "less", **settings)).losses == plain.losses


def test_evaluation_and_saving_do_not_change_training(source: Path, tmp_path: Path) -> None:
    plain = train(*arguments(source, tmp_path / "plain", dropout=0.2))
    torch.manual_seed(7)  # the process's earlier random state does not matter either
    watched = train(
        *arguments(
            source,
            tmp_path / "watched",
            dropout=0.2,
            eval_file=str(source / "eval.jsonl"),
            eval_steps=1,
            save_steps=1,
            generate_examples=3,
            max_new_tokens=3,
        )
    )
    assert watched.losses == plain.losses
    assert watched.exact_match == 0.0
    mine, others = weights(plain), weights(watched)
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
    lines = (tmp_path / "watched" / "predictions.jsonl").read_text().splitlines()
    names = {"where", "prompt", "expected", "predicted", "match"}
    assert [set(json.loads(line)) for line in lines] == [names] * 3


def test_different_seeds_give_different_losses(source: Path, tmp_path: Path) -> None:
    results = [
        train(*arguments(source, tmp_path / str(seed), seed=seed, max_steps=2, schedule="wl1"))
        for seed in (1, 2)
    ]
    assert results[0].losses != results[1].losses


def test_autocast_keeps_trained_weights_in_float32(source: Path, tmp_path: Path) -> None:
    plain = train(*arguments(source, tmp_path / "plain"))
    mixed = train(*arguments(source, tmp_path / "mixed", mixed_precision="bf16"))
    assert mixed.losses != plain.losses
    assert mixed.losses == pytest.approx(plain.losses, rel=0.05)
    assert {t.dtype for t in weights(mixed).values() if t.is_floating_point()} == {torch.float32}


def test_bfloat16_base_trains_a_float32_adapter(source: Path, tmp_path: Path) -> None:
    plain = train(*arguments(source, tmp_path / "plain"))
    half = train(*arguments(source, tmp_path / "half", dtype="bfloat16", mixed_precision="bf16"))
    assert half.losses == pytest.approx(plain.losses, rel=0.05)
    assert {t.dtype for t in weights(half).values() if t.is_floating_point()} == {torch.float32}


def test_the_scaler_skips_steps_that_overflow(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, make_accelerator = 0, setup.make_accelerator

    def overflowing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = target_loss(*args)
        return loss if calls > 4 else infinite_gradient(loss)

    def scaled(args: Any) -> Any:
        accelerator = make_accelerator(args)
        # The trainer refuses fp16 on a CPU, but the scaler works there.
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        accelerator.autocast = contextlib.nullcontext
        return accelerator

    monkeypatch.setattr(step, "target_loss", overflowing)
    monkeypatch.setattr(mask_phase, "target_loss", overflowing)
    monkeypatch.setattr(setup, "make_accelerator", scaled)
    settings: dict[str, Any] = {"save_steps": 1, "save_total_limit": None}
    result = train(*arguments(source, tmp_path / "out", **settings))
    rows = [row for row in metrics.read(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "grad_norm" not in row] == [1, 2]
    assert len(result.losses) == 10
    assert result.losses[-1] < result.losses[0]
    # The scale was halved twice. It is saved and restored.
    saved = read_state(tmp_path / "out" / "checkpoint-4").scaler
    assert saved["scale"] == 2.0**14
    again = settings | {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-4")}
    assert train(*arguments(source, tmp_path / "again", **again)).losses == result.losses


def test_modules_to_save_train_and_are_saved(source: Path, tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens"], "max_steps": 4, "save_steps": 2}
    settings["save_total_limit"] = None
    result = train(*arguments(source, tmp_path / "out", **settings))
    name = "base_model.model.model.embed_tokens.weight"
    before = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(weights(result)[name], before)
    again = settings | {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    resumed = weights(train(*arguments(source, tmp_path / "again", **again)))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in weights(result).items())


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [("lora_only", {"lora_A", "lora_B"}), ("spa_only", {"rosa_S"})],
)
def test_single_branch_schedules_save_only_that_branch(
    schedule: str, parts: set[str], source: Path, tmp_path: Path
) -> None:
    result = train(*arguments(source, tmp_path / "out", schedule=schedule, max_steps=2))
    assert {name.split(".")[-2] for name in weights(result)} == parts


@pytest.mark.parametrize("score", ["grad_mean", "random", "magnitude", "grasp", "rpca"])
def test_other_mask_scores_can_train(score: str, source: Path, tmp_path: Path) -> None:
    changes = {"mask_score": score, "mask_scope": "global", "schedule": "default", "max_steps": 2}
    result = train(*arguments(source, tmp_path / "out", **changes))
    assert any("rosa_S" in name for name in weights(result))


def test_epochs_are_converted_to_steps(source: Path, tmp_path: Path) -> None:
    changes = {"max_steps": -1, "num_train_epochs": 1.5, "max_train_examples": 24}
    result = train(*arguments(source, tmp_path / "out", schedule="lora_only", **changes))
    assert result.steps == 5  # an epoch has 3 steps


def test_tensorboard_events_are_written(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    changes = {"report_to": "tensorboard", "schedule": "wl1", "max_steps": 2}
    train(*arguments(source, tmp_path / "out", **changes))
    assert len(list((tmp_path / "out" / "tensorboard").glob("events*"))) == 1


def test_training_works_in_a_thread(source: Path, tmp_path: Path) -> None:
    # Python allows signal handlers only in the main thread.
    results: list[Any] = []
    args = arguments(source, tmp_path / "out", schedule="wl1", max_steps=2)
    thread = threading.Thread(target=lambda: results.append(train(*args)))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 2


# -- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rossa"}, "full, lora, lora\\+, spa, rosa"),
        ({"schedule": "wl10"}, "--schedule: expected wl<N> with N below the 10 steps of the run"),
        ({"method": "spa", "rank": None}, "--schedule: expected spa_only for method spa, got wl3"),
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"rank": 0, "density": None, "method": "lora", "schedule": None}, "rank"),
        ({"density": None, "budget": "1"}, "budget"),
        ({"max_length": 65}, "--max_length: expected at most the 64 positions .*, got 65"),
        ({"max_length": 5}, r"train.jsonl:\d+: expected at most max_length=5 tokens"),
        ({"prompt_template": "{question}"}, r"train.jsonl:1: expected field 'question'"),
        ({"mixed_precision": "fp16"}, "--mixed_precision: expected no or bf16 on a CPU, got fp16"),
        ({"mask_score": "loudest"}, "loudest"),
        ({"resume_from_checkpoint": "none"}, "--resume_from_checkpoint: expected `last` or a fold"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    changes: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(*arguments(source, tmp_path / "out", **changes))


def test_empty_data_set_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        train(*arguments(source, tmp_path / "out", train_file=str(tmp_path / "empty.jsonl")))


def test_folder_with_a_run_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    train(*arguments(source, out, **settings))
    (out / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"--output_dir: .*metrics\.jsonl.*checkpoint-4"):
        train(*arguments(source, out, **settings))
    again = {"max_steps": 5, "overwrite_output_dir": True, "schedule": "wl1", "save_steps": 0}
    train(*arguments(source, out, **again))
    assert len(metrics.read(out / "metrics.jsonl")) == 6
    assert checkpoints(out) == []
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nonfinite_loss_or_gradient_stops_the_run(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        loss = target_loss(*args)
        calls += 1
        if calls < 10:  # call 10 is the second micro-batch of step 5
            return loss
        return loss * torch.nan if kind == "loss" else infinite_gradient(loss)

    monkeypatch.setattr(step, "target_loss", poisoned)
    out = tmp_path / "out"
    settings: dict[str, Any] = {"save_steps": 2, "schedule": "lora_only"}
    what = "loss of nan" if kind == "loss" else "gradient of norm (nan|inf)"
    message = (
        rf"a {what} at step 5 on \S*train\.jsonl:\d+.*; the last good checkpoint is {out}/checkp"
        r"oint-4$"
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(*arguments(source, out, **settings))
    records = str(caught.value).count("train.jsonl:")
    assert records == (4 if kind == "loss" else 8)  # one micro-batch, or the whole step
    # The weights did not change: a resumed run ends with the losses of a run without the error.
    monkeypatch.undo()
    resumed = train(*arguments(source, out, **settings, resume_from_checkpoint="last"))
    whole = train(*arguments(source, tmp_path / "whole", **settings))
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nonfinite_numbers_stop_the_mask_phase(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        loss = target_loss(*args)
        calls += 1
        if calls != 2:  # the second of two batches of four rows
            return loss
        return loss * torch.nan if kind == "loss" else infinite_gradient(loss)

    monkeypatch.setattr(mask_phase, "target_loss", poisoned)
    out = tmp_path / "out"
    what = "loss of nan" if kind == "loss" else "gradient that is not finite .*"
    message = (
        rf"a {what} in the mask phase at step 3 on \S*train\.jsonl:\d+.*; the last good checkpoint "
        rf"is {out}/checkpoint-3$"
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(*arguments(source, out))
    assert str(caught.value).count("train.jsonl:") == (4 if kind == "loss" else 8)


def test_nan_evaluation_loss_stops_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = target_loss(*args)
        return loss * torch.nan if calls == 4 else loss  # the second batch, after step 4

    monkeypatch.setattr(evaluate, "target_loss", poisoned)
    out = tmp_path / "out"
    evaluation = {"eval_file": str(source / "eval.jsonl"), "eval_steps": 2, "save_steps": 2}
    message = rf"evaluation loss of nan at step 4 on \S*eval.jsonl:\d+.*; .* is {out}/checkpoint-2$"
    with pytest.raises(FloatingPointError, match=message) as caught:
        train(*arguments(source, out, schedule="lora_only", **evaluation))
    assert str(caught.value).count("eval.jsonl:") == 3  # 11 examples in batches of 8
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    assert not (out / "result.json").exists()


def test_full_disk_keeps_the_last_good_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rosa_train.run import checkpoint

    out = tmp_path / "out"
    saved = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-6" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be saved.*checkpoint-4 is intact"):
        train(*arguments(source, out, save_steps=2))
    monkeypatch.undo()
    resumed = train(*arguments(source, out, save_steps=2, resume_from_checkpoint="last"))
    assert resumed.losses == train(*arguments(source, tmp_path / "whole")).losses
