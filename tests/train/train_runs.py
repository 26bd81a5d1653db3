"""A tiny model, data and arguments for the trainer, and training runs in separate processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import string
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from rosa_train.config import ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
ALPHABET = string.ascii_lowercase + string.digits + " =:."


def write_model(folder: Path, kind: str = "llama") -> None:
    """Saves a model of two layers, and a tokenizer with one token per character."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<eos>", "<unk>", *ALPHABET]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    # The output head is random and frozen. With weights of this size the model can still learn.
    common = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(words),
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **common,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_data(path: Path, count: int, seed: int = 0) -> None:
    """Writes `count` records with a prompt such as "abc=" and the completion "cba"."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            word = "".join(rng.choice("abcdef") for _ in range(rng.randint(2, 9)))
            file.write(json.dumps({"prompt": f"{word}=", "completion": word[::-1]}) + "\n")


def write_all(folder: Path, kind: str = "llama") -> Path:
    """Writes the model and data that `arguments` names into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, kind)
    write_data(folder / "train.jsonl", 41)
    write_data(folder / "eval.jsonl", 11, seed=1)
    return folder


def arguments(source: Path, out: Path, **changes: Any) -> list[Any]:
    """Arguments of a RoSA run of 10 steps with masks after step 3; `changes` replace fields."""
    values = {
        "model_name_or_path": str(source),
        "train_file": str(source / "train.jsonl"),
        "max_length": 24,
        "rank": 2,
        "density": 0.05,
        "schedule": "wl3",
        "target_modules": ["all-linear"],
        "output_dir": str(out),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "sparse_learning_rate": 1e-2,
        "full_learning_rate": 1e-2,
        "use_cpu": True,
    } | changes
    names = [{field.name for field in dataclasses.fields(kind)} for kind in ARGUMENTS]
    assert set(values) <= set().union(*names), set(values) - set().union(*names)
    return [
        kind(**{name: value for name, value in values.items() if name in known})
        for kind, known in zip(ARGUMENTS, names, strict=True)
    ]


def command_line(values: dict[str, Any]) -> list[str]:
    """`--name value` for each of `values` that is not None."""
    given = {name: value for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def sizes(method: str) -> dict[str, Any]:
    """Values of the rank, density and schedule arguments that fit `method`."""
    low_rank, sparse = method in ("lora", "lora+", "rosa"), method in ("spa", "rosa")
    return {
        "method": method,
        "rank": 2 if low_rank else None,
        "density": 0.05 if sparse else None,
        "schedule": "wl3" if method == "rosa" else None,
    }


class Runs:
    """Training runs in separate processes, forked from a server that has imported everything.

    Importing transformers takes 4 s, and a tiny run takes 1 s. Without the server, the tests that
    kill runs would take minutes.
    """

    def __init__(self) -> None:
        environment = os.environ | {
            # One thread: the server may not have threads when it forks, and sums have the same
            # bits on every machine.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def start(self, log: Path, source: Path, out: Path, *, env: Any = None, **changes: Any) -> int:
        """Starts a run that appends its output to `log`; returns its process id."""
        return int(
            self._ask(
                log=str(log), source=str(source), out=str(out), env=env or {}, changes=changes
            )
        )

    def wait(self, pid: int) -> int:
        """Waits for a run. Returns its exit status, or minus the signal that ended it."""
        return int(self._ask(wait=pid))

    def __call__(self, log: Path, source: Path, out: Path, **changes: Any) -> int:
        """Starts a run and waits for it."""
        return self.wait(self.start(log, source, out, **changes))

    def close(self) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.stdout.close()  # type: ignore[union-attr]
        self._server.wait(timeout=60)

    def _ask(self, **request: Any) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()


def serve() -> None:
    """The server's loop: reads one request of `Runs` per line from stdin, and answers it."""
    import accelerate  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from rosa_train.run.signals import Interrupted
    from rosa_train.run.train import train

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(request["env"])
        code = 1
        changes = request["changes"]
        digests, raised = changes.pop("_digests", None), changes.pop("_signal", None)
        try:
            if digests is not None:
                watch_weights(Path(digests))
            if raised is not None:
                signal_at(*raised)
            train(*arguments(Path(request["source"]), Path(request["out"]), **changes))
            code = 0
        except Interrupted as error:
            print(error, file=sys.stderr)
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def signal_at(call: int, number: int) -> None:
    """Sends this process a signal when it computes the loss of its `call`-th batch."""
    from rosa_train.run import mask_phase, step
    from rosa_train.run.evaluate import target_loss

    calls = iter(range(call))

    def signalling(*args: Any) -> Any:
        if next(calls, None) == call - 1:
            os.kill(os.getpid(), number)
        return target_loss(*args)

    step.target_loss = mask_phase.target_loss = signalling  # in this process only


def watch_weights(folder: Path) -> None:
    """After each step with masks, appends a hash of the weights to weights-<rank>.txt."""
    import hashlib

    from rosa_kernels import nn

    make_resident = nn.make_resident

    def watched(model: Any, optimizer: Any) -> Any:
        handle = make_resident(model, optimizer)

        def write(*_: object) -> None:
            state = hashlib.sha256()
            for name, tensor in model.state_dict().items():
                if tensor is not None:
                    state.update(name.encode() + tensor.numpy().tobytes())
            path = folder / f"weights-{os.environ['RANK']}.txt"
            with path.open("a") as file:
                file.write(state.hexdigest() + "\n")

        optimizer.register_step_post_hook(write)
        return handle

    nn.make_resident = watched  # in this process only


if __name__ == "__main__":
    serve()
