"""Results -> tables, for the terminal and for the README between its two markers."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

from .cases import HOST, HOST_TARGETS, NUM_GROUPS, TOPK_GROUP
from .measure import OURS, TORCH, Row

README_WIDTH = 118
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NAMES = {"vllm": "vLLM", "sglang": "SGLang", TORCH: "PyTorch"}


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (self.header, *self.rows)
        ]
        return "\n".join([f"\n{self.title}", *lines])

    def markdown(self) -> str:
        lines = [self.header, ["---:"] * len(self.header), *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(result: dict[str, Any]) -> list[Table]:
    """A table for each section that the result has."""
    peers = list(result["environment"]["peers"])
    found = []
    if rows := result.get("align"):
        names = [*peers, TORCH]
        found.append(_times("moe_align_block_size, us of GPU time", ALIGN_COLUMNS, rows, names))
        if cold := [row for row in rows if "cold" in row["us"]]:
            found.append(_times("The same with a cold L2", ALIGN_COLUMNS, cold, peers, "cold"))
    if rows := result.get("kernels"):
        kernels = list(dict.fromkeys(name for row in rows for name in row["us"]["uniform"] if name != OURS))
        lines = [
            [*_shape(ALIGN_COLUMNS, row), *_us_cells(row["us"]["uniform"], [OURS, *kernels])] for row in rows
        ]
        found.append(Table("Each kernel alone, us", [*ALIGN_COLUMNS, "planned", *kernels], lines))
    if rows := result.get("sum"):
        table = _times("moe_sum, bf16, us of GPU time", SUM_COLUMNS, rows, peers)
        table.header.append("TB/s")
        for line, row in zip(table.rows, rows, strict=True):
            line.append(_terabytes(row))
        found.append(table)
    for section, title in GATE_TITLES.items():
        if rows := result.get(section):
            found.append(_times(f"{title}, us of GPU time", GATE_COLUMNS, rows, peers))
    if host := result.get("host"):
        found.append(_host(host))
    return found


def _tokens_by(*fields: str) -> Any:
    return lambda row: " x ".join(str(row[field]) for field in ("tokens", *fields))


def _terabytes(row: Row) -> str:
    moved = 2 * row["tokens"] * row["hidden"] * (row["topk"] + 1)
    return f"{moved / row['us']['random'][OURS] / 1e6:.2f}"


# Heading -> the cell of a row.
ALIGN_COLUMNS = {
    "tokens x topk": _tokens_by("topk"),
    "experts": lambda row: str(row["experts"]),
    "block": lambda row: str(row["block_size"]),
}
SUM_COLUMNS = {"tokens x topk x hidden": _tokens_by("topk", "hidden")}
GATE_TITLES = {
    "gate": "topk_softmax, fp32, renormalized",
    "sigmoid": "topk_sigmoid, fp32, renormalized, with a bias",
    "grouped": f"grouped_topk, sigmoid, fp32, renormalized, with a bias, {TOPK_GROUP} of {NUM_GROUPS} groups",
}
GATE_COLUMNS = {"tokens x experts": _tokens_by("experts"), "topk": lambda row: str(row["topk"])}


def _shape(columns: dict[str, Any], row: Row) -> list[str]:
    return [cell(row) for cell in columns.values()]


def _times(title: str, columns: dict[str, Any], rows: list[Row], others: list[str], kind: str = "") -> Table:
    """Ours, the others, how much faster than the best peer; the target, and what skew costs, where known."""
    header = [*columns, OURS, *(NAMES[name] for name in others), "faster"]
    peers = [name for name in others if name != TORCH]
    targets = any(row.get("target_us") for row in rows) and kind != "cold"
    skews = kind != "cold" and "skewed" in rows[0]["us"]
    header += ["target", "met"] * targets + ["skewed", "all to one"] * skews
    lines = []
    for row in rows:
        us = row["us"][kind or next(iter(row["us"]))]
        best = min((us[peer] for peer in peers), default=None)
        line = [
            *_shape(columns, row),
            *_us_cells(us, [OURS, *others]),
            f"{best / us[OURS]:.2f} x" if best else "-",
        ]
        if targets:
            target = row["target_us"]
            line += [f"{target:g}", "yes" if us[OURS] <= target else "no"]
        if skews:
            line += [f"{row['us'][skew][OURS] / us[OURS]:.2f} x" for skew in ("skewed", "all_to_one")]
        lines.append(line)
    return Table(title, header, lines)


def _host(us: dict[str, float]) -> Table:
    vllm = us.get("vllm")
    lines = []
    for call, value in us.items():
        ratio = value / vllm if vllm else None
        target = HOST_TARGETS.get(call)
        met = "" if target is None or ratio is None else "yes" if ratio <= target else "no"
        cells = [f"{ratio:.2f} x" if ratio else "-", f"{target:g} x" if target else "", met]
        lines.append([_call_name(call), _us(value), *cells])
    shape = f"{HOST.tokens} x {HOST.topk}, {HOST.experts} experts"
    return Table(f"Host time of a call, us ({shape})", ["call", "us", "of vLLM's", "target", "met"], lines)


def _call_name(call: str) -> str:
    name, comma, rest = call.partition(",")
    return NAMES.get(name, name) + comma + rest


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
    """Where and when the figures come from, and what an empty kernel takes there."""
    e = result["environment"]
    peers = [f"{NAMES[name]} {version}".strip() for name, version in e["peers"].items()]
    parts = [
        e["gpu"], f"driver {e['driver']}", f"CUDA {e['cuda']}", f"torch {e['torch']}", f"CuPy {e['cupy']}",
        f"NVRTC {e['nvrtc']}", f"cupy_moe {e['cupy_moe']}", *peers, e["date"],
    ]  # fmt: skip
    floor = ", ".join(f"{_us(us)} us with {what}" for what, us in result.get("floor", {}).items())
    return ", ".join(parts) + "." + (f" An empty kernel takes {floor}." if floor else "")


def readme_section(result: dict[str, Any], plot: str | None) -> str:
    intro = (
        f"{conditions(result)} GPU times are medians over replays of a CUDA graph of 20 calls, warm L2,"
        ' all libraries in turn in one process, uniform routing; "faster" is against the best other library,'
        ' "skewed" (1/rank) and "all to one" against our uniform time. Written by `scripts/bench --readme`.'
    )
    image = [f"![GPU time of moe_align_block_size over the number of ids]({plot})"] if plot else []
    return "\n\n".join(
        [textwrap.fill(intro, README_WIDTH), *image, *(table.markdown() for table in tables(result))]
    )


def replace_section(text: str, section: str) -> str:
    """The README with a new section between its markers. Raises ValueError unless there is one pair."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
