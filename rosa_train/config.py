"""The options of a run: four dataclasses with Hugging Face's names, checked when they are made.

`transformers.HfArgumentParser` makes a command line of them, or reads them from JSON and YAML.
Field names are unique across the four dataclasses, so that one flat file can hold them all.

A field's range is in its type, as `Annotated[int, POSITIVE_INTEGER]`. The field's metadata cannot
hold the range: HfArgumentParser passes all of the metadata to argparse.
"""

# ruff: noqa: RUF009  (`option` makes a dataclass field, not a shared default)
from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_type_hints

from rosa_kernels.bounds import (
    FRACTION_BELOW_1,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    OPEN_FRACTION,
    POSITIVE,
    POSITIVE_INTEGER,
    Bound,
    is_integer,
    is_regex,
)
from rosa_train.files import absolute_if_folder

_TOKENS = Bound("at least 2 tokens", lambda value: is_integer(value) and value >= 2)
_SCHEDULE = Bound(
    "wl<N>, default, lora_only or spa_only",
    lambda value: bool(re.fullmatch(r"wl\d+|default|lora_only|spa_only", str(value))),
)
_MAX_STEPS = Bound(
    "a positive integer, or -1", lambda value: value == -1 or POSITIVE_INTEGER.holds(value)
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises `ValueError` as `--name: expected ..., got ...` unless the condition holds."""
    if not condition:
        raise ValueError(f"--{name}: expected {expected}, got {got}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """A pattern option as a dict. It is given as a mapping, or on the command line as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            expect(False, name, "a JSON object such as '{\"q_proj\": 4}'", f"{value!r} ({error})")
    expect(isinstance(value or {}, Mapping), name, "a JSON object", repr(value))
    return dict(value or {})


def _names(value: Any) -> list[str] | str | None:
    """A choice of modules: "all-linear" or a regex as a str, otherwise a list of names."""
    if value and len(value) == 1 and (value[0] == "all-linear" or is_regex(value[0])):
        return str(value[0])
    return list(value or []) or None


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default, and metadata that HfArgumentParser passes to argparse."""
    return field(default=default, metadata={"help": help, **metadata})


class _Checked:
    """Checks the range and the choices of each field. None is allowed if the type allows it."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value = declared.name, getattr(self, declared.name)
            choices = declared.metadata.get("choices", (value,))
            expect(value in choices, name, f"one of {', '.join(map(str, choices))}", repr(value))
            for bound in getattr(hints[name], "__metadata__", ()):
                if value is not None or type(None) not in get_args(hints[name].__origin__):
                    setattr(self, name, bound.check(f"--{name}", value))


@dataclass
class ModelArguments(_Checked):
    """The model to fine-tune, and the form in which it is held."""

    _argument_group_name = "model"  # HfArgumentParser reads it for --help

    model_name_or_path: Annotated[str, Bound("a folder or a name", bool)] = field(
        metadata={"help": "Folder of a Hugging Face causal LM, or its name on the hub."}
    )
    tokenizer_name: str | None = option(
        None, "Folder or name of the tokenizer (default: the model's)."
    )
    dtype: str = option(
        "float32",
        "Type of the frozen weights. Adapters train in float32 in any case. With "
        "--method full, the weights train in this type.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = option(None, "Attention of transformers: sdpa, eager, ...")
    gradient_checkpointing: bool = option(
        False, "Recompute each layer in the backward pass: less memory, more time."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The adapter and args.json record these names. They are read from other folders, too.
        self.model_name_or_path = absolute_if_folder(self.model_name_or_path)
        if self.tokenizer_name is not None:
            self.tokenizer_name = absolute_if_folder(self.tokenizer_name)


@dataclass
class DataArguments(_Checked):
    """The data files, and how a record becomes an example."""

    _argument_group_name = "data"

    train_file: str | None = option(
        None, "JSON lines (.jsonl, .json) or .csv to train on. It or --dataset_name is required."
    )
    eval_file: str | None = option(
        None, "JSON lines or .csv for the evaluation loss and generation."
    )
    dataset_name: str | None = option(
        None,
        "Instead of --train_file: NAME or NAME:CONFIG of `datasets`, "
        "and a [SPLIT] if it is not train, such as gsm8k:main[test].",
    )
    eval_dataset_name: str | None = option(
        None, "NAME or NAME:CONFIG, and [SPLIT], instead of --eval_file."
    )
    prompt_template: str = option(
        "{prompt}",
        "The prompt, with {fields} of a record. On the command line, \\n is a newline, \\t a tab "
        "and \\\\ a backslash.",
    )
    completion_template: str = option(
        "{completion}", "What is learned after the prompt, with {fields} of a record."
    )
    chat: bool = option(False, "Wrap prompt and completion in the tokenizer's chat template.")
    max_length: Annotated[int, _TOKENS] = option(512, "Longest example, in tokens.")
    on_too_long: str = option(
        "error",
        "What happens to an example longer than --max_length.",
        choices=["error", "truncate", "drop"],
    )
    split_special_tokens: bool = option(
        False,
        "Text of special tokens in the data, such as <|im_end|>, is tokenised like other text. "
        "Otherwise it becomes that token. Templates keep theirs.",
    )
    packing: bool = option(
        False,
        "Put several examples into a row of max_length tokens, instead of padding. A model that "
        "does not keep them apart is refused.",
    )
    max_train_examples: Annotated[int | None, POSITIVE_INTEGER] = option(
        None, "Train on this many examples, the first ones."
    )
    max_eval_examples: Annotated[int | None, POSITIVE_INTEGER] = option(
        None, "Evaluate on this many examples, the first ones."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = [bool(self.train_file), bool(self.dataset_name)]
        expect(sum(sources) == 1, "train_file", "it or --dataset_name", f"{sum(sources)} of them")
        both = bool(self.eval_file) and bool(self.eval_dataset_name)
        expect(not both, "eval_file", "it or --eval_dataset_name", "both")

    @property
    def eval_source(self) -> str | None:
        """The evaluation data's file or name, or None."""
        return self.eval_file or self.eval_dataset_name


@dataclass
class MethodArguments(_Checked):
    """The method, a name of `rosa_train.METHODS`, with its size and its masks."""

    _argument_group_name = "method and masks"

    method: str = option("rosa", "The method: full, lora, lora+, spa or rosa.")
    rank: Annotated[int | None, NON_NEGATIVE_INTEGER] = option(None, "Rank of the low-rank branch.")
    density: Annotated[float | None, OPEN_FRACTION] = option(
        None, "Density of the sparse branch, in (0, 1)."
    )
    budget: str | None = option(
        None,
        "Instead of density (and rank), the parameters to train: a share of the target "
        "weights (1%) or a number (1.5M).",
    )
    alpha: Annotated[float, POSITIVE] = option(
        16.0, "The low-rank branch is scaled by alpha / rank."
    )
    dropout: Annotated[float, FRACTION_BELOW_1] = option(
        0.05, "Dropout on the low-rank branch's input, in [0, 1)."
    )
    target_modules: Annotated[list[str], Bound("all-linear, names or a regex", bool)] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "all-linear (without the output head), names, or one regex."},
    )
    exclude_modules: list[str] | None = option(
        None, "Names, or one regex, of modules that get no adapter."
    )
    modules_to_save: list[str] | None = option(
        None, "Modules to train fully and to keep in the adapter."
    )
    rank_pattern: dict[str, int] | str | None = option(
        None, "Ranks of single modules, as JSON from name or regex to rank."
    )
    density_pattern: dict[str, float] | str | None = option(
        None, "Densities of single modules, as JSON."
    )
    schedule: Annotated[str | None, _SCHEDULE] = option(
        None,
        "wl<N> trains the low-rank branch for N steps, chooses the masks, and then "
        "trains both branches. Others: default (wl0), lora_only, spa_only. If it is not "
        "given, rosa takes wl64, and the other methods train the branch that they have.",
    )
    mask_score: str = option(
        "grad_mean_squared",
        "Score by which a mask is chosen: grad_mean, grad_mean_squared, random, "
        "magnitude, grasp or rpca.",
    )
    mask_steps: Annotated[int, POSITIVE_INTEGER] = option(
        1, "Optimizer steps' worth of batches on which masks are scored."
    )
    mask_scope: str = option(
        "layer",
        "Masks take the top scores of each weight (layer), or of all (global).",
        choices=["layer", "global"],
    )
    mask_memory: str | None = option(
        None,
        "Memory for sums of gradients in the mask phase, such as 512M or 2G (default: a quarter of "
        "the free memory). The run says what takes one pass.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            self.budget = str(self.budget)
        for option in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, option), str):  # a single name, in JSON or YAML
                setattr(self, option, [getattr(self, option)] if getattr(self, option) else None)
        for option, words, bound in (
            ("rank_pattern", "integers >= 0", NON_NEGATIVE_INTEGER),
            ("density_pattern", "numbers in [0, 1)", FRACTION_BELOW_1),
        ):
            pattern = _mapping(option, getattr(self, option))
            setattr(self, option, pattern)
            for name, value in pattern.items():
                expect(bound.holds(value), option, words, f"{name}: {value!r}")
        self.mask_bytes()

    @property
    def targets(self) -> list[str] | str:
        """`target_modules` as `find_targets` takes it: "all-linear", a regex, or a list."""
        return _names(self.target_modules) or "all-linear"

    @property
    def excluded(self) -> list[str] | str | None:
        """`exclude_modules` as `find_targets` takes it: a regex, a list, or None."""
        return _names(self.exclude_modules)

    def mask_bytes(self) -> int | None:
        """`mask_memory` in bytes. The units are binary: 1K is 1024."""
        if self.mask_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", str(self.mask_memory).strip())
        if match is None or float(match[1]) == 0:
            expect(False, "mask_memory", "bytes such as 512M or 2G", repr(self.mask_memory))
            return None
        return int(float(match[1]) * _UNITS[match[2]])


@dataclass
class TrainArguments(_Checked):
    """Batches and learning rates, and when a run evaluates, logs and saves."""

    _argument_group_name = "training, evaluation and checkpoints"

    output_dir: Annotated[str, Bound("a folder", bool)] = field(
        metadata={"help": "The folder into which a run writes everything."}
    )
    overwrite_output_dir: bool = option(False, "Replace the run that is in output_dir.")
    num_train_epochs: Annotated[float, POSITIVE] = option(
        1.0, "Number of passes over the examples."
    )
    max_steps: Annotated[int, _MAX_STEPS] = option(
        -1, "Number of optimizer steps. If positive, it overrides the epochs."
    )
    per_device_train_batch_size: Annotated[int, POSITIVE_INTEGER] = option(
        8, "Rows per process and micro-batch."
    )
    per_device_eval_batch_size: Annotated[int, POSITIVE_INTEGER] = option(
        8, "Rows per process and batch in evaluation."
    )
    gradient_accumulation_steps: Annotated[int, POSITIVE_INTEGER] = option(
        4, "Micro-batches per optimizer step."
    )
    learning_rate: Annotated[float, NON_NEGATIVE] = option(
        7e-4, "Peak learning rate of the low-rank branch."
    )
    sparse_learning_rate: Annotated[float | None, NON_NEGATIVE] = option(
        None, "Peak learning rate of the sparse branch (default: 2e-3 for spa, 2e-4 for rosa)."
    )
    full_learning_rate: Annotated[float, NON_NEGATIVE] = option(
        5e-5, "Peak learning rate of whole weights (full, modules_to_save)."
    )
    weight_decay: Annotated[float, NON_NEGATIVE] = option(0.0, "AdamW's decoupled weight decay.")
    adam_beta1: Annotated[float, FRACTION_BELOW_1] = option(0.9, "AdamW's beta1.")
    adam_beta2: Annotated[float, FRACTION_BELOW_1] = option(0.999, "AdamW's beta2.")
    adam_epsilon: Annotated[float, NON_NEGATIVE] = option(1e-8, "AdamW's epsilon.")
    lr_scheduler_type: str = option(
        "linear", "Decay after the warm-up.", choices=["linear", "cosine", "constant"]
    )
    warmup_steps: Annotated[int, NON_NEGATIVE_INTEGER] = option(20, "Steps of linear warm-up.")
    max_grad_norm: Annotated[float, NON_NEGATIVE] = option(
        1.0, "Gradients are clipped to this norm. With 0 they are not clipped."
    )
    mixed_precision: str = option("no", "Type of autocast.", choices=["no", "bf16", "fp16"])
    use_cpu: bool = option(False, "Do not use a GPU.")
    eval_steps: Annotated[int | None, POSITIVE_INTEGER] = option(
        None, "Steps between evaluations. There always is one at the end, too."
    )
    generate_examples: Annotated[int, NON_NEGATIVE_INTEGER] = option(
        0, "Evaluation examples to complete at the end, for exact match."
    )
    max_new_tokens: Annotated[int, POSITIVE_INTEGER] = option(128, "Longest completion, in tokens.")
    save_steps: Annotated[int | None, NON_NEGATIVE_INTEGER] = option(
        None,
        "Steps between checkpoints. If it is not given, 10 minutes are between them. The mask "
        "phase is saved before and after, too. With 0 nothing is saved before the end.",
    )
    save_total_limit: Annotated[int | None, POSITIVE_INTEGER] = option(
        2, "Number of checkpoints to keep, the newest ones."
    )
    logging_steps: Annotated[int, POSITIVE_INTEGER] = option(
        1, "Steps between TensorBoard points. metrics.jsonl has every step."
    )
    seed: Annotated[int, NON_NEGATIVE_INTEGER] = option(
        42, "Seed of initialisation, data order, masks and dropout."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder, or `last` for the newest one in output_dir. With `last` and no "
        "run there, the run starts from the beginning.",
    )
    report_to: str = option(
        "none", "Where to log beside metrics.jsonl.", choices=["none", "tensorboard"]
    )
    disable_tqdm: bool = option(False, "No progress bar. Outside a terminal there never is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume_from_checkpoint in ("True", "true"):  # what Hugging Face users write
            self.resume_from_checkpoint = "last"
        if self.resume_from_checkpoint in ("False", "false", ""):
            self.resume_from_checkpoint = None
        expect(
            not (self.resume_from_checkpoint and self.overwrite_output_dir),
            "overwrite_output_dir", "it or --resume_from_checkpoint", "both",
        )  # fmt: skip


ARGUMENTS = (ModelArguments, DataArguments, MethodArguments, TrainArguments)
Arguments = tuple[ModelArguments, DataArguments, MethodArguments, TrainArguments]

# Options that may differ when a run is resumed, because they change no weight. They say what is
# measured, where and how often things are written, and how large evaluation batches are.
_FREE = {
    "output_dir",
    "overwrite_output_dir",
    "eval_file",
    "eval_dataset_name",
    "max_eval_examples",
    "per_device_eval_batch_size",
    "use_cpu",
    "eval_steps",
    "generate_examples",
    "max_new_tokens",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "resume_from_checkpoint",
    "report_to",
    "disable_tqdm",
    "mask_memory",
    "train_file",  # a folder may move; the checkpoint has a hash of the data
    "dataset_name",
    "split_special_tokens",
    "model_name_or_path",
    "tokenizer_name",
}


def flat(*arguments: Any) -> dict[str, Any]:
    """All fields of the dataclasses as one dict. HfArgumentParser reads its JSON back."""
    return {name: value for one in arguments for name, value in dataclasses.asdict(one).items()}


def fingerprint(*arguments: Any) -> dict[str, Any]:
    """The fields that decide the weights. A run resumes a checkpoint only if they are equal."""
    return {name: value for name, value in flat(*arguments).items() if name not in _FREE}
