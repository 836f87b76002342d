"""The table of scripts/mutants fits the sources; running it takes half an hour."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_has_one_place() -> None:
    spec = importlib.util.spec_from_file_location("_mutants", ROOT / "scripts" / "_mutants.py")
    assert spec
    assert spec.loader
    module = sys.modules["_mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for mutant in module.MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.before) == 1, mutant.what
        assert mutant.before != mutant.after, mutant.what
    assert len(module.MUTANTS) > 150
