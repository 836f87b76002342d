"""The command line called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from cupy_moe.images import sources
from cupy_moe.tools.cli import main


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def invoke_json(*arguments: str | Path, code: int = 0) -> Any:
    value = json.loads(invoke(*arguments, "--json", code=code).stdout)
    assert value["schema"] == sources.SCHEMA
    return value


def doctor(code: int = 0) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for check in invoke_json("doctor", code=code)["checks"]:
        found.setdefault(check["subject"], []).append((check["status"], check["finding"]))
    return found
