"""A transfer's report as a picture: errors by layer and head at each moment, and the curve of hybrids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import TransferReport


def draw(report: TransferReport, path: Path) -> None:
    """PNG."""
    panels = len(report.layers) + bool(report.curve)
    if panels == 0:
        return
    figure = Figure(figsize=(4.2 * panels, 3.6), constrained_layout=True)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    image = None
    for axis, (moment, errors) in zip(axes, report.layers.items(), strict=False):
        names = list(dict.fromkeys(error.layer for error in errors))
        grid = np.full((len(names), max(error.head for error in errors) + 1), np.nan)
        for error in errors:
            grid[names.index(error.layer), error.head] = error.error
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=moment, xlabel="head", ylabel="layer")
    if image is not None:
        figure.colorbar(image, ax=list(axes[: len(report.layers)]), label="relative error of attention")
    if report.curve:
        _draw_curve(axes[-1], report)
    figure.savefig(path, dpi=110)


def _draw_curve(axis: Any, report: TransferReport) -> None:
    count = range(1, len(report.curve) + 1)
    axis.plot(count, [step.error for step in report.curve], "o-", label="these layers together")
    axis.plot(count, [step.alone for step in report.curve], "x:", label="the last one alone")
    axis.axvline(len(report.converted), color="gray", linewidth=1)
    axis.set(title="converted layers", xlabel="layers", ylabel="relative error of the output", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
