"""A layer in training: time and peak memory of every contender, relative to LoRA."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from ..layer.case import FWD_BWD, MODEL
from ..layer.contenders import REFERENCE
from ..measuring.results import Row
from ..report import layer
from ..report.rows import ranges_overlap
from . import style
from .rows import RANGE

_OURS = {
    "rosa": "RoSA",
    "rosa-scatter": "RoSA, scattered per product",
    "rosa-separate": "RoSA, S beside W",
    "lora": "LoRA, ours",
    "spa": "SpA",
    "cla": "Cheap LoRA",
}
_NAMES = {
    **_OURS,
    "peft-lora": "LoRA, PEFT",
    "peft-supra": "Super-Tuning with LoRA, PEFT",
    "peft-super": "Super-Tuning, PEFT",
    "peft-shira": "SHiRA, PEFT",
    "full": "full fine-tuning",
    "frozen": "frozen base",
}
_MODES = {
    FWD_BWD: "forward + backward",
    "step": "forward + backward + AdamW",
    "step_fused": "forward + backward + fused AdamW",
}
_OWN, _PEER, _BASE = "#EEA77B", "#88AACC", "#AAAAAA"
# A longer bar is cut here, with its number at the end, so that differences near 1 stay visible.
_WIDEST = 2.6


def bars(group: layer.Group, out: Path, name: str) -> list[Path]:
    """One figure per case and mode: bars of time and of peak training memory."""
    if REFERENCE not in group or group[REFERENCE]["status"] != "ok":
        return []
    shown = [kernel for kernel in _NAMES if kernel in group and group[kernel]["status"] == "ok"]
    sample = group[REFERENCE]
    fig = style.figure(
        9.5,
        1.6 + 0.29 * len(shown),
        f"{_what(sample)}: {_MODES[sample['mode']]}",
        _note(sample),
        sample,
    )
    left, right = fig.subplots(1, 2, sharey=True)
    _panel(left, group, shown, "time over LoRA's", layer.seconds, timed=True)
    _panel(right, group, shown, "peak training memory over LoRA's", layer.peak)
    left.set_yticks(range(len(shown)), [_NAMES[kernel] for kernel in shown])
    left.invert_yaxis()
    for label, kernel in zip(left.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if kernel == "rosa" else "normal")
    return style.save(fig, out, name)


def _panel(
    axes: Axes,
    group: layer.Group,
    shown: list[str],
    title: str,
    of: object,
    timed: bool = False,
) -> None:
    values = [layer.ratio(group, kernel, REFERENCE, of) for kernel in shown]  # type: ignore[arg-type]
    base = group[REFERENCE]["median_s"]
    for i, (kernel, value) in enumerate(zip(shown, values, strict=True)):
        if value is None:
            continue
        same = timed and kernel != REFERENCE and ranges_overlap(group[kernel], group[REFERENCE])
        color = _color(kernel)
        axes.barh(
            i,
            min(value, _WIDEST),
            height=0.66,
            facecolor="white" if same else color,
            edgecolor=color,
            linewidth=1.5,
        )
        end = value
        if timed:
            low, high = (group[kernel][key] / base for key in ("p20_s", "p80_s"))
            axes.hlines(i, min(low, _WIDEST), min(high, _WIDEST), color=style.INK, linewidth=1.2)
            end = max(high, value)
        cut = " →" if value > _WIDEST else ""
        axes.annotate(
            f"{value:.2f}{cut}",
            (min(end, _WIDEST), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over the dashed line
        )
    axes.axvline(1, color=style.INK, linestyle=(0, (5, 3)), linewidth=1)
    axes.set_xlim(0, _WIDEST * 1.12)
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)


def _color(kernel: str) -> str:
    if kernel == "rosa":
        return style.OURS_COLOR
    if kernel in _OURS:
        return _OWN
    return _PEER if kernel.startswith("peft") else _BASE


def _what(row: Row) -> str:
    if row["op"] == MODEL:
        return "Four blocks of SmolLM2-135M"
    return f"One layer of {row['m']}×{row['n']}"


def _note(row: Row) -> str:
    dropout = f", dropout {row['dropout']:g}" if row["dropout"] else ""
    mask = "generated masks" if row["op"] == MODEL else f"{row['mask']} mask"
    return (
        f"{row['k']} tokens, {row['dtype']}, {mask}, {row['trainable']} parameters trained{dropout}"
        f"; hollow: {RANGE} overlap LoRA's"
    )
