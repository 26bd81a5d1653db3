"""Loads the result of a run as a model, to generate with and to export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from rosa_train.adapters.load import load_adapter
from rosa_train.data.examples import Example, encode
from rosa_train.data.records import Record
from rosa_train.run.evaluate import generate_exact_match


@dataclass(frozen=True)
class Trained:
    """A trained model on the disk.

    Attributes:
        base: the base model, or the trained model itself if there is no adapter.
        adapter: the adapter's folder, or None.
        args: the arguments of the run, if its args.json is found.
    """

    base: str
    adapter: Path | None
    args: dict[str, Any] = field(default_factory=dict)


def locate(source: str | Path, base: str | None = None) -> Trained:
    """Finds the trained model in the folder of a run, a checkpoint, an adapter or a model.

    Args:
        source: the folder.
        base: the base model, instead of the one that the adapter names.

    Raises:
        FileNotFoundError: the folder is none of these, or the base model is missing.
        ValueError: the adapter does not name its base model, or `base` is given for a model.
    """
    source = Path(source).expanduser()
    for folder in (source, source / "adapter"):
        if (folder / "adapter_config.json").is_file():
            args = _args(source, source.parent)
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base = base or config.get("base_model_name_or_path") or args.get("model_name_or_path")
            if not base:
                raise ValueError(f"expected the base model of {folder} by --model, got none")
            check_model(base)
            return Trained(base, folder, args)
    for folder in (source, source / "model"):
        if (folder / "config.json").is_file():
            if base is not None:
                raise ValueError(f"expected an adapter beside --model, got the model in {folder}")
            return Trained(str(folder), None, _args(source, source.parent))
    got = "no such folder"
    if source.is_dir():
        got = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "an empty folder"
    raise FileNotFoundError(
        f"expected the folder of a run, a checkpoint, an adapter or a model, got {source}: {got}"
    )


def check_model(name: str) -> None:
    """Raises `FileNotFoundError` if `name` can only be a folder, and has no model.

    transformers would first look on the hub, and report an error of the network.
    """
    path = Path(name).expanduser()
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.is_dir()
    if is_path and not (path / "config.json").is_file():
        got = "no config.json in it" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"expected the folder of a Hugging Face model, got {name}: {got}")


def load(trained: Trained, dtype: str | None = None) -> tuple[Any, Any]:
    """The model with its adapter active, and the tokenizer. The model is on the GPU, if any."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = trained.args.get("tokenizer_name") or trained.base
    tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = dtype or trained.args.get("dtype") or "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(trained.base, dtype=dtype)
    model.to(device())
    if trained.adapter is not None:
        load_adapter(model, trained.adapter)
    return model.eval(), tokenizer


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prompts_as_records(prompts: list[str], template: str) -> list[Record]:
    """Prompts as records of the template's field. The template must have exactly one field."""
    fields = {name for _, name, _, _ in Formatter().parse(template) if name}
    if len(fields) != 1:
        raise ValueError(
            f"expected a prompt template with one field, got {template!r}; give records with "
            "--file, or another --prompt_template"
        )
    name = fields.pop()
    return [Record({name: prompt}, f"prompt {i}") for i, prompt in enumerate(prompts, start=1)]


def complete(
    model: Any,
    tokenizer: Any,
    records: list[Record],
    *,
    prompt_template: str,
    completion_template: str,
    chat: bool = False,
    max_length: int = 512,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> tuple[float, list[dict[str, Any]]]:
    """The share of greedy completions that equal their reference, and all completions."""
    examples: list[Example] = encode(
        records, tokenizer, prompt_template, completion_template, max_length, chat=chat
    )
    return generate_exact_match(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        device=device(),
    )


def _args(*folders: Path) -> dict[str, Any]:
    """The contents of the first args.json in the folders, or an empty dict."""
    for folder in folders:
        path = folder / "args.json"
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            return values if isinstance(values, dict) else {}
    return {}
