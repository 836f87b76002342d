"""What numbers may be: ints, floats and bools of any library, but no arrays, which may lie on a GPU.

Errors name the argument, what was expected and what was given. No torch, no CuPy.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

INT32_MAX = 2**31 - 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def as_int(name: str, value: Any) -> int:
    """The value as an int: from whatever has `__index__`, but for bools and arrays (of a GPU, perhaps)."""
    if not isinstance(value, bool) and not hasattr(value, "__dlpack__"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an int, got {kind_of(value)}")


def as_float(name: str, value: Any) -> float:
    """The value as a float: from any real number that is no bool and no array."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a float, got {kind_of(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that fp32 has, got {value}") from None


def as_bool(name: str, value: Any) -> bool:
    """The value as a bool: from 0, 1 and the bools of other libraries."""
    is_bool = type(value).__name__ in ("bool", "bool_")
    if is_bool or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}: expected a bool, got {kind_of(value)}")


def check_range(name: str, value: int, most: int, least: int = 1) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """That the value is one of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def kind_of(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_fp32(name: str, value: float) -> None:
    """Raises ValueError for a number that fp32 does not have; infinities and NaN it has."""
    if math.isfinite(value) and abs(value) > FLOAT32_MAX:
        raise ValueError(f"{name}: expected a number that fp32 has, got {value}")
