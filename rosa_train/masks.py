"""RoSA's masks: which entries of each weight train (Algorithm 1 of arXiv 2401.04679), and their
files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_train.files import replacing_file
from rosa_train.scores import NEEDS_BATCHES, SCORES, SIGNED, Data, count_tokens, give_scores
from rosa_train.targets import is_layer, target_shapes
from rosa_train.topk import Pool, pattern_of, top_k

__all__ = ["SCORES", "build_masks", "load_masks", "save_masks"]

_FORMAT, _VERSION = "rosa_train.masks", "1"


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
    - rpca: |S| of the mean gradient = L + S (:func:`rosa_train.robust_pca.rpca`);
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


def save_masks(masks: Mapping[str, CsrPattern], path: str | os.PathLike[str]) -> None:
    """Write masks as one safetensors file: 4 bytes a nonzero, 4 a row.

    Tensors ``<name>.crow_indices`` and ``<name>.col_indices``, int32; metadata format, version and
    shapes (JSON). The file is replaced as a whole: after a crash it is the old or the new one.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, pattern in masks.items():
        pattern.check_unchanged()
        # Cloned, where not copied from a device: safetensors refuses tensors that share memory.
        tensors[f"{name}.crow_indices"] = pattern.crow_indices.to("cpu", copy=True).contiguous()
        tensors[f"{name}.col_indices"] = pattern.col_indices.to("cpu", copy=True).contiguous()
    shapes = json.dumps({name: list(pattern.shape) for name, pattern in masks.items()})
    with replacing_file(path) as draft:
        save_file(tensors, draft, {"format": _FORMAT, "version": _VERSION, "shapes": shapes})


def load_masks(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, CsrPattern]:
    """Read masks written by :func:`save_masks`, every one validated, onto the CPU.

    Args:
        path: the file.
        shapes: (m, n) of the model's targets; masks of other modules or shapes are refused.

    Raises:
        ValueError: not such a file, a truncated one, indices that are out of range or unsorted, or
            masks of another model (with a table).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_masks: expected a safetensors file, got {os.fspath(path)}: {error}"
        ) from error
    found = _shapes_in(metadata, path)
    if shapes is not None:
        _check_model(found, {name: (m, n) for name, (m, n) in shapes.items()}, path)
    parts = ("crow_indices", "col_indices")
    expected = {f"{name}.{part}" for name in found for part in parts}
    if tensors.keys() != expected:
        raise ValueError(
            "load_masks: expected crow_indices and col_indices of each module, got "
            f"{sorted(expected - tensors.keys())[:5]} missing and "
            f"{sorted(tensors.keys() - expected)[:5]} unexpected in {os.fspath(path)}"
        )
    masks = {}
    for name, shape in found.items():
        crow, col = (tensors[f"{name}.{part}"] for part in parts)
        try:
            for part, index in zip(parts, (crow, col), strict=True):
                if index.dtype != torch.int32:
                    raise TypeError(f"load_masks: expected {part} of int32, got {index.dtype}")
            masks[name] = CsrPattern(crow, col, shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, for {name!r} in {os.fspath(path)}") from error
    return masks


def _shapes_in(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> dict[str, tuple[int, int]]:
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"load_masks: expected format {_FORMAT}, version {_VERSION}, got "
            f"{metadata.get('format')}, version {metadata.get('version')} in {os.fspath(path)}"
        )
    try:
        shapes = json.loads(metadata["shapes"])
        if not all(type(size) is int for m, n in shapes.values() for size in (m, n)):
            raise TypeError("sizes that are not integers")
        return {name: (m, n) for name, (m, n) in shapes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"load_masks: expected a shape (m, n) of each module, got {error!r} in "
            f"{os.fspath(path)}"
        ) from error


def _check_model(
    found: Mapping[str, tuple[int, int]],
    wanted: Mapping[str, tuple[int, int]],
    path: str | os.PathLike[str],
) -> None:
    differing = [
        (name, str(found.get(name, "absent")), str(wanted.get(name, "absent")))
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if not differing:
        return
    rows = [("module", "mask", "model"), *differing[:20]]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
    more = len(differing) - 20
    raise ValueError(
        f"load_masks: expected masks of this model, got others for {len(differing)} modules in "
        f"{os.fspath(path)}:\n{table}" + (f"\n  and {more} more" if more > 0 else "")
    )
