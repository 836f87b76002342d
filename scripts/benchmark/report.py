"""Results -> tables for the terminal, the page of all tables, and the README between its two markers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .base import COLD, OURS, TORCH, Host, Operator, Row

WIDTH = 118
PAGE = "scripts/results/README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NAMES = {
    "vllm": "vLLM", "sglang": "SGLang", "sglang_fused": "SGLang with fused SwiGLU", "deepgemm": "DeepGEMM",
    TORCH: "PyTorch",
}  # fmt: skip


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    num_texts: int = 0  # columns, the first ones, that are words and not figures

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (self.header, *self.rows)
        ]
        return "\n".join([f"\n{self.title}", *lines])

    def markdown(self) -> str:
        texts = self.num_texts
        lines = [self.header, [":---"] * texts + ["---:"] * (len(self.header) - texts), *self.rows]
        title = [f"{self.title}:", ""] if self.title else []
        return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines)])


def tables(operator: Operator, result: dict[str, Any]) -> list[Table]:
    """A table for each section of the operator that the result has, but for the sweep, which is a picture."""
    found = []
    if rows := result.get(operator.section):
        found.append(_times(operator, rows))
        if cold := [row for row in rows if COLD in row["us"]]:
            found.append(_compared("The same with a cold L2", operator, cold, COLD))
        if erring := [row for row in rows if "errors" in row]:
            found.append(_errors(operator, erring))
    if operator.kernels and (rows := result.get(operator.kernels.section)):
        found.append(_kernels(operator, rows))
    if operator.host and (us := result.get(operator.host.section)):
        found.append(_host(operator.host, us))
    return found


def _times(operator: Operator, rows: list[Row]) -> Table:
    """Ours, the others, how much faster than the best peer; the target, and other inputs, where known."""
    usual, *others = (kind for kind in rows[0]["us"] if kind != COLD)
    table = _compared(f"{operator.title}, {operator.unit}", operator, rows, usual)
    targets = any(row.get("target_us") for row in rows)
    table.header.extend([*["target", "met"] * targets, *(kind.replace("_", " ") for kind in others)])
    table.header.extend(operator.more_columns)
    for line, row in zip(table.rows, rows, strict=True):
        us, target = row["us"][usual][OURS], row.get("target_us")
        if targets:
            line += [f"{target:g}", "yes" if us <= target else "no"] if target else ["", ""]
        line += [_ratio(row["us"][kind][OURS], us) for kind in others]
        line += [cell(row) for cell in operator.more_columns.values()]
    return table


def _compared(title: str, operator: Operator, rows: list[Row], kind: str) -> Table:
    names = [name for name in (*operator.theirs, TORCH) if any(name in row["us"][kind] for row in rows)]
    lines = []
    for row in rows:
        us = row["us"][kind]
        faster = _ratio(best_other(us, operator.theirs), us[OURS])
        figures = {name: operator.figure(row, value) for name, value in us.items()}
        lines.append([*_shape(operator, row), *_us_cells(figures, [OURS, *names]), faster])
    return Table(
        title, [*operator.columns, OURS, *(NAMES.get(name, name) for name in names), "faster"], lines
    )


def _errors(operator: Operator, rows: list[Row]) -> Table:
    names = [n for n in (OURS, *operator.theirs) if any(n in row["errors"] for row in rows)]
    measures = list(rows[0]["errors"][OURS])
    lines = []
    for row in rows:
        errors = [row["errors"].get(name) for name in names]
        cells = [" / ".join(f"{1000 * e[m]:.2f}" for m in measures) if e else "-" for e in errors]
        lines.append([*_shape(operator, row), *cells])
    title = f"Error in thousandths, {' / '.join(measures)}"
    return Table(title, [*operator.columns, *(NAMES.get(name, name) for name in names)], lines)


def _kernels(operator: Operator, rows: list[Row]) -> Table:
    (kind,) = rows[0]["us"]
    names = list(dict.fromkeys(name for row in rows for name in row["us"][kind] if name != OURS))
    lines = [[*_shape(operator, row), *_us_cells(row["us"][kind], [OURS, *names])] for row in rows]
    return Table("Each kernel alone, us", [*operator.columns, "planned", *names], lines)


def _host(host: Host, us: dict[str, float]) -> Table:
    vllm = us.get("vllm")
    lines = []
    for call, value in us.items():
        ratio = value / vllm if vllm else None
        target = host.targets.get(call)
        met = "" if target is None or ratio is None else "yes" if ratio <= target else "no"
        lines.append(
            [_call_name(call), _us(value), _ratio(value, vllm), f"{target:g} x" if target else "", met]
        )
    return Table(
        f"Host time of a call, us ({host.title})", ["call", "us", "of vLLM's", "target", "met"], lines, 1
    )


def _call_name(call: str) -> str:
    name, comma, rest = call.partition(",")
    return NAMES.get(name, name) + comma + rest


def _shape(operator: Operator, row: Row) -> list[str]:
    return [" x ".join(str(row[field]) for field in fields) for fields in operator.columns.values()]


def best_other(us: dict[str, float], others: Iterable[str]) -> float | None:
    return min((us[name] for name in others if name in us), default=None)


def _ratio(us: float | None, to: float | None) -> str:
    return f"{us / to:.2f} x" if us and to else "-"


def _us(value: float | None) -> str:
    return (
        "-"
        if value is None
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def _us_cells(us: dict[str, float], names: list[str]) -> list[str]:
    return [_us(us.get(name)) for name in names]


def conditions(result: dict[str, Any]) -> str:
    """Where and when the figures come from."""
    e = result["environment"]
    peers = [f"{NAMES.get(name, name)} {version}".strip() for name, version in e["peers"].items()]
    parts = [
        e["gpu"], f"driver {e['driver']}", f"CUDA {e['cuda']}", f"torch {e['torch']}", f"CuPy {e['cupy']}",
        f"NVRTC {e['nvrtc']}", f"cupy_moe {e['cupy_moe']}", *peers, e["date"],
    ]  # fmt: skip
    return ", ".join(parts) + "."


def floor(result: dict[str, Any]) -> str:
    """What an empty kernel takes there."""
    floor = ", ".join(f"{_us(us)} us with {what}" for what, us in result.get("floor", {}).items())
    return f"An empty kernel takes {floor}." if floor else ""


def page(operators: Sequence[Operator], result: dict[str, Any], pictures: Mapping[str, str]) -> str:
    """All tables. `pictures` are there by their ending, as the page refers to them."""
    paragraphs = [
        "# Times of the operators",
        _filled(
            "Written by `scripts/bench --readme`, which compares every result with the specification before"
            f" it times any, and replaces this page. {conditions(result)} {floor(result)}"
        ),
        _filled(
            "GPU times are medians over replays of a CUDA graph of 20 calls, or fewer long ones, warm L2, all"
            " libraries in turn in one process. PyTorch's is that of the specification, called eagerly: from"
            ' its start to its end on the GPU. "faster" is against the best other library, PyTorch aside.'
            " Targets are for an H200."
        ),
    ]
    for operator in operators:
        parts = [*_images(operator, pictures), *(t.markdown() for t in tables(operator, result))]
        if parts:
            paragraphs += [
                f"## {operator.function}",
                *([_filled(operator.note)] if operator.note else []),
                *parts,
            ]
    return "\n\n".join(paragraphs) + "\n"


def readme_section(operators: Sequence[Operator], result: dict[str, Any], pictures: Mapping[str, str]) -> str:
    """The pictures, and one table of the most telling cases."""
    intro = (
        "Times of a call on the GPU, those of a row in one process; all tables, and how they are measured: "
    )
    intro += f"`{PAGE}`."
    lines = []
    for operator in operators:
        for row in result.get(operator.section, ()):
            if any(_is_of(row, case) for case in operator.telling):
                us = next(iter(row["us"].values()))
                best = best_other(us, operator.theirs)
                cells = [f"`{operator.function}`", operator.size.format_map(row), _us(us[OURS]), _us(best)]
                lines.append([*cells, _ratio(best, us[OURS])])
    table = Table("", ["operator", "size", f"{OURS}, us", "best other, us", "faster"], lines, 2)
    images = "\n".join(image for operator in operators for image in _images(operator, pictures))
    parts = _filled(conditions(result)), images, _filled(intro), table.markdown()
    return "\n\n".join(filter(None, parts))


def _is_of(row: Row, case: Any) -> bool:
    """Whether the row is of this case, whatever its target was."""
    return all(row.get(field) == size for field, size in case._asdict().items() if field != "target_us")


def _images(operator: Operator, pictures: Mapping[str, str]) -> list[str]:
    return [f"![{p.text}]({pictures[p.ending]})" for p in operator.pictures if p.ending in pictures]


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def replace_section(text: str, section: str) -> str:
    """The README with a new section between its markers. Raises ValueError unless there is one pair."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
