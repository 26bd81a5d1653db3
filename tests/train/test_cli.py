"""The command line: parsing, each command end to end, and the messages for bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rosa_train import __main__ as cli
from rosa_train.cli.parse import parse_run
from rosa_train.config import ARGUMENTS, flat

from .train_runs import ROOT, arguments, command_line, write_all

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model, data, a file of options, and a finished run of these options."""
    folder = write_all(tmp_path_factory.mktemp("cli"))
    options = flat(*arguments(folder, folder / "run", max_steps=5, save_steps=5))
    options |= {
        "eval_file": str(folder / "eval.jsonl"),
        "prompt_template": "{prompt}",
        "generate_examples": 5,
        "max_new_tokens": 6,
    }
    (folder / "run.json").write_text(json.dumps(options))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fixture one_thread of tests/conftest.py comes after this one
    assert cli.main(["train", str(folder / "run.json")]) == 0
    torch.set_num_threads(threads)
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def options(world: Path, **changes: object) -> list[str]:
    """The command line of a short run."""
    values = {
        "model_name_or_path": world,
        "train_file": world / "train.jsonl",
        "output_dir": world / "new",
        "max_length": 24,
        "rank": 2,
        "density": 0.05,
        "schedule": "wl1",
        "max_steps": 2,
        "use_cpu": True,
    } | changes
    return command_line(values)


# -- help


def test_help_needs_neither_torch_nor_transformers() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import sys
from rosa_train.__main__ import main
assert main(["--help"]) == 0
for command in ("plot", "generate", "export", "methods", "fetch-smollm2"):
    try:
        main([command, "--help"])
    except SystemExit as done:
        assert done.code == 0
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules)
""",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {command} " in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"python -m rosa_train {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_has_groups_and_each_option_once(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"^  (?:-h, )?--([\w-]+)", text, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    names = {field.name for kind in ARGUMENTS for field in dataclasses.fields(kind)}
    hidden = {"method", "density", "rank_pattern", "density_pattern", "resume_from_checkpoint"}
    expected = names | {"help"} if command == "train" else (names - hidden) | {"help", "methods"}
    assert set(shown) == expected
    groups = re.findall(r"^(\w[\w, ]*):$", text, flags=re.MULTILINE)
    assert groups == [
        "options", "model", "data", "method and masks", "training, evaluation and checkpoints",
        "examples",
    ]  # fmt: skip
    assert "default: None" not in text
    assert "default: False" not in text
    flowing = " ".join(text.split())
    assert "hub. (required)" in flowing
    assert flowing.count("(required)") == 2
    assert "decoupled weight decay. (default: 0.0)" in flowing
    assert f"  python -m rosa_train {command} --me" in text.replace("train --model", "train --me")


def test_methods_command_lists_all_methods(capsys) -> None:
    code, out, _ = run(capsys, "methods")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()[2:]]
    assert names == ["full", "lora", "lora+", "spa", "rosa"]


# -- parsing


def test_options_are_parsed_into_dataclasses(world: Path) -> None:
    patterns = '{"q_proj": 4}'
    argv = options(world, rank_pattern=patterns, learning_rate="7e-4")
    argv += ["--target_modules", "q_proj", "v_proj", "--packing"]
    (model, data, method, train), _ = parse_run("train", "", argv)
    assert (model.model_name_or_path, data.packing) == (str(world), True)
    assert method.target_modules == ["q_proj", "v_proj"]
    assert method.rank_pattern == {"q_proj": 4}
    assert (train.learning_rate, train.max_steps) == (7e-4, 2)


def test_options_are_read_from_a_json_file(world: Path) -> None:
    found, _ = parse_run("train", "", [str(world / "run.json")])
    assert flat(*found) == json.loads((world / "run" / "args.json").read_text())


def test_command_line_options_override_a_yaml_file(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    # YAML 1.1 reads `7e-4`, a number without a dot, as a string.
    file.write_text(
        f"model_name_or_path: {world}\ntrain_file: x.jsonl\noutput_dir: out\n"
        "learning_rate: 7e-4\ntarget_modules: [q_proj]\npacking: true\nbudget: 1%\n"
    )
    (_, data, method, train), _ = parse_run(
        "train", "", [str(file), "--output_dir", "other", "--rank", "3"]
    )
    assert (train.learning_rate, train.output_dir) == (7e-4, "other")
    assert (method.target_modules, method.budget, method.rank) == (["q_proj"], "1%", 3)
    assert data.packing is True


@pytest.mark.parametrize("equals", [False, True])
def test_templates_are_unescaped_on_the_command_line(
    world: Path, tmp_path: Path, equals: bool
) -> None:
    file = tmp_path / "run.json"
    values = json.loads((world / "run.json").read_text())
    kept = r"\nabla \theta \\ {prompt}"
    file.write_text(json.dumps(values | {"prompt_template": kept}))
    given = ["--completion_template", r"\\nabla\t{completion}\n\alpha"]
    (_, data, _, _), _ = parse_run(
        "train", "", [str(file), *(["=".join(given)] if equals else given)]
    )
    assert data.prompt_template == kept
    assert data.completion_template == "\\nabla\t{completion}\n\\alpha"


# -- commands on a finished run


def test_train_prints_a_summary(world: Path, capsys) -> None:
    out = world / "said"
    code, said, _ = run(
        capsys, "train", world / "run.json", "--output_dir", out, "--generate_examples", "0"
    )
    assert code == 0
    assert said.startswith("rosa: ")
    assert "5 steps, evaluation loss" in said
    command = "python -m rosa_train"
    assert said.splitlines()[1:] == [
        f"Wrote {out / 'adapter'}",
        f"Try it        {command} generate {out} PROMPT",
        f"Draw it       {command} plot {out}",
        f"Merge it      {command} export {out} {out}-merged",
    ]


@pytest.mark.parametrize("source", ["run", "run/adapter", "run/checkpoint-5"])
def test_generate_repeats_the_predictions_of_the_run(
    world: Path, tmp_path: Path, capsys, source: str
) -> None:
    output = tmp_path / "predictions.jsonl"
    code, out, _ = run(
        capsys, "generate", world / source, "--file", world / "eval.jsonl", "--limit", 5,
        "--output", output, "--max_new_tokens", 6,
    )  # fmt: skip
    assert code == 0
    assert out.startswith("exact match on 5 examples: ")
    assert output.read_text() == (world / "run" / "predictions.jsonl").read_text()


def test_generate_completes_prompts(world: Path, capsys) -> None:
    predictions = (world / "run" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(predictions[0])
    code, out, _ = run(capsys, "generate", world / "run", first["prompt"], "abc=")
    assert code == 0
    assert out.splitlines()[0] == first["predicted"]
    assert len(out.splitlines()) == 2


def test_generate_accepts_a_model_without_adapter(world: Path, capsys) -> None:
    code, out, _ = run(capsys, "generate", world, "abc=", "--max_new_tokens", "3")
    assert code == 0
    assert out.endswith("\n")


def test_export_writes_a_standalone_model(world: Path, tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rosa_train.run.load import load, locate

    code, out, _ = run(capsys, "export", world / "run", tmp_path / "merged")
    assert (code, out) == (0, f"Wrote {tmp_path / 'merged'}\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model, _ = load(locate(world / "run"))
    ids = tokenizer("abc=", return_tensors="pt").input_ids
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(world)(ids).logits
        ours, theirs = model(ids).logits, merged(ids).logits
    torch.testing.assert_close(theirs, ours)
    assert not torch.allclose(theirs, base, atol=1e-4)


def test_plot_draws_a_run(world: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = run(capsys, "plot", world / "run", "--out", tmp_path / "a.png")
    assert (code, out) == (0, f"Wrote {tmp_path / 'a.png'}\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_fetch_smollm2_passes_its_arguments(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "rosa_train.demo.smollm2.fetch_smollm2",
        lambda directory, *, wheel: f"{directory} of {wheel}",
    )
    assert run(capsys, "fetch-smollm2", "d", "--wheel", "w")[:2] == (0, "Wrote d of w\n")


# -- bad input


def refused(capsys, argv: list[str], expected: str, code: int = 2) -> str:
    """Runs a command that must print one message on stderr, nothing on stdout and no traceback."""
    found, out, err = run(capsys, *argv)
    ours = err[err.index("rosa_train") :]  # transformers may print a progress bar first
    assert (found, out) == (code, "")
    assert "Traceback" not in err
    assert expected in ours
    return ours


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": "abc"}, "argument --rank"),
        ({"rank": -1}, "--rank: expected an integer >= 0, got -1"),
        ({"density": 3}, "--density: expected a number in (0, 1), got 3.0"),
        ({"rank": 0, "density": None}, "got rank 0"),
        ({"rnk": 3}, "expected a known option, got --rnk; is it --rank?"),
        ({"dtype": "float8"}, "argument --dtype"),
        ({"method": "rosa2"}, "rosa2"),
        ({"method": "lora", "schedule": None}, "density: expected none for lora, got 0.05"),
        ({"train_file": None}, "--train_file: expected it or --dataset_name"),
        ({"train_file": "no.jsonl"}, "no.jsonl"),
        ({"model_name_or_path": None}, "the following arguments are required"),
        ({"model_name_or_path": "/no/such/model"}, "got /no/such/model: no such folder"),
        ({"model_name_or_path": "tests"}, "tests: no config.json in it"),
        ({"target_modules": "nothing"}, "candidates: q_proj"),
        ({"rank": None, "density": None, "budget": "1"}, "budget: expected at least"),
        ({"rank": None, "density": None, "budget": "many"}, "budget: expected a budget like"),
        ({"schedule": "wl7"}, "--schedule: expected wl<N> with N below the 2 steps"),
        ({"max_length": 4}, "expected at most max_length=4 tokens"),
        ({"max_length": 4096}, "--max_length: expected at most the 64 positions"),
        ({"prompt_template": "{question}"}, "question"),
        ({"rank_pattern": "{"}, "--rank_pattern: expected a JSON object"),
        ({"resume_from_checkpoint": "none/such"}, "--resume_from_checkpoint: expected"),
    ],
)
def test_train_refuses_bad_options(world: Path, capsys, changes: dict, expected: str) -> None:
    message = refused(capsys, ["train", *options(world, **changes)], expected)
    assert message.startswith("rosa_train train: error: ")
    assert message.count("\n") == 1
    assert not (world / "new").exists()


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_file_is_not_a_folder(command, place, world, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    argv = [command, *options(world, output_dir=tmp_path / place)]
    if command == "compare":
        argv = [*argv[: argv.index("--density")], *argv[argv.index("--density") + 2 :]]
        argv += ["--methods", "lora"]
    message = refused(capsys, argv, "file")
    assert "expected a " in message
    assert "Errno" not in message
    assert (tmp_path / "file").read_text() == "mine"


def test_train_names_the_line_of_malformed_records(world: Path, tmp_path, capsys) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    refused(capsys, ["train", *options(world, train_file=file)], f"{file}:2")
    (tmp_path / "empty.jsonl").write_text("")
    refused(capsys, ["train", *options(world, train_file=tmp_path / "empty.jsonl")], "empty.jsonl")


def test_train_refuses_a_folder_with_a_run(world: Path, capsys) -> None:
    argv = ["train", *options(world, output_dir=world / "run")]
    refused(capsys, argv, "--output_dir: expected a folder without a run")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.json", None, "expected a file of options, got no file"),
        ("run.toml", "", "expected options, or a file of .json, .yaml, .yml"),
        ("run.json", "{", "expected JSON, got: "),
        ("run.yaml", "a: [", "expected YAML, got: "),
        ("run.json", "[1]", "expected an object of options, got list"),
        ("run.json", '{"learning_rte": 1}', "got learning_rte; is it learning_rate?"),
        ("run.json", '{"max_steps": 1.5}', "required"),
    ],
)
def test_train_refuses_bad_option_files(tmp_path, capsys, name, text, expected) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(capsys, ["train", str(tmp_path / name)], expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["generate", "{}"], "expected prompts or --file, got neither"),
        (["generate", "{}", "hi", "--file", "x.jsonl"], "expected prompts or --file, got both"),
        (["generate", "{}", "hi", "--output", "x"], "expected --file beside --output"),
        (["generate", "{}", "hi", "--batch_size", "0"], "--batch_size: expected a positive"),
        (["generate", "{}", "hi", "--prompt_template", "{a}{b}"], "a prompt template with one"),
        (["generate", "{}", "--file", "no.jsonl"], "no.jsonl"),
        (["generate", "/no/such", "hi"], "got /no/such: no such folder"),
        (["generate", "{}", "hi", "--model", "/no/such"], "got /no/such: no such folder"),
        (["export", "{}/..", "out"], "expected an adapter to merge"),
        (["export", "{}", "tests"], "export: expected a new or empty folder, got tests with"),
        (["generate", "{}", "--file", "x", "--output", "x"], "another file than --file"),
        (["export", "{}"], "the following arguments are required: DIR"),
        (["plot", "tests"], "plot: expected the folder of a run"),
        (["fetch-smollm2", "{}/new", "--wheel", "no.whl"], "got no file at no.whl"),
        (["fetch-smollm2", "{}"], "expected a new or empty folder"),
        (["demo", "--steps", "1"], "--steps: expected at least 5, got 1"),
        (["methods", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_other_commands_refuse_bad_arguments(world: Path, capsys, argv, expected) -> None:
    argv = [arg.format(world / "run") if arg.startswith("{}") else arg for arg in argv]
    message = refused(capsys, argv, expected)
    assert message.startswith(f"rosa_train {argv[0]}: error: ")


def test_a_model_that_is_nowhere_is_refused(world: Path, tmp_path, capsys, monkeypatch) -> None:
    """The hub is asked once. Here it cannot be reached."""
    asked: list[str] = []

    def unreachable(self, name: str, *, timeout: float) -> None:
        asked.append(name)
        assert timeout <= 5
        raise ConnectionError("Name or service not known\n(and more)")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.chdir(tmp_path)
    expected = "got no/such: no such folder, and the hub says: Name or service not known\n"
    for changes in ({"model_name_or_path": "no/such"}, {"tokenizer_name": "no/such"}):
        refused(capsys, ["train", *options(world, **changes)], expected)
        refused(capsys, ["compare", *options(world, **changes)], expected)
    assert asked == ["no/such"] * 4
    shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "no/such"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    message = refused(capsys, ["generate", "adapter", "hi"], "no such folder")
    assert message.endswith(" names this base model; --model gives another place\n")
    assert run(capsys, "generate", "adapter", "abc=", "--model", world)[0] == 0


def test_a_quantised_model_is_refused(world: Path, tmp_path, capsys) -> None:
    shutil.copytree(world, tmp_path / "base", ignore=shutil.ignore_patterns("run"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    argv = ["train", *options(world, model_name_or_path=tmp_path / "base")]
    refused(capsys, argv, "quantised by bitsandbytes: quantised base models cannot be trained")


def test_relative_models_are_found_from_elsewhere(world: Path, tmp_path, capsys, monkeypatch):
    shutil.copytree(world, tmp_path / "base", ignore=shutil.ignore_patterns("run"))
    shutil.copytree(world, tmp_path / "words", ignore=shutil.ignore_patterns("run", "*.safetens*"))
    monkeypatch.chdir(tmp_path)
    argv = options(world, model_name_or_path="base", tokenizer_name="words", output_dir="out")
    assert run(capsys, "train", *argv, "--save_steps", 2)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for source in ("../out", "../out/checkpoint-2", "../out/adapter"):
        assert run(capsys, "generate", source, "abc=")[0] == 0


def test_adapter_of_another_model_is_refused(world: Path, tmp_path, capsys) -> None:
    other = write_all(tmp_path / "gpt2", "gpt2")
    refused(capsys, ["generate", world / "run", "hi", "--model", other], "q_proj")


def test_a_truncated_adapter_is_refused(world: Path, tmp_path, capsys) -> None:
    shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(capsys, ["generate", tmp_path / "adapter", "hi"], "adapter_model.safetensors")


@pytest.mark.parametrize("argv", [[], ["trian"]])
def test_an_unknown_command_is_refused(capsys, argv: list[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.endswith(
        f"rosa_train: error: expected a command, got {argv[0] if argv else 'none'}\n"
    )


# -- failures


@pytest.mark.parametrize(
    ("error", "code", "tail"),
    [
        (FloatingPointError("train: got a loss of nan"), 1, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 1, ""),
        (ImportError("no tensorboard"), 1, ""),
        (MemoryError(), 1, ""),
        (RuntimeError("out of memory"), 1, "\n(ROSA_TRACEBACK=1 shows where)"),
        (ValueError("bad"), 2, ""),
    ],
)
def test_a_failure_prints_one_message(world, monkeypatch, capsys, error, code, tail) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rosa_train.run.train.train", fail)
    found, _, err = run(capsys, "train", *options(world))
    assert (found, err) == (
        code,
        f"rosa_train train: error: {str(error) or type(error).__name__}{tail}\n",
    )
    monkeypatch.setenv("ROSA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["train", *options(world)])


def test_unexpected_errors_keep_their_traceback(world, monkeypatch) -> None:
    monkeypatch.setattr("rosa_train.run.train.train", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["train", *options(world)])


def test_interrupts_set_the_exit_status(world, monkeypatch, capsys) -> None:
    from rosa_train.run.signals import Interrupted

    def stop(*_: object) -> None:
        raise raised

    monkeypatch.setattr("rosa_train.run.train.train", stop)
    raised: KeyboardInterrupt = Interrupted("SIGTERM after step 3: saved", 143)
    assert run(capsys, "train", *options(world)) == (
        143, "", "rosa_train train: SIGTERM after step 3: saved\n",
    )  # fmt: skip
    raised = KeyboardInterrupt()
    assert run(capsys, "train", *options(world)) == (130, "", "rosa_train train: interrupted\n")


def test_python_m_exits_with_the_command_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rosa_train", "train", "no.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "rosa_train train: error: expected a file of options, got no file no.json\n"
    )


def test_prompts_may_follow_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    assert cli.main(["generate", absent, "--max_new_tokens", "5", "a prompt"]) == 2
    error = capsys.readouterr().err
    assert "absent" in error
    assert "unrecognized" not in error


@pytest.mark.parametrize("argv", [["--help"], ["methods"], ["plot", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_prints_nothing(argv: list[str], unbuffered: str) -> None:
    """As in `rosa_train --help | head`, where head has gone. Python writes at once or at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "rosa_train", *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    # argparse ignores a pipe that is closed, so its help ends with status 0 if unbuffered.
    assert done.returncode in ((0, 141) if argv[0] == "plot" else (141,))
    assert done.stderr == ""


def test_a_broken_pipe_prints_nothing() -> None:
    """As in `rosa_train methods | head`, where head closes the pipe."""
    code = (
        "import sys; from rosa_train import __main__ as cli\n"
        "def gone(argv): raise BrokenPipeError\n"
        "cli.COMMANDS['methods'] = cli.COMMANDS['methods']._replace(run=gone)\n"
        "sys.exit(cli.main(['methods']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")
