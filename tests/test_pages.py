"""Whether pages say what is there: each block of code runs or is checked by its kind, each name exists."""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any

import click
import moe_layer
import pytest
import torch
from test_packaging import LAYERS

import cupy_moe
from cupy_moe import config
from cupy_moe.errors import ConfigError
from cupy_moe.images import folders, prebuild, sources, store, targets
from cupy_moe.tools import cli, demo

ROOT = Path(__file__).parents[1]
PAGES = [
    name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "cache/README.md",
        "kernels_cu/README.md",
        "scripts/scaling/README.md",
        "scripts/results/README.md",
    )
    if name != "scripts/results/README.md" or (ROOT / name).exists()
]
MADE = {"dist/"}  # by scripts
BENCH = re.compile(r"<!-- bench:begin -->.*<!-- bench:end -->\n", re.DOTALL)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    """Without what scripts/bench has written."""
    return BENCH.sub("", (ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str, kind: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text_of(page)) if found == kind]


def blocks_of(kind: str) -> list[tuple[str, str]]:
    return [(page, body) for page in PAGES for body in blocks(page, kind)]


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_and_blocks_of_a_kind_that_is_checked(page: str) -> None:
    text = text_of(page)
    rows = "|" if page.startswith("scripts/results") else None  # of tables that a script writes
    long = [line for line in text.splitlines() if len(line) > 120]
    assert [line for line in long if rows is None or not line.startswith(rows)] == []
    assert {kind for kind, _ in BLOCK.findall(text)} <= {"python", "sh", "dockerfile", "cuda", ""}
    assert text.count("\n```") == 2 * len(BLOCK.findall(text))


@pytest.mark.parametrize("page", PAGES)
def test_names_of_files_exist(page: str) -> None:
    text = text_of(page)
    introduced = set(new_files()) if page == "kernels_cu/README.md" else set()
    prose = BLOCK.sub("", text)
    names = set(re.findall(r"`([\w.-]+/[\w./-]*)`", prose)) - MADE - introduced
    names |= set(re.findall(r"`([\w.-]+\.(?:md|toml))`", prose))
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_no_link_of_the_readme_is_relative() -> None:
    """A package index shows it, and has no files that a link could lead to."""
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text_of("README.md")) == []


# ---- commands


def check_command(line: str) -> None:
    """That a command can be given as it is written."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):
        name = words.pop(0).partition("=")[0]
        assert name in (*config.VARIABLES, *config.OF_SCRIPTS), line
    if not words:
        return
    program, *arguments = words
    if program == "cupy-moe":
        parse(arguments)
    elif program == "pip":
        assert arguments[0] == "install", line
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            project = (ROOT / "pyproject.toml").read_text()
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(",")), line
    elif program != "python":  # somebody's server
        path = ROOT / program.removeprefix("/src/")
        assert "scripts/" in program, line
        assert os.access(path, os.X_OK), line


def parse(arguments: list[str]) -> None:
    """Raises what the command line says of wrong usage, and runs nothing. A command alone is but named."""
    with cli.main.make_context("cupy-moe", list(arguments)) as parent:
        name, command, rest = cli.main.resolve_command(parent, arguments)
        assert name, arguments
        assert command, arguments
        if not rest:
            return
        given = command.make_context(name, rest, parent=parent).params
    for arch in given.get("arch") or () if name == "prebuild" else ():
        assert arch in ("all", "native") or targets.parse_target(arch)


def commands() -> Iterator[tuple[str, str]]:
    for page, body in blocks_of("sh"):
        yield from ((page, line) for line in body.splitlines())
    for page in PAGES:
        for command in re.findall(r"`(cupy-moe\s[^`]+)`", BLOCK.sub("", text_of(page))):
            yield page, " ".join(command.split())


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_a_command_can_be_given_as_written(page: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "cupy-moe prebuilt --arch sm_90",
        "cupy-moe prebuild --architecture sm_90",
        "cupy-moe prebuild --arch sm_91",
        "CUPY_MOE_NO_SUCH=1 cupy-moe path",
        "scripts/nothing",
        'pip install ".[cuda11]"',
    ],
)
def test_a_command_that_cannot_be_given_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, ConfigError, click.UsageError)):
        check_command(line)


@pytest.mark.parametrize(("page", "body"), blocks_of("dockerfile"))
def test_instructions_of_a_dockerfile(page: str, body: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)", body, re.MULTILINE)
    for line in filter(None, body.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "RUN":
            check_command(rest)
            for name in re.findall(r"(?<= )[\w-]+", rest.partition("pip install")[2]):
                assert f'"{name}' in project, line
        elif instruction == "ENV":
            assert rest.partition("=")[0] in config.VARIABLES, line
        elif instruction == "COPY" and "--from=" in rest:
            assert rest.partition("--from=")[2].split()[0] in stages, line
        else:
            assert instruction in ("FROM", "COPY", "#"), line


# ---- README.md


def test_examples_of_the_readme_run_without_a_gpu() -> None:
    names: dict[str, Any] = {}
    exec("".join(blocks("README.md", "python")).replace('device="cuda"', 'device="cpu"'), names)
    assert len(names["sorted_ids"]) == 8192 + 64 * 127
    assert len(names["expert_ids"]) == 128
    assert 8192 <= int(names["post_pad"]) <= len(names["sorted_ids"])

    generator = torch.Generator().manual_seed(0)
    for tokens in (0, 1, 50):
        shapes = (tokens, 32), (8, 32), (8, 2 * 16, 32), (8, 32, 16)
        a, b, c, d = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        expected = moe_layer.loop_over_experts(a, b, c, d, 2)
        a, b, c, d = (tensor.half() for tensor in (a, b, c, d))
        torch.testing.assert_close(names["moe_layer"](a, b, c, d, 2).float(), expected, rtol=0.01, atol=0.003)


def test_the_worked_example_is_what_the_demo_shows(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_example("cpu")
    shown = click.unstyle(capsys.readouterr().out)
    (example,) = (body for body in blocks("README.md", "") if body.startswith("topk_ids"))
    head, _, table = example.partition("\n\n")
    assert [line for line in table.splitlines() if line not in shown.splitlines()] == []
    words = (" ".join(text.split()) for text in (head, shown))
    said, told = (re.findall(r"num_tokens_post_pad (\d+)", text) for text in words)
    assert said == told
    ids = [re.findall(r"\[.*?\]", text) for text in (head, shown)]
    assert ids[0] == [row.lstrip("[") if row.startswith("[[") else row for row in ids[1]][: len(ids[0])]


def test_readme_states_the_oldest_versions() -> None:
    install = text_of("README.md").partition("## Install")[2].partition("## Use")[0]
    project = (ROOT / "pyproject.toml").read_text()
    for label, requirement in (
        ("| Python, on Linux | ", 'requires-python = ">='),
        ("| torch | ", '"torch>='),
        ("| CuPy | ", '"cupy-cuda12x>='),
        (" for CUDA 12, ", '"cupy-cuda13x>='),
    ):
        assert label + project.partition(requirement)[2].partition('"')[0] in install


def test_readme_names_every_function() -> None:
    text = text_of("README.md") + text_of("cache/README.md")
    public = [name for name in cupy_moe.__all__ if name[0].islower()]
    assert [name for name in public if f"`{name}`" not in text and f"`cupy_moe.{name}" not in text] == []


def test_readme_names_every_page() -> None:
    text = text_of("README.md")
    own = ("README.md", "scripts/results/README.md")
    assert [name for name in PAGES if f"`{name}`" not in text and name not in own] == []


# ---- the other pages


def test_every_script_is_named() -> None:
    text = text_of("CONTRIBUTING.md")
    files = (path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.name[0] not in "._")
    assert [path.name for path in files if f"| `scripts/{path.name}`" not in text] == []


def test_every_command_and_variable_is_named() -> None:
    text = text_of("cache/README.md")
    assert [name for name in cli.main.commands if f"| `{name}" not in text] == []
    assert [name for name in config.VARIABLES if f"| `{name}" not in text] == []
    assert [name for name in config.OF_SCRIPTS if f"`{name}" not in text] == []


def test_every_target_is_named() -> None:
    text = " ".join(text_of("cache/README.md").split())
    listed = ", ".join(f"`{target}`" for target in targets.TARGETS)
    assert f"made for {listed} and `{targets.PTX_TARGET}`" in text
    numbers = [targets.number(target) for target in targets.TARGETS]
    *most, last = (f"{number // 10}.{number % 10}" for number in numbers)
    assert f"compute capability {', '.join(most)} and {last}, and PTX" in text


def test_the_layout_of_a_folder_is_as_shown() -> None:
    (shown,) = (body for body in blocks("cache/README.md", "") if body.startswith("<root>"))
    for line in shown.splitlines():
        root, layout, target, name = line.split()[0].split("/")
        assert (root, layout) == ("<root>", folders.LAYOUT)
        assert folders.TARGET.fullmatch(target)
        match = store.FILE.fullmatch(name)
        assert match or name == prebuild.MANIFEST
        if match:
            assert match["unit"] in sources.units()
            assert match["suffix"] in (".json", store.suffix(target))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_map_names_what_is_there(page: str) -> None:
    (shown,) = (body for body in blocks(page, "") if body.startswith("moe_align_block_size("))
    names = re.findall(r"  (\w+/(?:\w+\.py)?)  ", shown)
    assert len(names) >= 6
    assert [name for name in names if not (ROOT / "cupy_moe" / name).exists()] == []


def test_the_table_of_layers_is_what_is_held() -> None:
    rows = re.findall(r"^\| `cupy_moe/(\w+)/` \| .* \| (.*) \|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    said = {name: set(may.split(", ")) - {"nothing"} for name, may in rows}
    assert said == LAYERS


# ---- the walk-through of kernels_cu/README.md: files that it shows, and two lines of one that is there


def new_files() -> dict[str, str]:
    text = text_of("kernels_cu/README.md")
    return dict(re.findall(r"^\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


def test_every_block_of_the_walk_through_is_used() -> None:
    files = new_files()
    assert {Path(name).suffix for name in files} == {".py", ".cu"}
    rest = [
        body
        for kind in ("python", "cuda")
        for body in blocks("kernels_cu/README.md", kind)
        if body not in files.values()
    ]
    *lines, _ = rest
    assert len(lines) == 2
    assert all(line.startswith("    ") and line.count("\n") == 1 for line in lines)


def test_lines_that_a_unit_may_have() -> None:
    (lines,) = (body for body in blocks("kernels_cu/README.md", "cuda") if "#include" not in body)
    said = {
        key.decode(): words.decode().split() for key, words in sources._SAYS.findall(b"\n" + lines.encode())
    }
    assert set(said["targets"]) <= set(targets.SPECIFIC_TARGETS)
    assert said["options"]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has followed the walk-through."""
    root = tmp_path_factory.mktemp("followed")
    for name in ("cupy_moe", "kernels_cu", "tests", "scripts"):
        copytree(ROOT / name, root / name, ignore=ignore_patterns("__pycache__"))
    copy(ROOT / "pyproject.toml", root)
    for name, body in new_files().items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(body, encoding="utf-8")
    init = root / "cupy_moe" / "__init__.py"
    text = init.read_text()
    for line in (body for body in blocks("kernels_cu/README.md", "python") if body.startswith("    ")):
        begin = "_MODULES = {\n" if line.strip().startswith('"') else "if TYPE_CHECKING:\n"
        assert text.count(begin) == 1
        text = text.replace(begin, begin + line)
    init.write_text(text)
    return root


def run_in(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_the_operator_of_the_walk_through_passes_its_tests(followed: Path) -> None:
    files = (
        "tests/test_count_experts.py",
        "tests/test_structs.py",
        "tests/test_arguments.py",
        "tests/test_bench.py",
    )
    names = "count or declared or fields or constants or every_function or every_operator"
    chosen = (*files, "-k", names)
    run = run_in(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[1-9]\d+ passed", run.stdout), run.stdout
    examples = "import doctest, torch, cupy_moe.operators.count_experts as m; m.torch = torch\n"
    run = run_in(followed, "-c", f"{examples}print(doctest.testmod(m))")
    assert run.stdout.strip() == "TestResults(failed=0, attempted=1)", run.stdout + run.stderr


def test_the_unit_of_the_walk_through_compiles_for_every_target(followed: Path) -> None:
    (line,) = (line for body in blocks("kernels_cu/README.md", "sh") for line in body.splitlines())
    run = run_in(followed, "-m", "cupy_moe", *shlex.split(line)[1:])
    assert run.returncode == 0, run.stdout + run.stderr
    built = re.findall(r"^(sm_\w+) +count_experts +built +1 ", run.stdout, re.MULTILINE)
    assert built == [target for target in targets.TARGETS if target in built] != []
    figures = re.findall(r"^sm_\w+ +count_experts +\d+ +(\d+) ", run.stdout, re.MULTILINE)
    assert figures == ["0"] * len(built), "spills"


# ---- docstrings


DOCUMENTED = [name for name in cupy_moe.__all__ if ">>>" in (getattr(cupy_moe, name).__doc__ or "")]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_docstrings(name: str) -> None:
    function = getattr(cupy_moe, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, globs={"torch": torch, name: function})
    done = doctest.DocTestRunner().run(test)
    assert done.attempted > 0
    assert done.failed == 0


def test_every_operator_has_an_example() -> None:
    operators = {name for name, home in cupy_moe._HOME.items() if home.startswith("operators.")}
    assert {name for name in operators if name.islower()} <= set(DOCUMENTED)


def test_type_checkers_are_told_of_the_names_that_there_are() -> None:
    tree = ast.parse(Path(cupy_moe.__file__).read_text(encoding="utf-8"))
    told = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert {name: told[name] for name in cupy_moe._HOME} == cupy_moe._HOME
    assert told.keys() == set(cupy_moe.__all__)
