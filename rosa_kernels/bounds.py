"""Ranges of arguments: what an error calls each range, and the test for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Bound:
    """A range that an argument must be in.

    Attributes:
        words: what an error says after "expected".
        holds: the test. It may be called with a value of any type.
    """

    words: str
    holds: Callable[[Any], bool]

    def check(self, what: str, value: Any, name: str = "") -> Any:
        """The value; a number of numpy becomes Python's.

        Raises:
            ValueError: the value is out of range. The text is
                `what: expected [name to be] words, got value`.
        """
        if not self.holds(value):
            expected = f"{name} to be {self.words}" if name else self.words
            raise ValueError(f"{what}: expected {expected}, got {value!r}")
        if isinstance(value, int | float) or not isinstance(value, Real):
            return value
        return int(value) if isinstance(value, Integral) else float(value)


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or numpy that fits int64, and no bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value).bit_length() < 64


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of Python or numpy, and no bool."""
    if isinstance(value, Integral):  # one of more than 308 digits has no float
        return is_integer(value)
    # Dynamo cannot trace math.isfinite of a float that changes between calls.
    return isinstance(value, Real) and -math.inf < value < math.inf  # type: ignore[operator]


def is_regex(rule: str) -> bool:
    """Whether a string is a regular expression, and not a name. A name may have dots."""
    return re.search(r"[*+?()\[\]|^$\\{]", rule) is not None


POSITIVE_INTEGER = Bound("a positive integer", lambda value: is_integer(value) and value > 0)
NON_NEGATIVE_INTEGER = Bound("an integer >= 0", lambda value: is_integer(value) and value >= 0)
FINITE = Bound("a finite number", is_number)
POSITIVE = Bound("a number > 0", lambda value: is_number(value) and value > 0)
NON_NEGATIVE = Bound("a number >= 0", lambda value: is_number(value) and value >= 0)
FRACTION = Bound("a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
FRACTION_BELOW_1 = Bound("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
OPEN_FRACTION = Bound("a number in (0, 1)", lambda value: is_number(value) and 0 < value < 1)
