"""How a method's trainable parameters are divided among the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from rosa_kernels.bounds import FRACTION_BELOW_1, NON_NEGATIVE_INTEGER, OPEN_FRACTION
from rosa_kernels.masks.targets import check_pattern, pattern_key
from rosa_train.methods.method import METHODS, Method, method_named

# The rank of LoRA in the first row of the paper's table of equal budgets.
DEFAULT_RANK = 16

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}

Shapes = Mapping[str, tuple[int, int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Allocation:
    """The rank and the number of nonzeros of each layer.

    Attributes:
        ranks: the rank of each layer's low-rank branch, or 0 if the layer has none.
        nnz: the number of nonzeros of each layer's sparse branch, or 0 if the layer has none.
        trainable: the number of trainable parameters in all layers together.
    """

    ranks: dict[str, int]
    nnz: dict[str, int]
    trainable: int


def allocate(
    method: str | Method,
    shapes: Shapes,
    *,
    rank: int | None = None,
    density: float | None = None,
    budget: int | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    density_pattern: Mapping[str, float] | None = None,
) -> Allocation:
    """The rank and nonzeros of each layer, from a rank and a density, or from a budget.

    With a density d, an (m, n) layer gets floor(d m n) nonzeros (Algorithm 1 of the paper). With a
    budget of trainable parameters, every layer gets the same rank and, except for rounding, the
    same density:

    - A method with only a low-rank branch gets the rank, at least 1, whose parameter count is
      nearest to the budget. ``trainable`` is the count that results.
    - A method with only a sparse branch meets the budget exactly, by largest remainders.
    - A method with both gets the `rank` that is given. Without one, it gets the rank that fills
      half of the budget, rounded down, but at least 1 (as in the paper). Nonzeros fill exactly
      the rest.

    With none of the three, the budget is that of LoRA at rank 16. The method ``full`` ignores the
    budget, and its ``trainable`` is the number of elements of `shapes`.

    Args:
        method: a method or its name.
        shapes: the shape (m, n) of each layer, by the layer's name.
        rank: the rank of every layer.
        density: the share of each layer's elements that train in S, in (0, 1).
        budget: a number of parameters (``1500000``, ``"1.5M"``), or a share of the elements of
            `shapes` (``"1%"``).
        rank_pattern, density_pattern: another rank or density for some layers. The key is a
            regular expression that must match the end of a layer's name, and the first such key
            is taken. A density may be 0 here. These layers are paid from the budget first.

    Raises:
        ValueError: the method is unknown. A rank or density is out of range, or the method lacks
            its branch. Layers have neither branch. A pattern matches no layer. A budget is
            malformed, or cannot be met; the message has the smallest or largest that can.
    """
    method = method_named(method)
    rank_pattern, density_pattern = dict(rank_pattern or {}), dict(density_pattern or {})
    if not shapes:
        raise ValueError("allocate: expected the shapes of some layers, got none")
    _check_arguments(method, rank, density, budget, rank_pattern, density_pattern)
    if method.full:
        elements = sum(m * n for m, n in shapes.values())
        return Allocation(dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0), elements)
    ranks = _from_pattern(rank_pattern, shapes, "rank_pattern")
    densities = _from_pattern(density_pattern, shapes, "density_pattern")
    nnz = {name: _nnz_at(d, shapes[name]) for name, d in densities.items()}

    if rank is None and density is None and budget is None:
        budget = sum(METHODS["lora"].rank_cost(m, n) for m, n in shapes.values()) * DEFAULT_RANK
    if budget is None:
        ranks = dict.fromkeys(shapes, rank or 0) | ranks
        if density is not None:
            nnz = {name: _nnz_at(density, shape) for name, shape in shapes.items()} | nnz
    else:
        left = parse_budget(budget, sum(map(_elements, shapes.values())))
        _spend(method, shapes, left, rank, ranks, nnz)
    ranks = {name: int(ranks.get(name, 0)) for name in shapes}
    nnz = {name: int(nnz.get(name, 0)) for name in shapes}
    _check_something(method, ranks, nnz)
    trainable = _low_rank_count(method, shapes, ranks) + sum(nnz.values())
    return Allocation(ranks, nnz, trainable)


def parse_budget(budget: int | str, total: int) -> int:
    """A budget as a number of parameters: ``"1%"`` of `total`, ``"1.5M"``, ``"200K"`` or 12345.

    Raises:
        ValueError: the budget has another form, or is less than one parameter.
    """
    expected = "expected a budget like '1%', '1.5M' or 200000"
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise ValueError(f"budget: {expected}, got {budget!r}")
    if isinstance(budget, int):
        count = budget
    else:
        text = budget.strip().lower().replace(",", "").replace("_", "")
        unit = text[-1:] if text[-1:] in ("%", "k", "m", "b") else ""
        try:
            number = Fraction(text.removesuffix(unit))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"budget: {expected}, got {budget!r}") from None
        count = math.floor(number * total / 100 if unit == "%" else number * _UNITS[unit])
    if count < 1:
        raise ValueError(f"budget: expected at least one parameter, got {budget!r} = {count}")
    return count


def spread(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Splits `total` into integers in proportion to `weights`, by largest remainders.

    Each part is rounded down, and the parts with the largest remainders get one more. Ties go in
    the order of `weights`.
    """
    whole = sum(weights.values())
    parts = {name: total * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % whole))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _spend(
    method: Method,
    shapes: Shapes,
    budget: int,
    rank: int | None,
    ranks: dict[str, int],
    nnz: dict[str, int],
) -> None:
    """Add the missing layers to `ranks` and `nnz`, so that all layers together cost `budget`."""
    fixed_low_rank = _low_rank_count(method, shapes, ranks)
    fixed = fixed_low_rank + sum(nnz.values())
    free_ranks = [name for name in shapes if method.low_rank and name not in ranks]
    free_nnz = {
        name: _elements(shape)
        for name, shape in shapes.items()
        if method.sparse and name not in nnz
    }
    per_rank = sum(method.rank_cost(*shapes[name]) for name in free_ranks)
    top_rank = min((min(shapes[name]) for name in free_ranks), default=0)
    most_nnz = sum(free_nnz.values()) - len(free_nnz)
    if rank is not None:
        lowest_rank = highest_rank = rank
    else:
        lowest_rank, highest_rank = (1, top_rank) if free_ranks else (0, 0)
    smallest = fixed + lowest_rank * per_rank + (1 if free_nnz else 0)
    largest = fixed + highest_rank * per_rank + max(most_nnz, 0)
    left = budget - fixed
    if per_rank and rank is None and not free_nnz:
        # A budget of half of rank 1 still rounds up to rank 1.
        reachable = 2 * left >= per_rank and budget <= largest + per_rank // 2
    elif not free_nnz:
        reachable = budget == smallest
    else:
        reachable = smallest <= budget <= largest
    if not reachable:
        end = (
            f"at least {smallest:,}" if budget < smallest else f"at most {largest:,}"
        ) + " trainable parameters"
        raise ValueError(
            f"budget: expected {end} for {method.name} on these {len(shapes)} layers, "
            f"got {budget:,}"
        )
    if per_rank and rank is None:
        if free_nnz:
            rank = min(max(budget // 2 - fixed_low_rank, 0) // per_rank, top_rank)
            # The mask must have room for the rest.
            rank = max(rank, 1, -(-(left - most_nnz) // per_rank))
        else:
            rank = min(max((2 * left + per_rank) // (2 * per_rank), 1), top_rank)
    ranks |= dict.fromkeys(free_ranks, rank or 0)
    if free_nnz:
        nnz |= spread(left - (rank or 0) * per_rank, free_nnz)


def _check_arguments(
    method: Method,
    rank: int | None,
    density: float | None,
    budget: int | str | None,
    rank_pattern: Mapping[str, int],
    density_pattern: Mapping[str, float],
) -> None:
    named = {"rank": rank, **{f"rank_pattern[{k!r}]": r for k, r in rank_pattern.items()}}
    for what, value in named.items():
        if value is not None:
            NON_NEGATIVE_INTEGER.check(what, value)
        if value and not method.low_rank:
            raise ValueError(f"{what}: expected none for {method.name}, got {value}")
    shares = {"density": density}
    shares |= {f"density_pattern[{k!r}]": d for k, d in density_pattern.items()}
    for what, share in shares.items():
        if share is None:
            continue
        (OPEN_FRACTION if what == "density" else FRACTION_BELOW_1).check(what, share)
        if not method.sparse:
            raise ValueError(f"{what}: expected none for {method.name}, got {share}")
    if density is not None and budget is not None:
        raise ValueError(
            f"budget: expected it without a density, got budget {budget!r} and density {density}"
        )
    if method.full:
        return
    if rank is not None and budget is not None and not method.sparse:
        raise ValueError(
            f"budget: expected it without a rank for {method.name}, got budget {budget!r} and "
            f"rank {rank}"
        )
    if budget is None and method.low_rank and method.sparse and (rank is None) != (density is None):
        raise ValueError(
            f"{method.name}: expected a rank and a density, or a budget, got rank {rank} and "
            f"density {density}"
        )
    if rank == 0 and not method.sparse:
        raise ValueError(f"rank: expected at least 1 for {method.name}, got 0 and no sparse branch")


def _check_something(method: Method, ranks: Mapping[str, int], nnz: Mapping[str, int]) -> None:
    bare = [name for name in ranks if not ranks[name] and not nnz[name]]
    # A layer may be too small for a nonzero at this density. If all layers are, it is a mistake.
    if len(bare) == len(ranks) or (bare and not method.sparse):
        raise ValueError(
            f"{method.name}: expected a rank or nonzeros, got rank 0 and no nonzeros in "
            f"{len(bare)} of {len(ranks)} layers, the first of them {bare[0]}"
        )


def _from_pattern(pattern: Mapping[str, T], shapes: Shapes, what: str) -> dict[str, T]:
    check_pattern(pattern, shapes, what)
    found = {n: k for n in shapes if (k := pattern_key(pattern, n)) is not None}
    return {name: pattern[key] for name, key in found.items()}


def _nnz_at(density: float, shape: tuple[int, int]) -> int:
    # Exact decimal arithmetic: floor(0.29 * 100) is 28 in floating point, but 29 in decimal.
    return math.floor(Fraction(repr(float(density))) * _elements(shape))


def _elements(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _low_rank_count(method: Method, shapes: Shapes, ranks: Mapping[str, int]) -> int:
    return sum(rank * method.rank_cost(*shapes[name]) for name, rank in ranks.items())
