"""What a run is told: four dataclasses under Hugging Face's names, checked when they are made.

`transformers.HfArgumentParser` turns them into a command line or reads them from JSON and YAML;
this module does not need it. Field names are unique across the four: one flat file holds them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a pattern needs to be one: a lone name without these is a list of one, not a regex.
_REGEX = re.compile(r"[*+?()\[\]|^$\\{]")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises `ValueError` as `--name: expected ..., got ...` unless the condition holds."""
    if not condition:
        raise ValueError(f"--{name}: expected {expected}, got {got}")


def unescape(template: str) -> str:
    """A template with real newlines and tabs: between a shell's quotes, \\n is two characters."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high


def _is_count(value: object, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    expect(value in choices, name, f"one of {', '.join(map(str, choices))}", repr(value))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    """A pattern option: a mapping, or on the command line its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            expect(False, name, "a JSON object such as '{\"q_proj\": 4}'", f"{value!r} ({error})")
    expect(isinstance(value or {}, Mapping), name, "a JSON object", repr(value))
    return dict(value or {})


def _names(value: Any) -> list[str] | str | None:
    """A choice of modules: "all-linear" or a regex as str, otherwise a list of names."""
    if value is None or isinstance(value, str):
        value = [value] if value else []
    if len(value) == 1 and (value[0] == "all-linear" or _REGEX.search(value[0])):
        return str(value[0])
    return list(value) or None


@dataclass
class ModelArguments:
    """The model to fine-tune, and how it is held."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a Hugging Face causal LM, or its name on the hub."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or name of the tokenizer (default: the model's)."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the frozen weights. What trains is float32 whatever this says; with "
            "--method full it is this type that trains.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: sdpa, eager, ..."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute each layer in the backward pass: less memory, more time."},
    )

    def __post_init__(self) -> None:
        expect(bool(self.model_name_or_path), "model_name_or_path", "a folder or a name", "none")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass
class DataArguments:
    """Where examples come from and how a record becomes one."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines (.jsonl, .json) or .csv to train on."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "The same for the evaluation loss and for generation."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --train_file: NAME or NAME:CONFIG of `datasets`, "
            "and a [SPLIT] if it is not train, such as gsm8k:main[test]."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "The same instead of --eval_file."}
    )
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "The prompt, with {fields} of a record; \\n is a newline."},
    )
    completion_template: str = field(
        default="{completion}",
        metadata={"help": "What is learned after the prompt, with {fields} of a record."},
    )
    chat: bool = field(
        default=False, metadata={"help": "Wrap both as a turn of the tokenizer's chat template."}
    )
    max_length: int = field(default=512, metadata={"help": "Longest example, in tokens."})
    on_too_long: str = field(
        default="error",
        metadata={
            "help": "What becomes of an example longer than that.",
            "choices": ["error", "truncate", "drop"],
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Several examples per row of max_length tokens, instead of padding."},
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Train on the first of the examples only."}
    )
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first of the examples only."}
    )

    def __post_init__(self) -> None:
        self.prompt_template = unescape(self.prompt_template)
        self.completion_template = unescape(self.completion_template)
        sources = [bool(self.train_file), bool(self.dataset_name)]
        expect(sum(sources) == 1, "train_file", "it or --dataset_name", f"{sum(sources)} of them")
        both = bool(self.eval_file) and bool(self.eval_dataset_name)
        expect(not both, "eval_file", "it or --eval_dataset_name", "both")
        expect(_is_count(self.max_length, 2), "max_length", "at least 2 tokens", self.max_length)
        _one_of("on_too_long", self.on_too_long, ("error", "truncate", "drop"))
        for name in ("max_train_examples", "max_eval_examples"):
            value = getattr(self, name)
            expect(value is None or _is_count(value), name, "a positive integer", value)

    @property
    def train_source(self) -> str:
        return str(self.train_file or self.dataset_name)

    @property
    def eval_source(self) -> str | None:
        return self.eval_file or self.eval_dataset_name


@dataclass
class MethodArguments:
    """What trains: a name of `rosa_train.METHODS`, its size, and its masks."""

    method: str = field(default="rosa", metadata={"help": "full, lora, lora+, spa or rosa."})
    rank: int | None = field(default=None, metadata={"help": "Rank of the low-rank branch."})
    density: float | None = field(
        default=None, metadata={"help": "Density of the sparse branch, in (0, 1)."}
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Instead of density (and rank), the parameters to train: a share of the target "
            "weights (1%) or a number (1.5M)."
        },
    )
    alpha: float = field(default=16.0, metadata={"help": "Low-rank scaling is alpha / rank."})
    dropout: float = field(
        default=0.05, metadata={"help": "Dropout on what the low-rank branch reads, in [0, 1)."}
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "all-linear (without the output head), names, or one regex."},
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names, or one regex, of modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train fully and to keep in the adapter."}
    )
    rank_pattern: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Ranks of single modules, as JSON: name or regex to rank."}
    )
    density_pattern: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Densities of single modules, as JSON."}
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "wl<N>: N steps of the low-rank branch alone, then masks, then both; default: "
            "wl0; lora_only; spa_only. Without it wl64 for rosa, what fits for the others."
        },
    )
    mask_score: str = field(
        default="grad_mean_squared",
        metadata={
            "help": "Score by which a mask is chosen: grad_mean, grad_mean_squared, random, "
            "magnitude, grasp or rpca."
        },
    )
    mask_steps: int = field(default=1, metadata={"help": "Optimizer-step batches scored."})
    mask_scope: str = field(
        default="layer",
        metadata={"help": "Top entries of each weight, or of all.", "choices": ["layer", "global"]},
    )
    mask_memory: str | None = field(
        default=None, metadata={"help": "Bytes that scores may take at a time: 512M, 2G, ..."}
    )

    def __post_init__(self) -> None:
        expect(self.rank is None or _is_count(self.rank, 0), "rank", "an integer >= 0", self.rank)
        in_range = self.density is None or (_is_number(self.density, 0) and 0 < self.density < 1)
        expect(in_range, "density", "a number in (0, 1)", self.density)
        if self.budget is not None:
            self.budget = str(self.budget)
        expect(_is_number(self.alpha, 0) and self.alpha > 0, "alpha", "a number > 0", self.alpha)
        expect(
            _is_number(self.dropout, 0) and self.dropout < 1,
            "dropout", "a number in [0, 1)", self.dropout,
        )  # fmt: skip
        self.rank_pattern = _mapping("rank_pattern", self.rank_pattern)
        self.density_pattern = _mapping("density_pattern", self.density_pattern)
        for name, rank in self.rank_pattern.items():
            expect(_is_count(rank, 0), "rank_pattern", "integers >= 0", f"{name}: {rank!r}")
        for name, density in self.density_pattern.items():
            expect(
                _is_number(density, 0) and density < 1,
                "density_pattern", "numbers in [0, 1)", f"{name}: {density!r}",
            )  # fmt: skip
        expect(bool(self.target_modules), "target_modules", "all-linear, names or a regex", "none")
        if self.schedule is not None:
            known = re.fullmatch(r"wl\d+|default|lora_only|spa_only", self.schedule)
            expect(
                bool(known), "schedule", "wl<N>, default, lora_only or spa_only",
                repr(self.schedule),
            )  # fmt: skip
        expect(_is_count(self.mask_steps), "mask_steps", "a positive integer", self.mask_steps)
        _one_of("mask_scope", self.mask_scope, ("layer", "global"))
        self.mask_bytes()

    @property
    def targets(self) -> list[str] | str:
        """`target_modules` as `find_targets` wants it: "all-linear", a regex, or a list."""
        return _names(self.target_modules) or "all-linear"

    @property
    def excluded(self) -> list[str] | str | None:
        return _names(self.exclude_modules)

    def mask_bytes(self) -> int | None:
        """`mask_memory` in bytes; the units are binary."""
        if self.mask_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", str(self.mask_memory).strip())
        if match is None or float(match[1]) == 0:
            expect(False, "mask_memory", "bytes such as 512M or 2G", repr(self.mask_memory))
            return None
        return int(float(match[1]) * _UNITS[match[2]])


@dataclass
class TrainArguments:
    """How a run goes: batches, learning rates, when it reports and when it saves."""

    output_dir: str = field(metadata={"help": "Everything that a run writes is in this folder."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that is in output_dir."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the examples."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps, if positive; overrides the epochs."}
    )
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows per process and micro-batch."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "The same in evaluation."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Micro-batches per optimizer step."}
    )
    learning_rate: float = field(
        default=7e-4, metadata={"help": "Peak learning rate of the low-rank branch."}
    )
    sparse_learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of the sparse branch."}
    )
    full_learning_rate: float = field(
        default=5e-5,
        metadata={"help": "Peak learning rate of whole weights: full, modules_to_save."},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decoupled weight decay."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={"help": "Decay after the warm-up.", "choices": ["linear", "cosine", "constant"]},
    )
    warmup_steps: int = field(default=20, metadata={"help": "Steps of linear warm-up."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: never."}
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "Autocast.", "choices": ["no", "bf16", "fp16"]}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay off the GPU."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Evaluate every so many steps (always at the end)."}
    )
    generate_examples: int = field(
        default=0, metadata={"help": "Evaluation examples completed at the end, for exact match."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion."})
    save_steps: int | None = field(
        default=None,
        metadata={"help": "Save a checkpoint every so many steps, and around the mask phase."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept; the newest are."}
    )
    logging_steps: int = field(
        default=1, metadata={"help": "Steps between points of TensorBoard; metrics.jsonl has all."}
    )
    seed: int = field(default=42, metadata={"help": "Of initialisation, order, masks, dropout."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or `last`: the newest in output_dir, from the beginning "
            "if there is none."
        },
    )
    report_to: str = field(
        default="none",
        metadata={"help": "Beside metrics.jsonl.", "choices": ["none", "tensorboard"]},
    )
    disable_tqdm: bool = field(
        default=False, metadata={"help": "No progress bar (never one outside a terminal)."}
    )

    def __post_init__(self) -> None:
        expect(bool(self.output_dir), "output_dir", "a folder", repr(self.output_dir))
        steps = _is_count(self.max_steps, 1) or self.max_steps == -1
        expect(steps, "max_steps", "a positive integer, or -1", self.max_steps)
        expect(
            _is_number(self.num_train_epochs, 0) and self.num_train_epochs > 0,
            "num_train_epochs", "a number > 0", self.num_train_epochs,
        )  # fmt: skip
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_new_tokens",
            "logging_steps",
        ):
            expect(_is_count(getattr(self, name)), name, "a positive integer", getattr(self, name))
        for name in ("eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            expect(value is None or _is_count(value), name, "a positive integer", value)
        for name in ("warmup_steps", "generate_examples", "seed"):
            expect(_is_count(getattr(self, name), 0), name, "an integer >= 0", getattr(self, name))
        for name in (
            "learning_rate",
            "sparse_learning_rate",
            "full_learning_rate",
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
        ):
            expect(_is_number(getattr(self, name), 0), name, "a number >= 0", getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            expect(_is_number(value, 0) and value < 1, name, "a number in [0, 1)", value)
        _one_of("lr_scheduler_type", self.lr_scheduler_type, ("linear", "cosine", "constant"))
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _one_of("report_to", self.report_to, ("none", "tensorboard"))
        if self.resume_from_checkpoint in ("True", "true"):  # what Hugging Face users write
            self.resume_from_checkpoint = "last"
        if self.resume_from_checkpoint in ("False", "false", ""):
            self.resume_from_checkpoint = None
        expect(
            not (self.resume_from_checkpoint and self.overwrite_output_dir),
            "overwrite_output_dir", "it or --resume_from_checkpoint", "both",
        )  # fmt: skip


ARGUMENTS = (ModelArguments, DataArguments, MethodArguments, TrainArguments)

# What may change between a run and its resumption without changing a weight: where things are
# written, how often, what is measured, and batch sizes of evaluation.
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
    "train_file",  # a folder may move: what the data is, is told by its hash
    "dataset_name",
    "model_name_or_path",
    "tokenizer_name",
}


def flat(*arguments: Any) -> dict[str, Any]:
    """All fields of the dataclasses in one JSON object, which HfArgumentParser reads back."""
    return {name: value for one in arguments for name, value in dataclasses.asdict(one).items()}


def fingerprint(*arguments: Any) -> dict[str, Any]:
    """The fields that decide the weights: a checkpoint resumes only under the same."""
    return {name: value for name, value in flat(*arguments).items() if name not in _FREE}
