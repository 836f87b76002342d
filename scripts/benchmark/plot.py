"""A sweep as a picture: time over size, a panel for each value of one field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .base import OURS, Operator, Sweep
from .report import NAMES

STYLES = {OURS: ("#0b62c4", 2.2), "vllm": ("#e07b00", 1.3), "sglang": ("#2d9655", 1.3)}
DASHES = ("-", "--")  # for as many kinds of inputs, the first ones


def draw(operator: Operator, sweep: Sweep, result: dict[str, Any], path: Path) -> None:
    """Write the picture; the ending of the path tells its format. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = result[sweep.section]
    names = [
        name for name in (OURS, *result["environment"]["peers"]) if name in next(iter(rows[0]["us"].values()))
    ]
    kinds = dict(zip(rows[0]["us"], DASHES, strict=False))
    values = sorted({row[sweep.panel] for row in rows})
    grey: dict[str, Any] = {"color": "#808080", "linewidth": 1.0}
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(-(-len(values) // 2), 2, sharex=True, sharey=True, squeeze=False).flat
    for panel, value in zip(panels, values, strict=False):
        mine = [row for row in rows if row[sweep.panel] == value]
        sizes = [math.prod(row[field] for field in sweep.x) for row in mine]
        for name in names:
            colour, width = STYLES[name]
            for kind, dashes in kinds.items():
                us = [row["us"][kind][name] for row in mine]
                panel.plot(sizes, us, dashes, color=colour, linewidth=width, zorder=3 if name == OURS else 2)
        if floor := result.get("floor"):
            panel.axhline(min(floor.values()), linestyle=":", **grey)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"{value} {sweep.panel}", fontsize=10, loc="left")
        panel.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        ticks = [2**power for power in range(0, 21, 4)]
        panel.set_xticks(ticks, ["1", "16", "256", "4 Ki", "64 Ki", "1 Mi"])
        panel.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        panel.minorticks_off()

    lines = [Line2D([], [], color=STYLES[n][0], linewidth=STYLES[n][1], label=NAMES.get(n, n)) for n in names]
    lines += [Line2D([], [], linestyle=":", label="empty kernel", **grey)] if result.get("floor") else []
    lines += [Line2D([], [], linestyle=d, label=k, **grey) for k, d in kinds.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
    e = result["environment"]
    figure.supxlabel(f"{sweep.x_label}; {e['gpu']}, {e['date']}", fontsize=9)
    figure.supylabel(f"{operator.function}, GPU time of a call, us", fontsize=9)
    # The same figures give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cupy_moe", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
