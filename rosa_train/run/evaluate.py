"""How good a model is: the loss on its targets, and how often it generates the reference."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rosa_train.config import TrainArguments
from rosa_train.data.collate import IGNORED, pad_prompts
from rosa_train.data.dataset import Dataset
from rosa_train.data.examples import Example, pad_token_id
from rosa_train.files import write_file
from rosa_train.run import distributed


def target_count(batch: dict[str, Tensor]) -> int:
    """The tokens of a batch that a loss is taken on: labels of a first token predict nothing."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def target_loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """The cross entropy of a causal LM, summed over the targets of a batch.

    `batch`: of `pad` or `collate_packed`, on the CPU, with at least one target. The sum and not
    the mean, so that losses of micro-batches add up to that of the whole batch whatever their
    sizes.

    Logits are computed in the columns where some row has a target, if the model can leave some out
    (`logits_to_keep`): with a vocabulary of 49,152 and short completions the output head is
    otherwise the largest product and the largest tensor of all.
    """
    following = batch["labels"][:, 1:]
    columns = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    targets = following[:, columns].to(device)
    # `attention_mask` is left out: rows are padded on the right, where causal attention never
    # looks, and without one the fused causal kernels are taken. No cache: with one, transformers
    # does not see the boundaries of packed examples.
    inputs = {
        name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch
    }
    if _keeps_logits(type(model).forward):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns.to(device)).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns.to(device)]
    return cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@cache
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the mode as before outside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, int]:
    """The loss summed over the targets of all batches, and their number.

    Batches are added up in double precision, so that a large evaluation set costs no digits.
    """
    total, count = 0.0, 0
    with eval_mode(model):
        for batch in batches:
            if targets := target_count(batch):
                with autocast():
                    total += target_loss(model, batch, device).item()
                count += targets
    return total, count


def generate_exact_match(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, list[dict[str, Any]]]:
    """Completes prompts greedily; the share that equal their reference, and all of them.

    White space at both ends does not count, everything else does. Batches are padded on the left.

    Returns:
        The share in [0, 1] (0 without examples), and per example, in order, `where`, `prompt`,
        `expected`, `predicted`, `match`.
    """
    from transformers import GenerationConfig

    pad_id = pad_token_id(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=_stop_ids(model, tokenizer),
    )
    # Prompts of one length beside each other need little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    predictions: list[dict[str, Any]] = [{}] * len(examples)
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_prompts([examples[i] for i in chosen], pad_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with autocast():
                output = model.generate(**batch, generation_config=config)  # type: ignore[operator]
            texts = tokenizer.batch_decode(
                output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                expected, predicted = examples[i].completion.strip(), text.strip()
                predictions[i] = {
                    "where": examples[i].where,
                    "prompt": tokenizer.decode(examples[i].prompt_ids, skip_special_tokens=True),
                    "expected": expected,
                    "predicted": predicted,
                    "match": predicted == expected,
                }
    return _share_of_matches(predictions), predictions


def _stop_ids(model: Any, tokenizer: Any) -> list[int] | None:
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return sorted(stop for stop in stops if stop is not None) or None


def evaluate_dataset(
    model: nn.Module, dataset: Dataset, args: TrainArguments, accelerator: Any
) -> tuple[float, int]:
    """The mean loss over all target tokens, each process taking its share."""
    shares = dataset.share(
        range(len(dataset)),
        args.per_device_eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    batches = (dataset.collate(share) for share in shares)
    loss, count = evaluate_loss(model, batches, accelerator.device, accelerator.autocast)
    if distributed.is_parallel():
        totals = torch.tensor([loss, count], dtype=torch.float64, device=accelerator.device)
        loss, count = distributed.all_reduce(totals).tolist()
    return loss / max(count, 1), int(count)


def generate_predictions(
    model: nn.Module,
    tokenizer: Any,
    examples: list[Example],
    out: Path,
    args: TrainArguments,
    accelerator: Any,
) -> float:
    """Exact match, each process taking its share; predictions go to predictions.jsonl."""
    world, rank = accelerator.num_processes, accelerator.process_index
    _, predictions = generate_exact_match(
        model,
        tokenizer,
        examples[rank::world],
        max_new_tokens=args.max_new_tokens,
        batch_size=args.per_device_eval_batch_size,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    if world > 1:
        from accelerate.utils import gather_object

        predictions = gather_object(predictions)
    if accelerator.is_main_process:
        text = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
        write_file(out / "predictions.jsonl", text)
    return _share_of_matches(predictions)


def _share_of_matches(predictions: Sequence[dict[str, Any]]) -> float:
    return sum(bool(p["match"]) for p in predictions) / max(len(predictions), 1)
