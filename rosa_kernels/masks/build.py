"""RoSA's masks: which entries of each weight train (Algorithm 1 of arXiv 2401.04679)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.scores import NEEDS_BATCHES, SCORES, SIGNED, Data, count_tokens, give_scores
from rosa_kernels.masks.targets import is_layer, target_shapes
from rosa_kernels.masks.topk import Pool, pattern_of, top_k
from rosa_kernels.pattern import CsrPattern


def build_masks(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    nnz: Mapping[str, int],
    *,
    score: str = "grad_mean_squared",
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    tokens_of: Callable[[Any], float] = count_tokens,
    scope: str = "layer",
    seed: int = 42,
    memory_bytes: int | None = None,
    reduce: Callable[[Tensor], object] | None = None,
    broadcast: Callable[[Tensor], object] | None = None,
) -> dict[str, CsrPattern]:
    """Choose the entries of each target's weight that score highest.

    With g_k = dL_k / dW of batch k of n_k tokens, for the full weight at the current adapters:

    - grad_mean: |sum_k n_k g_k|, the gradient of the mean loss over all tokens, however they are
      split into batches;
    - grad_mean_squared: sum_k n_k g_k^2 (see docs/masks.md on how it depends on the split);
    - grasp: W0 o (H g) of the mean gradient g, and the highest are kept (arXiv 2002.07376);
    - rpca: |S| of the mean gradient = L + S (:func:`rosa_kernels.masks.robust_pca.rpca`);
    - random and magnitude (|W0|): need no batches.

    Scores are float32; of equal ones the first wins, by module and then by row-major place. So the
    mask follows from weights, batches and seed.

    Memory: beside an ordinary forward and backward that keeps the targets' inputs, one layer's
    weight in float32, the masks, and temporaries of an eighth of the layer or less. With one batch
    this takes one pass. With K batches it takes K for each group of targets that fit `memory_bytes`
    together. (`grasp`: 3 K passes and twice that memory; `rpca`: 12 times one layer's.)

    Afterwards the model is as before: train or eval mode, ``requires_grad``, ``.grad``, hooks, also
    after an exception. It runs in eval mode in between, so that scores are free of dropout.

    Args:
        model: holds the targets, on any devices. Not wrapped by DistributedDataParallel.
        targets: nn.Linear, transformers' Conv1D or RosaLinear modules, by name.
        nnz: how many entries of each, by the same names.
        score: one of SCORES.
        batches: a finite iterable; kept as a list while it is replayed.
        loss_fn: runs the model on a batch, under autocast if wanted; returns the mean loss.
        tokens_of: how many tokens of a batch that is the mean of; by default those with labels, or
            1 if a batch has no ``labels``.
        scope: "layer", or "global": the sum of nnz, wherever in the model scores are highest. They
            are held as candidates, 8 bytes each.
        seed: of `random`, with each module's name: independent of the global generators.
        memory_bytes: of the sums of a group of targets; by default what the largest needs.
        reduce: averages a tensor over the ranks in place. All ranks must have as many batches.
        broadcast: overwrites a tensor by rank 0's.

    Returns:
        A pattern (m, n) on each target's device, by name.

    Raises:
        ValueError: unknown score or scope; names of `nnz` and `targets` that differ; a module under
            two names; an nnz that does not fit; no batches where they are needed; a target without
            a gradient; a loss or scores that are not finite; too little memory_bytes.
        TypeError: a target that is not a linear layer; a loss that is not a scalar.
    """
    shapes = _check(targets, nnz, score, scope)
    data = None
    if score in NEEDS_BATCHES:
        batches = [] if batches is None else list(batches)
        if not batches or loss_fn is None:
            raise ValueError(
                f"build_masks: expected loss_fn and at least one batch for {score}, got "
                f"{len(batches)} batches{'' if loss_fn else ' and no loss_fn'}"
            )
        data = Data(batches, loss_fn, tokens_of, reduce)
    signed = score in SIGNED
    patterns: dict[str, CsrPattern] = {}
    options: dict[str, Any] = {"data": data, "seed": seed, "memory_bytes": memory_bytes}
    if scope == "layer":

        def choose(name: str, scores: Tensor) -> None:
            places = top_k(scores, nnz[name], signed=signed, what=f"scores of {name!r}")
            patterns[name] = pattern_of(places, shapes[name])

        scored = {name: module for name, module in targets.items() if nnz[name]}
        give_scores(score, model, scored, choose, **options)
    else:
        pool = Pool(sum(nnz.values()), list(targets), signed=signed)
        give_scores(score, model, targets, pool.add, **options)
        for name, places in pool.places().items():
            patterns[name] = pattern_of(places, shapes[name])
    with torch.no_grad():
        return {
            name: _at_home(patterns.get(name), shapes[name], module, broadcast)
            for name, module in targets.items()
        }


def _check(
    targets: Mapping[str, nn.Module], nnz: Mapping[str, int], score: str, scope: str
) -> dict[str, tuple[int, int]]:
    if score not in SCORES:
        raise ValueError(f"build_masks: expected a score of {', '.join(SCORES)}, got {score!r}")
    if scope not in ("layer", "global"):
        raise ValueError(f"build_masks: expected scope 'layer' or 'global', got {scope!r}")
    if not targets:
        raise ValueError("build_masks: expected at least one target, got none")
    if targets.keys() != nnz.keys():
        raise ValueError(
            "build_masks: expected nnz for exactly the targets, got "
            f"none for {sorted(targets.keys() - nnz.keys())[:5]} and some for the unknown "
            f"{sorted(nnz.keys() - targets.keys())[:5]}"
        )
    names: dict[int, str] = {}
    for name, module in targets.items():
        first = names.setdefault(id(module), name)
        if first != name:
            raise ValueError(
                f"build_masks: expected each module once, got one under {first!r} and {name!r}"
            )
    for name, module in targets.items():
        if not is_layer(module):
            raise TypeError(
                "build_masks: expected targets that are nn.Linear, Conv1D or RosaLinear, got "
                f"{name!r} of class {type(module).__name__}"
            )
    shapes = target_shapes(targets)
    for name, (m, n) in shapes.items():
        if not 0 <= nnz[name] <= m * n:
            raise ValueError(
                f"build_masks: expected nnz in [0, {m * n}] for {name!r} of shape {(m, n)}, "
                f"got {nnz[name]}"
            )
    return shapes


def _at_home(
    pattern: CsrPattern | None,
    shape: tuple[int, int],
    module: nn.Module,
    broadcast: Callable[[Tensor], object] | None,
) -> CsrPattern:
    """The pattern on its module's device, and rank 0's everywhere."""
    device = next(module.parameters()).device
    if pattern is None:
        pattern = pattern_of(torch.empty(0, dtype=torch.int64), shape)
    pattern = pattern.to(device)
    if broadcast is None:
        return pattern
    # Equal sums give equal masks; but ranks may add in different orders. Only with a global scope
    # may they then even differ in nnz, so that rank 0's has to be known first.
    crow = pattern.crow_indices.clone()
    broadcast(crow)
    col = pattern.col_indices.new_zeros(int(crow[-1]))
    count = min(len(col), pattern.nnz)
    col[:count] = pattern.col_indices[:count]
    broadcast(col)
    return CsrPattern(crow, col, shape)
