"""Time to a marginal error, and time and memory of a gradient: `python -m benchmarks.cpu.peers [table CSV]`.

`sinkhorn`, by its iterations and by Newton's method, among POT, geomloss and OTT-JAX, each where it is installed.  N
and M uniform points of the unit square, C = ‖x − y‖².  Every solver stops by its own test, which is tightened until the
error (`peer_solvers.error_of`) is at most 1e-3 (float32) or 1e-6 (float64); that run is what is timed, without a
compilation.  A solver gets seconds a try: a row that did not get there says how far it came.  Gradients are those of a
weighted sum of the plan with respect to C/ε, at ε = 0.01 and an error of 1e-3; memory is measured in a process each.

Rows that the file of the day has are kept, so that what was interrupted goes on.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.measure import interleave, quartiles
from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row, read_csv, stamp, write_csv
from benchmarks.cpu.memory import CHILD_ENV, reset_high_water, resident
from benchmarks.cpu.peer_solvers import OURS, SOLVERS, Solver, error_of
from setformer_kernels import advice

ERRORS = {1e-3: torch.float32, 1e-6: torch.float64}
EPSILONS = (0.1, 0.01, 0.001)
OF_GRADIENTS = 0.01
TRIES = 6  # times that a tolerance is divided by four, or a number of iterations doubled
WARM_S = 1.0  # a run that takes longer is not repeated


@dataclass(frozen=True)
class Case:
    """G problems of N × M points, and the seconds that a solver gets for one try."""

    G: int
    N: int
    M: int
    seconds: float

    def name(self, epsilon: float, error: float) -> str:
        return f"peers, {self.G}x{self.N}x{self.M}, epsilon {epsilon}, error {error:g}"

    def log_kernel(self, epsilon: float, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.N)
        x, y = (torch.rand(self.G, n, 2, generator=generator, dtype=torch.float64) for n in (self.N, self.M))
        return (-torch.cdist(x, y).square() / epsilon).to(dtype)


CASES = (Case(8, 1024, 64, 2.0), Case(64, 128, 128, 2.0), Case(1, 4096, 4096, 8.0))
QUICK = (Case(2, 40, 8, 0.2),)


@dataclass(frozen=True)
class Reached:
    """What a solver was called with, how long that took and how far it came."""

    tolerance: float
    most: int
    seconds: float
    error: float


def reach(solver: Solver, l: Tensor, error: float, seconds: float) -> Reached:
    """The loosest of its tolerances, or least of doubled iterations, that is enough, or the last within its time."""
    solver.potentials(l, 0.0, 10)  # imports, compiles
    start = time.perf_counter()
    solver.potentials(l, 0.0, 10)
    most = max(4, int(10 * seconds / max(time.perf_counter() - start, 1e-6)))
    tolerance, count, found = error, min(10, most) if solver.counted else most, None
    for _ in range(30 if solver.counted else TRIES):
        found = _timed(solver, l, tolerance, count)
        if found.error <= error or found.seconds > seconds or (solver.counted and count == most):
            break
        if solver.counted:
            count = min(2 * count, most)
        else:  # the first iterations cost more than those that follow, by which the most of them were estimated
            tolerance, count = tolerance / 4, count * (4 if found.seconds < seconds / 4 else 1)
    assert found is not None
    return found


def _timed(solver: Solver, l: Tensor, tolerance: float, most: int) -> Reached:
    if solver.module == "ott":  # compiles for its constants
        solver.potentials(l[:, :2, :2].contiguous(), tolerance, most)
        solver.potentials(torch.zeros_like(l), tolerance, most)
    start = time.perf_counter()
    g = solver.potentials(l, tolerance, most)
    return Reached(tolerance, most, time.perf_counter() - start, error_of(l, g))


def rows_of(case: Case, epsilon: float, error: float, hopeless: set[str]) -> list[Row]:
    """One row a solver; `hopeless` are those that did not get there in an easier case, joined by who does not now."""
    l = case.log_kernel(epsilon, ERRORS[error])
    blank = Row(case.name(epsilon, error), "", "forward", "time", "s", OK, B=case.G, L=case.N, M=case.M,
                dtype=str(l.dtype).removeprefix("torch."))  # fmt: skip
    rows, found = [], {}
    for name, solver in SOLVERS.items():
        if name == "set-unrolled":
            continue
        row = replace(blank, impl=name)
        if missing := solver.missing():
            rows.append(replace(row, status=UNAVAILABLE, note=missing))
        elif name in hopeless:
            rows.append(replace(row, status=SKIPPED, note="an easier case was not reached"))
        else:
            reached = reach(solver, l, error, case.seconds)
            row = replace(row, note=f"error {reached.error:.1e}, {_load()}", median=reached.seconds, runs=1)
            if reached.error <= error:
                found[name] = reached
            else:
                hopeless.add(name)
                row = replace(row, status=FAILED, note=f"error {reached.error:.1e} in {reached.seconds:.2g} s")
            rows.append(row)
    samples = interleave(
        {
            name: (lambda s=SOLVERS[name], r=r: s.potentials(l, r.tolerance, r.most))
            for name, r in found.items()
            if r.seconds <= WARM_S
        },
        case.seconds / 4,
    )
    return _compared([_filled(row, samples.get(row.impl)) for row in rows])


def _load() -> str:
    """How busy the machine is: 1 is this command alone, on one thread."""
    return f"load {os.getloadavg()[0]:.1f}"


def _filled(row: Row, samples: list[float] | None) -> Row:
    if samples is None:
        return row
    q25, median, q75 = quartiles(samples)
    return replace(row, q25=q25, median=median, q75=q75, runs=len(samples))


def _compared(rows: list[Row]) -> list[Row]:
    """With the ratio of a row over the faster of ours."""
    ours = [row.median for row in rows if row.impl in OURS and row.status == OK]
    if not ours:
        return rows
    return [replace(row, ratio=row.median / max(min(ours), 1e-9)) if row.status == OK else row for row in rows]


def gradient_rows(case: Case, threads: int) -> list[Row]:
    """Time of a forward with its gradient, and the memory it takes beyond ℓ and the gradient; a process each."""
    name = f"peers, {case.G}x{case.N}x{case.M}, gradient"
    rows = []
    for impl, solver in SOLVERS.items():
        if solver.gradient is None:
            continue
        blank = Row(name, impl, "both", "time", "s", OK, B=case.G, L=case.N, M=case.M, runs=1)
        if missing := solver.missing():
            rows.append(replace(blank, status=UNAVAILABLE, note=missing))
            continue
        command = [sys.executable, "-m", "benchmarks.cpu.peers", "child", impl, *map(str, (case.G, case.N, case.M))]
        environment = {**os.environ, **CHILD_ENV, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, str(case.seconds), str(threads)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            rows.append(replace(blank, status=FAILED, note=(done.stderr.strip().splitlines() or ["killed"])[-1][:200]))
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        status, note = (OK, _load()) if told["error"] <= 1e-3 else (FAILED, f"error {told['error']:.1e}")
        rows.append(replace(blank, status=status, note=note, median=told["seconds"]))
        rows.append(replace(blank, metric="memory", unit="bytes", status=status, note=note, median=told["bytes"]))
    times, memories = ([row for row in rows if row.metric == metric] for metric in ("time", "memory"))
    return _compared(times) + _compared(memories)


def child(impl: str, case: Case) -> dict[str, float]:
    """One gradient: seconds, bytes beyond ℓ, w and the gradient, and the error of the potentials behind it."""
    solver = SOLVERS[impl]
    l = case.log_kernel(OF_GRADIENTS, torch.float32)
    weight = torch.rand(l.shape, generator=torch.Generator().manual_seed(1))
    reached = reach(solver, l, 1e-3, case.seconds)
    assert solver.gradient is not None
    few = min(reached.most, 20)
    solver.gradient(l[:, :16, :16].contiguous(), reached.tolerance, few, weight[:, :16, :16].contiguous())
    if impl == "ott":
        solver.gradient(torch.zeros_like(l), reached.tolerance, reached.most, weight)
    gc.collect()
    reset_high_water()
    before = resident("VmRSS")
    start = time.perf_counter()
    found = solver.gradient(l, reached.tolerance, reached.most, weight)
    seconds = time.perf_counter() - start
    extra = max(resident("VmHWM") - before - found.numel() * found.element_size(), 0)
    del found
    for _ in range(2 if seconds <= WARM_S else 0):
        start = time.perf_counter()
        solver.gradient(l, reached.tolerance, reached.most, weight)
        seconds = min(seconds, time.perf_counter() - start)
    return {"seconds": seconds, "bytes": extra, "error": reached.error}


def measurements(cases: Sequence[Case], threads: int, done: set[str]) -> Iterator[list[Row]]:
    """The rows of each thing that is measured, but for those that are done."""
    for case in cases:
        hopeless: dict[float, set[str]] = {error: set() for error in ERRORS}
        for epsilon in EPSILONS:
            for error in ERRORS:
                if case.name(epsilon, error) not in done:
                    yield rows_of(case, epsilon, error, hopeless[error])
    for case in cases:
        if f"peers, {case.G}x{case.N}x{case.M}, gradient" not in done:
            yield gradient_rows(case, threads)


def table(rows: Sequence[Row]) -> str:
    """Milliseconds (MiB where memory is measured), and the ratio over the faster of ours, as markdown."""
    names = list(dict.fromkeys(row.impl for row in rows))
    lines = [f"| case | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for case, metric in dict.fromkeys((row.case, row.metric) for row in rows):
        cells = {row.impl: _cell(row) for row in rows if (row.case, row.metric) == (case, metric)}
        title = case.removeprefix("peers, ") + (", MiB" if metric == "memory" else "")
        lines.append(f"| {' | '.join([title, *(cells.get(name, '') for name in names)])} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.status != OK:
        return "" if row.status in (SKIPPED, UNAVAILABLE) else row.note
    value = row.median / 2**20 if row.metric == "memory" else 1e3 * row.median
    return f"{value:.3g} ({row.ratio:.2g}×)"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if argv is None else argv
    advice.enabled = False  # what is not reached is in the rows
    if given[:1] == ["child"]:
        torch.set_num_threads(int(given[6]))
        print(json.dumps(child(given[1], Case(*map(int, given[2:5]), seconds=float(given[5])))))
        return 0
    arguments = entry_point.measure_or_table("benchmarks.cpu.peers", __doc__, argv)
    if arguments.command == "table":
        print(table(read_csv(arguments.csv)[0]))
        return 0
    torch.set_num_threads(arguments.threads)
    on = stamp(arguments.threads, "cpu")
    path: Path = arguments.out / f"peers_{on.date}.csv"
    rows = read_csv(path)[0] if path.exists() else []
    for more in measurements(QUICK if arguments.quick else CASES, arguments.threads, {row.case for row in rows}):
        rows += more
        write_csv(path, rows, on)
    print(f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.cpu.peers", main)
