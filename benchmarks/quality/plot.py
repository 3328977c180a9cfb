"""Every run as a dot: a panel a task, a line a variant, with the mean of softmax attention to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.quality.results import Record
from benchmarks.quality.table import digits, measured_tasks, scores, variants


def draw(rows: Sequence[Record], path: Path) -> None:
    """Write the plot (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, names = measured_tasks(rows), variants(rows)
    size = (3.4 * len(tasks) + 1.6, 0.28 * len(names) + 1.2)
    figure, panels = pyplot.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, task in zip(panels[0], tasks, strict=True):
        for line, name in enumerate(names):
            found = scores(rows, task.name, name)
            axes.plot(found, [line] * len(found), "o", color="tab:blue", alpha=0.5)
            if found:
                axes.plot(mean(found), line, "|", color="black", markersize=14)
        if softmax := scores(rows, task.name, names[0]):
            axes.axvline(mean(softmax), color="0.6", linestyle=":")
        axes.set(
            title=task.title,
            xlabel=task.metric if digits(task) > 1 else f"{task.metric}, %",
            yticks=range(len(names)),
            yticklabels=names,
        )
        axes.title.set_fontsize(8)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
