"""Sparsity patterns to measure on: uniform, real, and generated with the statistics of real ones.

A mask is named by a string:

- ``uniform``: every position is equally likely;
- ``q_proj`` and the other :data:`KINDS`: generated, with the statistics of that layer's real masks;
- ``real:14.q_proj``: the RoSA mask of that decoder layer (see PROVENANCE.md). It is replicated down
  and across if the requested shape is a multiple of its own.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rosa_kernels import CsrPattern

_FILE = Path(__file__).parent / "smollm2-135m_viggo_density0.006.npz"


class Spread(NamedTuple):
    """How much a layer's importance scores vary, in units of the element-wise noise.

    Rows and columns have Tukey's h distribution: a normal z is stretched to z * exp(h * z**2 / 2).
    h = 0 is normal. h = 0.25 has outliers of tens of sigmas, as the columns of real masks have.
    """

    row: float
    row_tail: float
    col: float
    col_tail: float


# Fitted at density 0.6 % to the mean over the three real masks of a kind. The fitted statistics
# are: the shares of empty rows and of empty columns; the shares of nnz in the top tenth of rows and
# of columns; the share of heavy tiles; and the CoVs of rows and columns.
KINDS: dict[str, Spread] = {
    "q_proj": Spread(2.137, 0.056, 1.703, 0.160),
    "k_proj": Spread(1.141, 0.059, 0.842, 0.176),
    "v_proj": Spread(2.511, 0.021, 3.784, 0.140),
    "o_proj": Spread(1.509, 0.019, 2.851, 0.002),
    "gate_proj": Spread(2.000, 0.051, 0.942, 0.254),
    "up_proj": Spread(2.366, 0.015, 1.105, 0.201),
    "down_proj": Spread(0.868, 0.011, 2.647, 0.005),
}


def uniform(m: int, n: int, density: float, seed: int = 0) -> CsrPattern:
    """round(density * m * n) nonzeros, every position equally likely."""
    nnz = round(density * m * n)
    flat = np.random.default_rng(seed).choice(m * n, nnz, replace=False, shuffle=False)
    return _from_flat(np.sort(flat), m, n)


def generated(kind: str, m: int, n: int, density: float, seed: int = 0) -> CsrPattern:
    """The round(density * m * n) highest entries of a random score with the statistics of `kind`.

    score_ij = exp(row * u_i + col * v_j + e_ij). u and v are the quantiles of their distributions
    in random order; e is standard normal. So masks of two seeds differ in order and noise, but are
    equally skewed. The exponential is monotone and therefore left out.
    """
    if kind not in KINDS:
        raise ValueError(f"generated: expected a layer kind among {list(KINDS)}, got {kind!r}")
    nnz = round(density * m * n)
    score = _scores(kind, m, n, seed)
    flat = np.argpartition(score, m * n - nnz)[m * n - nnz :] if nnz else np.empty(0, int)
    return _from_flat(np.sort(flat), m, n)


@lru_cache(maxsize=1)  # a suite's densities are often neighbours; 14336 x 4096 takes 235 MB
def _scores(kind: str, m: int, n: int, seed: int) -> np.ndarray:
    spread, rng = KINDS[kind], np.random.default_rng(seed)
    score = rng.standard_normal((m, n), dtype=np.float32)
    score += spread.row * rng.permutation(_tukey_h(m, spread.row_tail))[:, None]
    score += spread.col * rng.permutation(_tukey_h(n, spread.col_tail))[None, :]
    score.flags.writeable = False
    return score.ravel()


@cache
def real_names() -> tuple[str, ...]:
    """The names of the 21 real masks, as ``<decoder layer>.<kind>``."""
    return tuple(sorted(_layers(), key=lambda name: (int(name.split(".")[0]), name)))


def real(name: str) -> CsrPattern:
    """The real mask ``<decoder layer>.<kind>``, such as ``14.q_proj``."""
    if name not in _layers():
        raise ValueError(f"real: expected a mask among {list(real_names())}, got {name!r}")
    crow, col, shape = _layers()[name]
    m, n = map(int, shape)
    # The file has int16 columns, which halves it. A pattern takes int32 or int64.
    return CsrPattern(torch.from_numpy(crow), torch.from_numpy(col).int(), (m, n))


def replicate(pattern: CsrPattern, down: int, across: int) -> CsrPattern:
    """The pattern repeated `down` times below itself and `across` times beside itself."""
    m, n = pattern.shape
    rows, cols = pattern.row_indices.long(), pattern.col_indices.long()
    rows = (rows + m * torch.arange(down)[:, None, None]).expand(down, across, -1)
    cols = (cols + n * torch.arange(across)[None, :, None]).expand(down, across, -1)
    return CsrPattern.from_coo(rows.reshape(-1), cols.reshape(-1), (m * down, n * across))


@lru_cache(maxsize=2)  # the ops of one mask are neighbours in a suite; a 5 % mask is 7 MB
def pattern_of(mask: str, m: int, n: int, density: float, seed: int = 0) -> CsrPattern:
    """The pattern of a mask name at a shape.

    A real mask keeps its own density, and `density` is ignored.

    Raises:
        ValueError: the mask name is unknown, or the shape is not a multiple of the real mask's.
    """
    if mask == "uniform":
        return uniform(m, n, density, seed)
    if mask in KINDS:
        return generated(mask, m, n, density, seed)
    if mask.startswith("real:"):
        pattern = real(mask.removeprefix("real:"))
        if m % pattern.shape[0] or n % pattern.shape[1] or not m or not n:
            raise ValueError(
                f"pattern_of: expected a multiple of {mask}'s shape {pattern.shape}, got {(m, n)}"
            )
        down, across = m // pattern.shape[0], n // pattern.shape[1]
        return pattern if down == across == 1 else replicate(pattern, down, across)
    raise ValueError(
        "pattern_of: expected 'uniform', a layer kind among "
        f"{list(KINDS)} or 'real:<layer>.<kind>', got {mask!r}"
    )


def _tukey_h(count: int, h: float) -> np.ndarray:
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1)
    z = torch.special.ndtri(quantiles)
    return (z * torch.exp(h * z * z / 2)).numpy().astype(np.float32)


def _from_flat(flat: np.ndarray, m: int, n: int) -> CsrPattern:
    crow = np.searchsorted(flat, np.arange(m + 1) * n)
    col = flat % max(n, 1)
    return CsrPattern(torch.from_numpy(crow), torch.from_numpy(col), (m, n))


@cache
def _layers() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    with np.load(_FILE, allow_pickle=False) as arrays:
        names = sorted({key.rsplit(".", 1)[0] for key in arrays.files})
        return {
            f"{name.split('.')[2]}.{name.split('.')[-1]}": (
                arrays[f"{name}.crow_indices"],
                arrays[f"{name}.col_indices"],
                arrays[f"{name}.shape"],
            )
            for name in names
        }
