"""Experts on several ranks: `python -m scaling` measures them, `scaling.simulate` reckons with more."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """The experts of a layer."""

    experts: int
    topk: int
    hidden: int
    inner: int


SHAPES = {
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "qwen3-235b": Shape(128, 8, 4096, 1536),
}
