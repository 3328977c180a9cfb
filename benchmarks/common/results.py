"""The CSV: one row per case, implementation, mode, T and length."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.hardware import commit, cpu_flags, cpu_model

OK, SKIPPED, UNAVAILABLE, FAILED = "ok", "skipped", "unavailable", "failed"


@dataclass(frozen=True)
class Stamp:
    """What every row of one run shares."""

    commit: str
    cpu: str
    cpu_flags: str
    threads: int
    device: str
    torch: str
    python: str
    date: str


def stamp(threads: int, device: str) -> Stamp:
    """The stamp of a run that starts now, on a CPU."""
    return Stamp(
        commit=commit(),
        cpu=cpu_model(),
        cpu_flags=cpu_flags(),
        threads=threads,
        device=device,
        torch=torch.__version__,
        python=sys.version.split()[0],
        date=datetime.now(timezone.utc).date().isoformat(),
    )


@dataclass(frozen=True)
class Row:
    """One measured (or skipped) thing.  Empty cells are NaN for numbers; nothing is ever filled in by guess.

    `ratio` is this row over SeT in the same rounds (SeT at the same T; at T = 3 for implementations without T), and
    `ratio_t1` over SeT at T = 1: above 1, SeT is faster.
    """

    case: str
    impl: str
    mode: str
    metric: str  # "time", "memory", "rate"
    unit: str  # "s", "bytes", "FLOP/s", "exp/s", "bytes/s"
    status: str
    note: str = ""
    T: int | None = None
    B: int | None = None
    H: int | None = None
    L: int | None = None  # rows N for sinkhorn
    M: int | None = None
    D: int | None = None
    dtype: str = "float32"
    runs: int = 0
    median: float = math.nan
    q25: float = math.nan
    q75: float = math.nan
    ratio: float = math.nan
    ratio_q25: float = math.nan
    ratio_q75: float = math.nan
    ratio_t1: float = math.nan
    ratio_t1_q25: float = math.nan
    ratio_t1_q75: float = math.nan
    work: float = math.nan  # matmul FLOPs of a forward (time), size of q, k, v, o in bytes (memory)
    backend: str = ""


COLUMNS = tuple(field.name for field in fields(Row)) + tuple(field.name for field in fields(Stamp))
_INTEGERS = ("T", "B", "H", "L", "M", "D", "runs")


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def write_csv(path: Path, rows: Iterable[Row], stamp: Stamp) -> None:
    """Write the rows, each with the stamp of the run."""
    shared = asdict(stamp)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in {**asdict(row), **shared}.items()})


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]], about: Mapping[str, Any]) -> None:
    """Rows of other columns, floats to four digits, and beside them as JSON what is known of the run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows)
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


def _parse(name: str, text: str, kind: object) -> Any:
    if name in _INTEGERS:
        return int(text) if text else None
    return (float(text) if text else math.nan) if kind == "float" else text


def read_csv(path: Path) -> tuple[list[Row], Mapping[str, str]]:
    """The rows of a results file and what they share."""
    with path.open(newline="") as file:
        records: Sequence[dict[str, str]] = list(csv.DictReader(file))
    if not records or set(COLUMNS) - set(records[0]):
        raise ValueError(f"{path} is not a results file: it needs the columns {', '.join(COLUMNS)}")
    kinds = {field.name: field.type for field in fields(Row)}
    rows = [Row(**{name: _parse(name, record[name], kind) for name, kind in kinds.items()}) for record in records]
    return rows, {field.name: records[0][field.name] for field in fields(Stamp)}
