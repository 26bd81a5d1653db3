"""The result of a run, and result.json."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rosa_train.files import write_json
from rosa_train.run import metrics
from rosa_train.run.setup import Run


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        output_dir: the run's folder.
        method: the method's name.
        steps: the number of optimizer steps.
        trainable: the number of trainable parameters.
        final: the folder of the adapter, or of the model of full fine-tuning.
        losses: for each optimizer step, the mean over its target tokens. Steps before a resumption
            are included.
        eval_losses: the evaluation losses by step.
        exact_match: the share of generated completions that equal their reference, or None.
        tokens, tokens_per_s: the tokens read in training, without padding.
        seconds, peak_bytes: by phase (warmup, mask, train, eval, generate). `seconds` has load too.
    """

    output_dir: str
    method: str
    steps: int
    trainable: int
    final: str
    losses: list[float] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    exact_match: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def eval_loss(self) -> float | None:
        """The last evaluation loss, or None."""
        return self.eval_losses[max(self.eval_losses)] if self.eval_losses else None


def write_result(run: Run, load_seconds: float) -> Result:
    """Summarises metrics.jsonl in result.json. A run with result.json is complete."""
    result = Result(
        output_dir=str(run.out),
        method=run.method_args.method,
        steps=run.steps,
        trainable=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        final=str(run.final),
        **metrics.summary(metrics.read(run.out / "metrics.jsonl")),
    )
    result.seconds["load"] = load_seconds
    if run.accelerator.is_main_process:
        # A run that is resumed later is compared with these arguments.
        values = dataclasses.asdict(result) | {"arguments": run.state.arguments}
        write_json(run.out / "result.json", values)
    return result


def read_result(out: Path) -> Result:
    """The result of a complete run."""
    values = json.loads((out / "result.json").read_text(encoding="utf-8"))
    values["eval_losses"] = {int(step): loss for step, loss in values["eval_losses"].items()}
    return Result(**{name: values[name] for name in Result.__dataclass_fields__})


def say_complete(run: Run) -> None:
    """Says on stderr that a run was complete before it was resumed."""
    if run.accelerator.is_main_process:
        print(f"{run.out}: the run is complete already; nothing is trained", file=sys.stderr)
