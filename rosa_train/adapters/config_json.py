"""Reads and writes adapter_config.json: PEFT's fields, and the fields that RoSA adds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosa_kernels.bounds import (
    FRACTION,
    FRACTION_BELOW_1,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    Bound,
)
from rosa_kernels.masks.targets import pattern_key
from rosa_train.adapters.state import AdapterSpec
from rosa_train.methods.method import METHODS

FORMAT_VERSION = 1
LORA, ROSA = "LORA", "ROSA"


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that are used, with PEFT's names and meanings."""

    peft_type: str
    target_modules: str | Sequence[str]
    r: int
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layers_to_transform: Any = None
    method: str | None = None

    def rank(self, name: str) -> int:
        """The rank of a layer."""
        key = pattern_key(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, name: str) -> float:
        """The alpha of a layer. Its scaling is alpha / rank."""
        key = pattern_key(self.alpha_pattern, name)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        # rsLoRA scales by alpha / sqrt(rank). Nothing is scaled at rank 0, where alpha stays > 0.
        scaled = float(alpha) * math.sqrt(self.rank(name) or 1) if self.use_rslora else float(alpha)
        # The largest floats overflow here.
        return float(POSITIVE.check("load_adapter", scaled, f"alpha of {name}"))


def to_json(
    spec: AdapterSpec,
    *,
    peft_type: str,
    target_modules: str | Sequence[str],
    fan_in_fan_out: bool,
    density: float,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The contents of adapter_config.json for an adapter.

    A LORA file holds only fields that PEFT knows, because PEFT warns of others.
    """
    ranks = {name: rank for name, rank in spec.ranks.items() if peft_type == ROSA or rank}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(spec.alphas.values()).most_common(1)[0][0]
    fields: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _listed(target_modules),
        "exclude_modules": _listed(spec.exclude_modules),
        "modules_to_save": [*spec.modules_to_save] or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: _plain(a) for name, a in spec.alphas.items() if a != alpha},
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
    }
    if peft_type == ROSA:
        fields |= {
            "method": spec.method.name,
            "density": density,
            "rosa_format_version": FORMAT_VERSION,
        }
    return fields


def read_config(path: Path) -> AdapterConfig:
    """Read and check an adapter_config.json.

    Raises:
        ValueError: the file is not JSON, a field is missing or has another type, or the format is
            newer. The adapter is of another kind, or uses an unsupported option of PEFT.
    """
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_adapter: expected JSON in {path}, got: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"load_adapter: expected a JSON object in {path}, got {_short(fields)}")

    def wrong(name: str, expected: str) -> ValueError:
        got = _short(fields[name]) if name in fields else "no such field"
        return ValueError(f"load_adapter: expected {name} to be {expected} in {path}, got {got}")

    if fields.get("peft_type") not in (LORA, ROSA):
        raise wrong("peft_type", f"{LORA!r} or {ROSA!r}")
    if fields["peft_type"] == ROSA:
        version: Any = fields.get("rosa_format_version")
        if not POSITIVE_INTEGER.holds(version):
            raise wrong("rosa_format_version", f"an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise wrong(
                "rosa_format_version", f"at most {FORMAT_VERSION}, the newest this version reads"
            )
    for name in ("peft_type", "r", "target_modules"):
        if fields.get(name) is None:
            raise wrong(name, _BOUNDS[name].words)
    for name, bound in _BOUNDS.items():
        if fields.get(name) is not None and not bound.holds(fields[name]):
            raise wrong(name, bound.words)
    if fields["peft_type"] == LORA and fields["r"] < 1:
        raise wrong("r", "at least 1")
    for name, (neutral, why) in _UNSUPPORTED.items():
        if fields.get(name) and fields[name] not in neutral:
            raise wrong(name, f"unset ({why})")
    if fields.get("ensure_weight_tying") and fields.get("modules_to_save"):
        raise wrong("ensure_weight_tying", "unset (modules to save are untied from others)")
    known = AdapterConfig.__dataclass_fields__
    return AdapterConfig(**{k: v for k, v in fields.items() if k in known and v is not None})


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _is_rule(value: Any) -> bool:
    return _is_regex(value) if isinstance(value, str) else _are_names(value)


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return bool(value)


def _pattern_of(bound: Bound) -> Bound:
    return Bound(
        f"a mapping from patterns, each to {bound.words}",
        lambda value: (
            isinstance(value, dict)
            and all(_is_regex(key) and bound.holds(item) for key, item in value.items())
        ),
    )


_TEXT = Bound("a string", lambda value: isinstance(value, str))
_SWITCH = Bound("true or false", lambda value: isinstance(value, bool))
_RULE = "'all-linear', a regular expression or a list of names"

# What each field must be. Fields other than the required ones may also be null.
_BOUNDS = {
    "peft_type": _TEXT,
    "r": NON_NEGATIVE_INTEGER,
    "target_modules": Bound(_RULE, _is_rule),
    "exclude_modules": Bound(_RULE, lambda value: value == [] or _is_rule(value)),
    "modules_to_save": Bound("a list of names", lambda value: value == [] or _are_names(value)),
    "lora_alpha": POSITIVE,
    "lora_dropout": FRACTION_BELOW_1,
    "rank_pattern": _pattern_of(NON_NEGATIVE_INTEGER),
    "alpha_pattern": _pattern_of(POSITIVE),
    "fan_in_fan_out": _SWITCH,
    "use_rslora": _SWITCH,
    "base_model_name_or_path": _TEXT,
    "method": Bound(
        f"one of {', '.join(METHODS)}", lambda value: isinstance(value, str) and value in METHODS
    ),
    "density": FRACTION,
}

# Options of PEFT that may change the formula: the values that keep it, and what others change.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "biases do not train"),
    "lora_bias": ((), "the low-rank branch has no bias"),
    "use_dora": ((), "DoRA is another method"),
    "use_qalora": ((), "QALoRA is another method"),
    "use_bdlora": ((), "BD-LoRA is another method"),
    "kasa_config": ((), "KaSA is another method"),
    "velora_config": ((), "VeLoRA is another method"),
    "monteclora_config": ((), "MonteCLoRA is another method"),
    "arrow_config": ((), "Arrow routes between adapters"),
    "alora_invocation_tokens": ((), "activated LoRA is another method"),
    "layer_replication": ((), "it changes the model"),
    "target_parameters": ((), "only whole layers are adapted"),
    "trainable_token_indices": ((), "only whole modules are saved"),
    "init_lora_weights": (
        (True, "gaussian", "eva", "orthogonal"),
        "others change the base weights",
    ),
}


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _listed(rule: str | Sequence[str] | None) -> str | list[str] | None:
    return rule if isinstance(rule, str) or rule is None else [*rule]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
