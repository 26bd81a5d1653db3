"""Measures a model: the loss on targets, and the share of generations equal to references."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rosa_train.config import TrainArguments
from rosa_train.data.collate import IGNORED, pad_prompts
from rosa_train.data.dataset import Dataset
from rosa_train.data.examples import Example, pad_token_id
from rosa_train.files import json_lines, write_file
from rosa_train.run import distributed


def target_count(batch: dict[str, Tensor]) -> int:
    """The number of a batch's tokens with a loss. A row's first token is not predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def target_loss(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """The cross entropy of a causal LM, summed over the targets of a batch.

    `batch` is from `pad` or `collate_packed`, on the CPU, with at least one target. Sums of
    micro-batches add up to the whole batch's sum. Means would not, because sizes differ.

    If the model takes `logits_to_keep`, logits are computed only in columns where a row has a
    target. Otherwise, with a vocabulary of 49,152 and short completions, the output head would be
    the largest product and the largest tensor of all.
    """
    following = batch["labels"][:, 1:]
    columns = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    targets = following[:, columns].to(device)
    # `attention_mask` is left out. Rows are padded on the right, which causal attention does not
    # read, and without a mask torch takes its fused causal kernels. There is no cache, because with
    # one transformers does not see the boundaries of packed examples.
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
    """Switches dropout and gradients off, and restores the model's mode afterwards."""
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
    """The loss summed over the targets of all batches, and the number of targets.

    Batches are added in double precision, so that a large evaluation set loses no digits.
    """
    measured = batch_losses(model, batches, device, autocast)
    return sum(loss for loss, _ in measured), sum(targets for _, targets in measured)


def batch_losses(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[tuple[float, int]]:
    """For each batch, the loss summed over its targets, and their number."""
    measured = []
    with eval_mode(model):
        for batch in batches:
            loss, targets = 0.0, target_count(batch)
            if targets:
                with autocast():
                    loss = target_loss(model, batch, device).item()
            measured.append((loss, targets))
    return measured


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
    """Completes prompts greedily, and compares the completions with their references.

    White space at both ends is ignored, and any other difference counts. Batches are padded on the
    left.

    Returns:
        The share of completions that equal their reference, in [0, 1] (0 without examples). For
        each example, in order, a dict of `where`, `prompt`, `expected`, `predicted`, `match`.
    """
    from transformers import GenerationConfig

    pad_id = pad_token_id(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=_stop_ids(model, tokenizer),
    )
    # Sorted by length, prompts need little padding.
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
) -> tuple[float, int, list[list[int]]]:
    """The mean loss over all target tokens, and their number. Each process takes its share.

    The third value is this process's batches of rows whose loss is not finite.
    """
    shares = dataset.share(
        range(len(dataset)),
        args.per_device_eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    batches = (dataset.collate(share) for share in shares)
    measured = batch_losses(model, batches, accelerator.device, accelerator.autocast)
    bad = [share for share, (one, _) in zip(shares, measured, strict=True) if not isfinite(one)]
    loss: float = sum(one for one, _ in measured)
    count = sum(targets for _, targets in measured)
    if distributed.is_parallel():
        totals = torch.tensor([loss, count], dtype=torch.float64, device=accelerator.device)
        loss, count = distributed.all_reduce(totals).tolist()
    return loss / max(count, 1), int(count), bad


def generate_predictions(
    model: nn.Module,
    tokenizer: Any,
    examples: list[Example],
    out: Path,
    args: TrainArguments,
    accelerator: Any,
) -> float:
    """The exact match. Each process takes its share. Writes predictions.jsonl."""
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
        write_file(out / "predictions.jsonl", json_lines(predictions))
    return _share_of_matches(predictions)


def _share_of_matches(predictions: Sequence[dict[str, Any]]) -> float:
    return sum(bool(p["match"]) for p in predictions) / max(len(predictions), 1)
