"""The CSV: one row a run, appended when the run has ended, so that a table can be resumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.common.results import Stamp
from benchmarks.quality.tasks import Budget, Task
from benchmarks.quality.train import Result, Variant

Record = dict[str, str]


@dataclass(frozen=True)
class Setting:
    """What identifies a run."""

    task: Task
    variant: Variant
    budget: Budget
    seed: int

    def cells(self) -> Record:
        """The cells of a row that are known before the run; SeT's own are empty where another attention runs."""
        own = {name: cell for name, cell in asdict(self.variant).items() if name not in ("name", "kind")}
        return {
            "task": self.task.name,
            "variant": self.variant.name,
            **{name: str(cell) if self.variant.kind == "set" else "" for name, cell in own.items()},
            **{name: str(cell) for name, cell in asdict(self.budget).items()},
            "seed": str(self.seed),
            "metric": self.task.metric,
        }


MEASURED, SHARED = ([field.name for field in fields(kind)] for kind in (Result, Stamp))


def row(setting: Setting, result: Result, stamp: Stamp) -> Record:
    """A finished run."""
    measured = {name: f"{cell:.6g}" if isinstance(cell, float) else str(cell) for name, cell in asdict(result).items()}
    return {**setting.cells(), **measured, **{name: str(cell) for name, cell in asdict(stamp).items()}}


def missing(settings: Iterable[Setting], done: list[Record]) -> list[Setting]:
    """The settings without a row.  A row of the same task, variant and seed with other settings is an error."""
    found = {(one["task"], one["variant"], one["seed"]): one for one in done}
    left = []
    for setting in settings:
        cells = setting.cells()
        old = found.get((cells["task"], cells["variant"], cells["seed"]))
        if old is None:
            left.append(setting)
        elif other := [name for name, cell in cells.items() if old.get(name, cell) != cell]:
            raise ValueError(
                f"{cells['task']}, {cells['variant']}, seed {cells['seed']} is in the results with another "
                f"{', '.join(other)}: choose another --name, or remove these rows"
            )
    return left


def read(path: Path) -> list[Record]:
    """The rows of a results file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if lacking := {"task", "variant", "seed", *MEASURED, *SHARED} - set(reader.fieldnames or ()):
        raise ValueError(f"{path} is not a results file of benchmarks.quality: it lacks {', '.join(sorted(lacking))}")
    return rows


def write(path: Path, rows: list[Record]) -> None:
    """Replace the file at once: a run that is killed leaves the rows that were there.  Rows from before a column was
    there have nothing in it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def write_stamped(path: Path, rows: Sequence[Any], on: Stamp) -> None:
    """A CSV of rows that are dataclasses, each with the stamp of the run."""
    names = [field.name for kind in (rows[0], Stamp) for field in fields(kind)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **asdict(on)} for row in rows)


def since(better: Mapping[int, bool]) -> int | None:
    """The first length, of those there are, from which on all are better."""
    found = None
    for length in sorted(better, reverse=True):
        if not better[length]:
            break
        found = length
    return found
