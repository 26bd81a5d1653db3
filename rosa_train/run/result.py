"""What a run came to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from rosa_train.files import write_file
from rosa_train.run import metrics
from rosa_train.run.setup import Run


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `losses`: per optimizer step, the mean over its target tokens; of the whole run, resumed or
    not. `eval_losses`: by step. `exact_match`: share of generated completions equal to their
    reference. `seconds` and `peak_bytes`: per phase (warmup, mask, train, eval, generate).
    `tokens`, `tokens_per_s`: read in training, padding not counted. `final`: the adapter, or the
    model of full fine-tuning.
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
        """The last one."""
        return self.eval_losses[max(self.eval_losses)] if self.eval_losses else None


def write_result(run: Run, load_seconds: float) -> Result:
    """Sums up metrics.jsonl, and writes result.json: where it is, the run is complete."""
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
        write_file(run.out / "result.json", json.dumps(dataclasses.asdict(result), indent=2))
    return result
