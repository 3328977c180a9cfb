"""The lines that docs/converting.md shows of a transfer's results: `python -m benchmarks.quality.transfer_table FILE`.

A line for every run and moment, of its agreement with the original; then one for every model that tasks were measured
on, with the accuracies of all seeds of a task in a cell.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

MOMENTS = {"placed": "k-means only", "matched": "after stage 1", "tuned": "after stage 2"}
AGREEMENT = ("cosine", "correlation", "nearest", "error")
SEED = ", seed "  # in a name, before the seed of a probe

Values = dict[tuple[str, ...], dict[str, float]]  # by a run's cells and the moment


def read(path: Path) -> tuple[list[str], Values]:
    """The columns that name a run, and what was measured."""
    lines = list(csv.reader(path.read_text().splitlines()))
    count = lines[0].index("moment")
    found: Values = {}
    for *named, name, value in lines[1:]:
        found.setdefault(tuple(cell.removesuffix(".0") for cell in named), {})[name] = float(value)
    return lines[0][:count], found


def rendered(columns: Sequence[str], found: Values) -> list[str]:
    """Markdown, two tables with an empty line between them."""
    lines = _head([*columns, "", *AGREEMENT])
    for (*run, moment), values in found.items():
        if AGREEMENT[0] in values:
            lines.append(_line([*run, MOMENTS.get(moment, moment), *(f"{values[name]:.3f}" for name in AGREEMENT)]))
    tasks = sorted({name.partition(SEED)[0] for values in found.values() for name in values if SEED in name})
    lines += ["", *_head([*columns, "", *tasks])]
    for (*run, moment), values in found.items():
        if any(SEED in name for name in values):
            cells = [[f"{100 * x:.1f}" for name, x in values.items() if name.startswith(task + SEED)] for task in tasks]
            lines.append(_line([*run, MOMENTS.get(moment, moment), *(" / ".join(cell) for cell in cells)]))
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    found = argparse.ArgumentParser(prog="python -m benchmarks.quality.transfer_table", description=__doc__)
    found.add_argument("csv", type=Path)
    print("\n".join(rendered(*read(found.parse_args(argv).csv))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
