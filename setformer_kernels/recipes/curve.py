"""What a run logged, as a table and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEFT_OUT = ("runtime", "per_second", "total_flos", "preparation")


def write_curve(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """curve.csv: one row a logged number; curve.png: the losses and, below, the metrics, against the step."""
    rows = [
        (entry["step"], name, value)
        for entry in history
        for name, value in entry.items()
        if isinstance(value, (int, float)) and name not in ("step", "epoch") and not any(s in name for s in LEFT_OUT)
    ]
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "name", "value"))
        writer.writerows(rows)
    losses = {"loss", "eval_loss"}
    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, constrained_layout=True)
    for axis, wanted in zip(axes, (losses, {n for _, n, _ in rows if n.startswith("eval_")} - losses), strict=True):
        for name in sorted(wanted):
            points = [(step, value) for step, key, value in rows if key == name]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=name.removeprefix("eval_") or name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[1].set_xlabel("step")
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)
