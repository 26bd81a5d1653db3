"""Loads the result of a run as a model, to generate with and to export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from rosa_train.adapters.load import load_adapter
from rosa_train.config import ModelArguments
from rosa_train.data.examples import Example, encode
from rosa_train.data.records import Record
from rosa_train.run.evaluate import generate_exact_match

# How long the hub may take to answer whether it has a model.
_HUB_SECONDS = 5.0


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
            named = config.get("base_model_name_or_path") or args.get("model_name_or_path")
            found: str | None = base or named
            if not found:
                raise ValueError(f"expected the base model of {folder} by --model, got none")
            try:
                check_model(found)
            except FileNotFoundError as error:
                if base:
                    raise
                raise FileNotFoundError(
                    f"{error}. {folder} names this base model; --model gives another place"
                ) from None
            return Trained(found, folder, args)
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


def check_model(name: str, *, tokenizer: bool = False) -> None:
    """Raises `FileNotFoundError` unless `name` is a folder with a model, or a model of the hub.

    The folder and the hub's cache are looked at first, then the hub is asked once. transformers
    would ask for 64 s if the hub cannot be reached. A `tokenizer` needs only a folder.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or (tokenizer and path.is_dir()):
        return
    kind = "tokenizer" if tokenizer else "model"
    expected = f"expected the folder of a Hugging Face {kind}"
    if path.is_dir():
        raise FileNotFoundError(f"{expected}, got {name}: no config.json in it")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{expected}, got {name}: no such folder")
    from huggingface_hub import HfApi, try_to_load_from_cache

    file = "tokenizer_config.json" if tokenizer else "config.json"
    try:
        if not isinstance(try_to_load_from_cache(name, file), str):
            HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # the hub's errors and those of its HTTP client share no base
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{expected} or its name on the hub, got {name}: no such folder, and the hub says: "
            f"{said[0]}"
        ) from error


def check_models(args: ModelArguments) -> None:
    """Checks that a run's model and tokenizer can be found, and that the model can be trained.

    Raises:
        FileNotFoundError: the model or the tokenizer is nowhere.
        ValueError: the model is quantised.
    """
    from transformers import AutoConfig

    check_model(args.model_name_or_path)
    quantised = getattr(
        AutoConfig.from_pretrained(args.model_name_or_path), "quantization_config", None
    )
    if quantised is not None:
        how = dict(quantised).get("quant_method", "unknown")
        raise ValueError(
            f"expected a model with float weights, got {args.model_name_or_path} quantised by "
            f"{how}: quantised base models cannot be trained; dequantise it first"
        )
    if args.tokenizer_name is not None:
        check_model(args.tokenizer_name, tokenizer=True)


def load(trained: Trained, dtype: str | None = None) -> tuple[Any, Any]:
    """The model with its adapter active, and the tokenizer. The model is on the GPU, if any."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = trained.args.get("tokenizer_name") or trained.base
    check_model(name, tokenizer=True)
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
    split_special_tokens: bool = False,
    max_length: int = 512,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> tuple[float, list[dict[str, Any]]]:
    """The share of greedy completions that equal their reference, and all completions."""
    examples: list[Example] = encode(
        records,
        tokenizer,
        prompt_template,
        completion_template,
        max_length,
        chat=chat,
        split_special_tokens=split_special_tokens,
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
