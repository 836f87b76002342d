"""Rows of a section as pictures. Needs matplotlib, but not to be imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .base import OURS, Row
from .report import NAMES, best_other

STYLES = {OURS: ("#0b62c4", 2.2), "vllm": ("#e07b00", 1.3), "sglang": ("#2d9655", 1.3)}
BEST_OTHER = {"color": "#e07b00", "linewidth": 1.3}
GREY: dict[str, Any] = {"color": "#808080", "linewidth": 1.0}
DASHES = ("-", "--")  # for as many kinds of inputs, the first ones


def over_size(
    rows: list[Row], result: dict[str, Any], path: Path,
    *, panel: str, x: Sequence[str], x_label: str, y_label: str,
) -> None:  # fmt: skip
    """Times of everyone over the product of `x`, a panel for each value of a field."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [
        name for name in (OURS, *result["environment"]["peers"]) if name in next(iter(rows[0]["us"].values()))
    ]
    kinds = dict(zip(rows[0]["us"], DASHES, strict=False))
    values = sorted({row[panel] for row in rows})
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(-(-len(values) // 2), 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, value in zip(panels, values, strict=False):
        mine = [row for row in rows if row[panel] == value]
        sizes = [math.prod(row[field] for field in x) for row in mine]
        for name in names:
            colour, width = STYLES[name]
            for kind, dashes in kinds.items():
                us = [row["us"][kind].get(name, math.nan) for row in mine]
                axes.plot(sizes, us, dashes, color=colour, linewidth=width, zorder=3 if name == OURS else 2)
        if floor := result.get("floor"):
            axes.axhline(min(floor.values()), linestyle=":", **GREY)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = [2**power for power in range(0, 21, 4)]
        axes.set_xticks(ticks, ["1", "16", "256", "4 Ki", "64 Ki", "1 Mi"])
        axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        _finish(axes, f"{value} {panel}")

    lines = [Line2D([], [], color=STYLES[n][0], linewidth=STYLES[n][1], label=NAMES.get(n, n)) for n in names]
    lines += [Line2D([], [], linestyle=":", label="empty kernel", **GREY)] if result.get("floor") else []
    lines += [Line2D([], [], linestyle=d, label=k, **GREY) for k, d in kinds.items()]
    _save(figure, lines, x_label, y_label, result, path)


def beside_floor(
    rows: list[Row], result: dict[str, Any], path: Path,
    *, panel: str, x: str, y_label: str, floor_us: Callable[[Row], float], as_share: bool,
) -> None:  # fmt: skip
    """Our times and those of the best other library over `x`, or what part of each the floor is."""
    from matplotlib.figure import Figure

    def plotted(row: Row, us: float | None) -> float:
        if us is None:
            return math.nan
        return 100 * floor_us(row) / us if as_share else us

    peers = result["environment"]["peers"]
    values = list(dict.fromkeys(row[panel] for row in rows))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(values), sharex=True, sharey=True, squeeze=False).flat
    for axes, value in zip(panels, values, strict=True):
        mine = sorted((row for row in rows if row[panel] == value), key=lambda row: row[x])
        sizes = [row[x] for row in mine]
        times = [next(iter(row["us"].values())) for row in mine]
        pairs = list(zip(mine, times, strict=True))
        lines = [
            *axes.plot(sizes, [plotted(row, us[OURS]) for row, us in pairs], ".-",
                       color=STYLES[OURS][0], linewidth=STYLES[OURS][1], zorder=3, label=OURS),
            *axes.plot(sizes, [plotted(row, best_other(us, peers)) for row, us in pairs], ".-",
                       label="best other library", **BEST_OTHER),
            *axes.plot(sizes, [plotted(row, floor_us(row)) for row in mine], ":", label="roofline", **GREY),
        ]  # fmt: skip
        axes.set_xscale("log", base=2)
        labels = [str(size) if size < 1024 else f"{size // 1024} Ki" for size in sizes]
        axes.set_xticks(sizes, labels, fontsize=8)
        if as_share:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.set_yticks([10, 100, 1000, 10_000], ["10", "100", "1000", "10 000"])
        _finish(axes, value)
    _save(figure, lines, x, y_label, result, path)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.minorticks_off()


def _save(
    figure: Any, lines: list[Any], x_label: str, y_label: str, result: dict[str, Any], path: Path
) -> None:
    """The ending of the path tells the format."""
    import matplotlib

    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
    e = result["environment"]
    figure.supxlabel(f"{x_label}; {e['gpu']}, {e['date']}", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    # The same figures give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cupy_moe", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
