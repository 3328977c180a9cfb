"""Speed and memory against length, drawn from a results file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.cases import MODES
from benchmarks.common.results import Row
from benchmarks.common.targets import break_even, find

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    ("set", 3): "#c1121f",
    ("set", 1): "#f08080",
    ("sdpa", None): "#1d3557",
    ("reference", 3): "#588157",
    ("reference", 1): "#a3b18a",
    ("compiled", 3): "#bc6c25",
    ("elu", None): "#7b2cbf",
}
LABELS = {
    "set": "SeT",
    "sdpa": "SDPA (softmax)",
    "reference": "eager reference",
    "compiled": "compiled reference",
    "elu": "elu linear attention",
}


def _label(impl: str, T: int | None) -> str:
    return LABELS.get(impl, impl) + ("" if T is None else f", T = {T}")


def _lines(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    """Rows by implementation and T, each line sorted by length."""
    lines: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.L or 0):
        lines.setdefault((row.impl, row.T), []).append(row)
    return lines


def _draw_speed(axes: Axes, rows: Sequence[Row], mode: str) -> None:
    swept = find(rows, case="sweep", mode=mode, metric="time")
    for (impl, T), line in _lines(swept).items():
        lengths, colour = [row.L or 0 for row in line], COLOURS.get((impl, T))
        axes.plot(lengths, [1e3 * row.median for row in line], "o-", ms=3, color=colour, label=_label(impl, T))
        axes.fill_between(
            lengths, [1e3 * row.q25 for row in line], [1e3 * row.q75 for row in line], color=colour, alpha=0.2, lw=0
        )
    softmax = _lines(swept).get(("sdpa", None), [])
    if softmax:
        crossing = break_even([row.L or 0 for row in softmax], [row.ratio for row in softmax])
        if crossing < float("inf"):
            axes.axvline(crossing, color="grey", ls=":", lw=1)
            axes.text(crossing, 0.98, f" SeT T = 3 ahead from L ≈ {crossing:.0f}", transform=axes.get_xaxis_transform(),
                      va="top", fontsize=8, color="grey")  # fmt: skip
    axes.set(yscale="log", ylabel="time, ms (median, quartiles)", title=mode)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    for (impl, T), line in _lines(find(rows, case="memory")).items():
        shares = [max(row.median / row.work, 1e-3) for row in line]
        axes.plot([row.L or 0 for row in line], shares, "o-", ms=4, color=COLOURS.get((impl, T)), label=_label(impl, T))
    axes.axhline(0.25, color="grey", ls=":", lw=1)
    axes.set(yscale="log", ylabel="peak extra memory / size of q, k, v, o", title="memory, forward+backward")


def draw(rows: Sequence[Row], stamp: dict[str, str], path: Path) -> None:
    """Write the plot (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for ax, mode in zip(axes, MODES, strict=False):
        _draw_speed(ax, rows, mode)
    _draw_memory(axes[2], rows)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda length, _: f"{length:.0f}"))
        ax.set_xlabel("length L = S")
        ax.grid(True, which="major", alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    figure.suptitle(
        f"B1 H8 D64 M64 float32, {stamp['cpu']}, {stamp['threads']} threads, torch {stamp['torch']}, {stamp['commit']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
