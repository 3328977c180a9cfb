"""`python -m benchmarks.compiled.releases`: what another Triton makes of the kernels in half precision.

Needs no GPU.  Compiles what `resources` has of 16 bits for NVIDIA's GPUs with the Triton that is there, and renews its
lines in `results/triton_spills.csv`: one for each kernel, GPU, dtype and size, with the most of all its binaries.
Exit status 1 where one spills.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.common import entry_point
from benchmarks.compiled import resources, tables
from benchmarks.compiled.gpus import FAMILIES
from benchmarks.compiled.resources import Failure, Kind, Row

TABLE = resources.TABLE.with_name("triton_spills.csv")


@dataclass(frozen=True)
class Line:
    """The binaries of one kind of kernel under one release of Triton."""

    triton: str
    family: str
    kernel: str
    dtype: str
    D: int
    M: int
    binaries: int
    registers: int  # the most of any
    spill_bytes: int  # likewise, per thread
    sources: str

    @property
    def kind(self) -> Kind:
        """As `resources.kind`."""
        return self.family, self.kernel, self.dtype, self.D, self.M


def halves(rows: Iterable[Row]) -> list[Row]:
    """Those of 16 bits for NVIDIA's GPUs."""
    return [row for row in rows if row.dtype != "float32" and row.family in FAMILIES]


def summary(rows: Iterable[Row]) -> list[Line]:
    """A line for each kind of kernel, in order."""
    kinds: dict[tuple[str, Kind], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.triton, resources.kind(row)), []).append(row)
    lines = []
    for (release, kind), found in kinds.items():
        registers, spill = max(row.registers for row in found), max(row.spill_bytes for row in found)
        lines.append(Line(release, *kind, len(found), registers, spill, found[0].sources))
    return sorted(lines, key=_order)


def _order(line: Line) -> tuple[str | int, ...]:
    return line.triton, line.kernel, resources.ORDER.index(line.family), line.dtype, line.D, line.M


def read(path: Path = TABLE) -> list[Line]:
    """The committed table."""
    kinds = {field.name: field.type for field in fields(Line)}
    with path.open(newline="") as file:
        return [Line(**{n: int(r[n]) if t == "int" else r[n] for n, t in kinds.items()}) for r in csv.DictReader(file)]


def write(lines: Sequence[Line], path: Path = TABLE) -> None:
    """In order."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in sorted(lines, key=_order))


def compiled(workers: int) -> list[Row]:
    """The rows of all binaries; a message where one does not come out."""
    calls = {family: tables.table_calls(family) for family in FAMILIES}
    todo = [
        job
        for family, found in calls.items()
        for job in resources.jobs([call for call in found if call.dtype in tables.HALVES], family)
    ]
    rows = []
    for found in resources.build(todo, workers, resources.sources_hash()):
        if isinstance(found, Failure):
            raise SystemExit(f"{found.what} does not compile: {found.error}")
        rows.append(found)
        print(f"{len(rows)}/{len(todo)} {found.family} {found.kernel}: {found.spill_bytes} spilled", flush=True)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.releases", description=__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--rows", type=Path, help="a table that `resources --out` has written, instead of compiling")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a kernel spills."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    rows = halves(resources.read(arguments.rows)) if arguments.rows else compiled(arguments.workers)
    lines = summary(rows)
    releases = {line.triton for line in lines}
    kept = [line for line in read() if line.triton not in releases] if TABLE.exists() else []
    write([*kept, *lines])
    spilled = [line for line in lines if line.spill_bytes]
    print("\n".join(f"{line.triton} {line.kind}: {line.spill_bytes} bytes" for line in spilled) or "nothing spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.releases", main)
