"""The benchmark behind `scripts/bench`.

A family of operators has a file, of the name that it has in cupy_moe/operators, with all that is known of
it: what is measured and the times to reach, its inputs, who computes it, what is a wrong result, and how its
table looks. Such a file is found by its `OPERATORS`; nothing else names it. experts_quantized.py has the
experts with quantised weights, and transformers.py a model that runs on our experts.

base.py        what an operator has to say of itself
measure.py     checks and times of any operator
timing.py      microseconds on the GPU and on the host
peers.py       the libraries to compare with
report.py      tables for the terminal and for the two pages
plot.py        pictures of times
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Operator


def discover() -> list[Operator]:
    """All operators, by family and in the order in which its file has them."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names if name != "__main__"]
    return [operator for module in modules for operator in getattr(module, "OPERATORS", ())]
