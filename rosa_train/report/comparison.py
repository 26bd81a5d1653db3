"""The results of a comparison: rows from the runs' results, a table, Markdown and figures."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa_train.cli.tables import Table, megabytes

_REFERENCE = "lora"


def row_of(values: dict[str, Any], budget: int, code: int, log: Path) -> dict[str, Any]:
    """One flat row for a method. If its run failed, the row has the reason."""
    row: dict[str, Any] = {"method": values["method"], "status": "ok", "budget": budget}
    path = Path(values["output_dir"]) / "result.json"
    if code != 0 or not path.is_file():
        return row | {"status": "failed", "reason": _reason(code, log), "exit_status": code}
    result = json.loads(path.read_text(encoding="utf-8"))
    seconds, peaks = result["seconds"], result["peak_bytes"]
    training = ("warmup", "mask", "train")
    evals = {int(step): loss for step, loss in result["eval_losses"].items()}
    last = max(len(result["losses"]) // 10, 1)
    row |= {
        "trainable": result["trainable"],
        "steps": result["steps"],
        "train_loss": sum(result["losses"][-last:]) / last,  # of the last tenth of the steps
        "eval_loss": evals[max(evals)] if evals else None,
        "exact_match": result["exact_match"],
        "tokens": result["tokens"],
        "tokens_per_s": result["tokens_per_s"],
        "train_seconds": sum(seconds.get(phase, 0.0) for phase in training),
        "peak_bytes": max(peaks.get(phase, 0) for phase in training),
        "seed": values["seed"],
        "output_dir": values["output_dir"],
    }
    row |= {f"seconds_{phase}": value for phase, value in seconds.items()}
    return row | {f"peak_bytes_{phase}": value for phase, value in peaks.items()}


def _reason(code: int, log: Path) -> str:
    """The reason why a run failed: the signal, or the last error in the log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; see {log}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]
    said = errors[-1].split("error: ", 1)[1] if errors else lines[-1] if lines else "no output"
    return f"{said.strip()} (exit status {code})"


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row the ratios of tokens/s, seconds and peak memory to LoRA's."""
    reference = next(
        (row for row in rows if row["method"] == _REFERENCE and row["status"] == "ok"), None
    )
    for row in rows if reference is not None else []:
        for name in ("tokens_per_s", "train_seconds", "peak_bytes"):
            if row["status"] == "ok" and reference is not None and reference[name]:
                row[f"{name}_ratio"] = row[name] / reference[name]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per method. `vs lora` is the ratio to LoRA of the column before, if LoRA was run."""
    shown = Table(
        "Comparison",
        [
            "method",
            "status",
            "trainable",
            "eval loss",
            "exact match",
            "tokens/s",
            "vs lora",
            "seconds",
            "vs lora",
            "peak MB",
            "vs lora",
        ],
        texts=2,
    )
    for row in rows:
        shown.rows.append(
            [
                row["method"],
                row["status"],
                _number(row.get("trainable"), ","),
                _number(row.get("eval_loss"), ".4f"),
                _number(row.get("exact_match"), ".1%"),
                _number(row.get("tokens_per_s"), ",.0f"),
                _number(row.get("tokens_per_s_ratio"), ".2f"),
                _number(row.get("train_seconds"), ",.1f"),
                _number(row.get("train_seconds_ratio"), ".2f"),
                megabytes(row.get("peak_bytes")),
                _number(row.get("peak_bytes_ratio"), ".3f"),
            ]
        )
    return shown


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Draws the figures of the runs that succeeded. Returns their file names."""
    from rosa_train.report import plot

    drawn = [row for row in rows if row["status"] == "ok"]
    if not drawn:
        return []
    with plot.style():
        lines = {row["method"]: plot.read_run(row["output_dir"]) for row in drawn}
        title = plot.caption([Path(row["output_dir"]) for row in drawn])
        plot.save(plot.loss_figure(lines, title), folder / "loss.png")
        plot.save(plot.tradeoff_figure(drawn, title), folder / "tradeoff.png")
    return ["loss.png", "tradeoff.png"]


def markdown(
    rows: Sequence[dict[str, Any]],
    runs: dict[str, dict[str, Any]],
    budget: int,
    figures: Sequence[str],
) -> str:
    """The comparison as a Markdown page."""
    values = next(iter(runs.values()))
    import torch

    device = "cpu"
    if torch.cuda.is_available() and not values["use_cpu"]:
        device = torch.cuda.get_device_name()
    memory = "resident set of the process" if device == "cpu" else "memory of torch's allocator"
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    failed = [f"- **{r['method']}** {r['status']}: {r['reason']}" for r in rows if "reason" in r]
    parts = [
        "# Methods at an equal budget",
        f"`{values['model_name_or_path']}` on `{values['train_file'] or values['dataset_name']}`, "
        f"{budget:,} trainable parameters each (`full`: all), batches of {batch}, seed "
        f"{values['seed']}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}.",
        table(rows).markdown().rstrip(),
        "`vs lora`: the ratio of the column before to LoRA's. Seconds: warm-up, masks and "
        f"training, without loading and evaluation. Peak: {memory} in these phases.",
        *(["\n".join(failed)] if failed else []),
        *(f"![{name}]({name})" for name in figures),
    ]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
