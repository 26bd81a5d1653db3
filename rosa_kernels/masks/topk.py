"""The k largest of a matrix of scores: exact, reproducible, and without sorting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.pattern import CsrPattern

_LOW31 = 0x7FFFFFFF
# A 32-bit key is found by its highest 12 bits, then 10, then 10. Each level takes a histogram of at
# most 4,096 bins (32 KB). Two levels of 16 bits would save one pass of three. But their 65,536 bins
# (512 KB) are longer than the chunks of a small layer.
_SHIFTS = (20, 10, 0)
_BINS = (4096, 1024, 1024)


def chunk_elements(numel: int) -> int:
    """The number of a matrix's elements in one chunk: a 64th of them, from 4,096 to 2**20.

    The temporaries of a chunk (keys, digits, a selection) take about 20 bytes an element at most.
    So all temporaries stay below a twelfth of the matrix in float32, and below 20 MiB.
    """
    return min(max(numel // 64, 2**12), 2**20)


def top_k(scores: Tensor, k: int, *, signed: bool = False, what: str = "scores") -> Tensor:
    """The places of the k scores of largest magnitude (`signed`: of largest value), ascending.

    Scores of any dtype are compared in float32. Of equal scores the first in row-major order win,
    so the answer is unique and the same on every device. -0.0 equals 0.0.

    A histogram over the bits of the scores finds the threshold in three reads, chunk by chunk. A
    fourth read collects the places. Time is O(numel). Memory beside the result is the temporaries
    of one chunk (:func:`chunk_elements`).

    Args:
        scores: (m, n), of any strides and floating dtype; float64 is rounded to float32.
        k: from 0 to m * n.
        signed: rank by value, not by magnitude.
        what: the name of the scores in error messages.

    Returns:
        (k,) int64 places in the row-major order of (m, n), ascending, on the scores' device.

    Raises:
        ValueError: k out of range, scores that are not 2-D, NaN or infinite scores.
        TypeError: scores of a dtype that is not floating.
    """
    _check(scores, what)
    if not 0 <= k <= scores.numel():
        raise ValueError(f"top_k: expected k in [0, {scores.numel()}] for {what}, got {k}")
    cut = _find_cut([scores], k, signed, what)
    return _beyond(scores, cut.key, cut.ties, signed)


def pattern_of(places: Tensor, shape: tuple[int, int]) -> CsrPattern:
    """The pattern of ascending row-major places in a matrix of `shape`."""
    m, n = shape
    crow = torch.zeros(m + 1, dtype=torch.int32, device=places.device)
    if not places.numel():
        return CsrPattern(crow, places.to(torch.int32), shape)
    rows = places // n
    crow[1:] = torch.bincount(rows, minlength=m).cumsum(0)
    return CsrPattern(crow, (places - rows * n).to(torch.int32), shape)


class Pool:
    """The k largest scores of several matrices that come one at a time, in any order.

    The pool keeps at most k candidates of 8 bytes each (score and place). For a matrix of more than
    2**31 elements a candidate takes 12 bytes. Of equal scores, the earlier matrix in `order` wins,
    then the earlier place. A candidate is dropped only if k others rank higher. So the result does
    not depend on the order of arrival.

    Args:
        k: how many scores to keep, of all matrices together.
        order: the names of the matrices, by precedence.
        signed: as for :func:`top_k`.
    """

    def __init__(self, k: int, order: Sequence[str], *, signed: bool = False) -> None:
        self._k, self._signed = k, signed
        # Candidates (1, count) and their places, by precedence; None until the matrix is added.
        self._kept: dict[str, tuple[Tensor, Tensor] | None] = dict.fromkeys(order)

    def add(self, name: str, scores: Tensor) -> None:
        """Take the scores (m, n) of one matrix into account. Raises like :func:`top_k`."""
        what = f"scores of {name!r}"
        _check(scores, what)
        # The new matrix's scores are candidates in place. Only those that are kept are copied.
        pieces: dict[str, Tensor] = {}
        for other, kept in self._kept.items():
            if other == name:
                pieces[other] = scores
            elif kept is not None:
                pieces[other] = kept[0]
        excess = sum(piece.numel() for piece in pieces.values()) - self._k
        cut = _find_cut(list(pieces.values()), self._k + min(excess, 0), self._signed, what)
        ties = cut.ties
        index = torch.int32 if scores.numel() <= 2**31 else torch.int64
        for other, piece in pieces.items():
            places = _beyond(piece, cut.key, ties, self._signed)
            values = _at(piece, places)
            if ties:
                equal = _keys(values, self._signed) == cut.key
                ties -= int(equal.sum())
            if other == name:
                self._kept[other] = (values.unsqueeze(0), places.to(index))
            elif len(places) < piece.numel():
                kept = self._kept[other]
                assert kept is not None
                self._kept[other] = (values.unsqueeze(0), kept[1][places])

    def places(self) -> dict[str, Tensor]:
        """For each matrix added: the places of its scores among the k largest, ascending."""
        return {name: kept[1].long() for name, kept in self._kept.items() if kept is not None}


class _Cut(NamedTuple):
    """The threshold: all keys above `key` are taken, and the first `ties` keys equal to it."""

    key: int
    ties: int


def _check(scores: Tensor, what: str) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"top_k: expected {what} of a floating dtype, got {scores.dtype}")
    if scores.dim() != 2:
        raise ValueError(f"top_k: expected {what} of shape (m, n), got {tuple(scores.shape)}")


def _keys(scores: Tensor, signed: bool) -> Tensor:
    """int32 keys in the order of float32 `scores` if `signed`, else of their magnitudes."""
    if not signed:
        return scores.view(torch.int32) & _LOW31
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    return bits ^ ((bits >> 31) & _LOW31)


def _chunks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first place, float32 1-D chunk) of (m, n) scores, in row-major order; at least one."""
    m, n = scores.shape
    size = chunk_elements(scores.numel())
    if scores.is_contiguous():
        flat = scores.view(-1)
        for start in range(0, max(m * n, 1), size):
            yield start, flat[start : start + size].float()
    else:  # whole rows, at least one
        rows = max(size // max(n, 1), 1)
        for row in range(0, m, rows):
            yield row * n, scores[row : row + rows].reshape(-1).float()


def _find_cut(pieces: Sequence[Tensor], k: int, signed: bool, what: str) -> _Cut:
    """The threshold that keeps k of all pieces' scores; 0 <= k <= their number."""
    prefix, remaining = 0, k
    for level, (shift, bins) in enumerate(zip(_SHIFTS, _BINS, strict=True)):
        counts = torch.zeros(bins, dtype=torch.int64, device=pieces[0].device)
        for piece in pieces:
            for _, chunk in _chunks(piece):
                keys = _keys(chunk, signed)
                if level == 0:
                    digits = (keys >> shift).add_(bins // 2)  # from signed to 0, 1, ...
                else:
                    keys = keys[keys >> _SHIFTS[level - 1] == prefix]
                    digits = (keys >> shift).bitwise_and_(bins - 1)
                counts += torch.bincount(digits, minlength=bins).to(counts.device)
        above = counts.cpu().flip(0).cumsum(0)  # above[i]: keys with a digit >= bins - 1 - i
        # NaN and infinity have exponents of all ones. They fall in the highest 8 bins and, if
        # signed, in the lowest 8.
        if level == 0 and (int(above[7]) or (signed and int(above[-1] - above[-9]))):
            raise ValueError(f"top_k: expected finite {what}, got NaN or infinity")
        first = int((above >= remaining).nonzero()[0])
        remaining -= int(above[first - 1]) if first else 0
        digit = bins - 1 - first
        prefix = digit - bins // 2 if level == 0 else (prefix << 10) | digit
    return _Cut(prefix, remaining)


def _beyond(scores: Tensor, key: int, ties: int, signed: bool) -> Tensor:
    """Places of the scores with keys above `key` and of the first `ties` at it, ascending."""
    found = []
    for start, chunk in _chunks(scores):
        keys = _keys(chunk, signed)
        taken = keys > key
        if ties:
            equal = (keys == key).nonzero().flatten()[:ties]
            ties -= len(equal)
            taken[equal] = True
        found.append(taken.nonzero().flatten().add_(start))
    return torch.cat(found)


def _at(scores: Tensor, places: Tensor) -> Tensor:
    n = scores.shape[1]
    return scores[places // n, places % n].float()
