"""`import cupy_moe.ops` registers every operator as `torch.ops.cupy_moe.*`.

Looking one up in `cupy_moe` registers it, too; this is for processes that name none, such as those that load
a program of torch.export.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import operators

for _module in pkgutil.iter_modules(operators.__path__, f"{operators.__name__}."):
    importlib.import_module(_module.name)
