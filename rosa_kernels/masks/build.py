"""RoSA's masks: which entries of each weight train (Algorithm 1 of arXiv 2401.04679)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.scores import (
    NEEDS_BATCHES,
    SCORES,
    SIGNED,
    Data,
    count_tokens,
    default_memory,
    give_scores,
)
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

    Batch k has n_k tokens and the mean loss L_k. Its gradient is g_k = dL_k / dW, for the full
    weight at the current adapters. The scores are:

    - grad_mean: |sum_k n_k g_k|, the gradient of the mean loss over all tokens. It does not depend
      on the split into batches.
    - grad_mean_squared: sum_k n_k g_k^2. It depends on the split: see docs/masks.md.
    - grasp: W0 o (H g) for the mean gradient g, ranked by value (arXiv 2002.07376).
    - rpca: |S| of the mean gradient = L + S (:func:`rosa_kernels.masks.robust_pca.rpca`).
    - random, and magnitude (|W0|). These two need no batches.

    Scores are float32. Of equal scores the first wins, by module and then by row-major place. So
    weights, batches and seed determine the mask.

    Memory: with one batch, one layer's weight in float32, the masks, and temporaries of at most an
    eighth of the layer. With more batches, the sums of one group instead of the one weight. This is
    beside an ordinary forward and backward that keeps the targets' inputs. `grasp` takes twice that
    memory, and `rpca` 12 times one layer's weight.

    Passes: one if there is one batch. K batches take K passes for each group of targets that fit
    `memory_bytes` together. `grasp` takes 3 K passes for each group.

    Afterwards the model is as before, also after an exception: train or eval mode,
    ``requires_grad``, ``.grad`` and hooks. Meanwhile it is in eval mode, so that no dropout affects
    the scores.

    Args:
        model: holds the targets, on any devices. DistributedDataParallel must not wrap it.
        targets: nn.Linear, transformers' Conv1D or RosaLinear modules, by name.
        nnz: the number of entries to choose in each target, by the same names.
        score: one of SCORES.
        batches: a finite iterable, which is kept as a list because batches are replayed.
        loss_fn: runs the model on a batch, under autocast if wanted, and returns the mean loss.
        tokens_of: gives the number of tokens of which a batch's loss is the mean. By default these
            are the tokens with labels, or 1 if a batch has no ``labels``.
        scope: "layer" chooses nnz entries in each target. "global" chooses the sum of nnz, wherever
            in the model the scores are highest; it keeps candidates of 8 bytes each.
        seed: seed of `random`, used with each module's name and not with the global generators.
        memory_bytes: most memory for the sums of one group; by default a quarter of the free
            memory, but at least what the largest target needs. For `grasp`, whose scores depend on
            the groups, and with `reduce`, as ranks need equal groups, it is what the largest needs.
        reduce: averages a tensor over the ranks, in place. All ranks must have equally many
            batches.
        broadcast: overwrites a tensor with rank 0's.

    Returns:
        The pattern (m, n) of each target, by name, on the target's device.

    Raises:
        ValueError: the score or scope is unknown; `nnz` and `targets` have different names, or no
            names; a module has two names; an nnz is out of range; the score needs batches, and
            there are none; a target has no gradient; the loss or the scores are not finite;
            memory_bytes is too small.
        TypeError: a target is not a linear layer, or the loss is not a scalar.
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
        if memory_bytes is None and reduce is None:
            memory_bytes = default_memory(score, targets)
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
    """The pattern on its module's device; with `broadcast`, rank 0's pattern on every rank."""
    device = next(module.parameters()).device
    if pattern is None:
        pattern = pattern_of(torch.empty(0, dtype=torch.int64), shape)
    pattern = pattern.to(device)
    if broadcast is None:
        return pattern
    # Ranks may add in different orders, so their masks may differ. With a global scope their nnz
    # may differ too, so rank 0's row pointers are sent first.
    crow = pattern.crow_indices.clone()
    broadcast(crow)
    col = pattern.col_indices.new_zeros(int(crow[-1]))
    count = min(len(col), pattern.nnz)
    col[:count] = pattern.col_indices[:count]
    broadcast(col)
    return CsrPattern(crow, col, shape)
