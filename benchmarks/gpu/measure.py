"""`python -m benchmarks.gpu.measure JOURNAL BACKEND PART`: one backend's rows of a part of the table, in one process.

Everything of one case is timed in interleaved rounds, the backend beside its opponents, as replays of CUDA graphs where
a call can be captured (`note` says where it cannot) and with CUDA events.  Inputs stay where the last replay left them,
so short lengths run from the L2 cache, opponents and copies alike.  A row is in the journal as soon as it is measured;
a process that is started again goes on after what it lost.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.common import entry_point, implementations
from benchmarks.common.cases import FORWARD, Entry
from benchmarks.common.measure import interleave
from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row
from benchmarks.gpu.cases import (
    PARTS,
    SDPA,
    Call,
    GpuCase,
    GpuPlan,
    Inputs,
    compiled_reference,
    copies,
    inputs,
    plan_of,
    problems,
    sdpa,
    set_attention,
    timed_call,
)
from benchmarks.gpu.device import Cpu, Gpu
from benchmarks.gpu.host import host_times, peak_extra
from benchmarks.gpu.journal import Journal, Log, rows, written
from benchmarks.gpu.probe import PROBES
from benchmarks.gpu.process import STICKY
from benchmarks.gpu.rows import OUT_OF_TIME, against, blank, brief, filled, first_line
from setformer_kernels import dispatch, testing
from setformer_kernels.problem import Problem

OTHER_SOLVERS = ("reference", "plain", "pot", "geomloss")


class Item(NamedTuple):
    """Something that is measured: its name, the row that stands for it until then, and what yields its rows."""

    key: str
    row: Row
    measure: Callable[[str, Row], Iterator[Row]]


class Measure:
    """One backend in one process: its plan, its device, and what is left of its time."""

    def __init__(
        self, plan: GpuPlan, backend: str, device: Gpu | Cpu, log: Log, seconds: float, *, reference: bool = True
    ) -> None:
        self.plan, self.backend, self.device, self.log = plan, backend, device, log
        self.deadline = time.monotonic() + seconds
        self.reference = reference  # beside one backend is enough: it is slow
        self.on_gpu = plan.device == "cuda"

    def able(self, case: GpuCase) -> bool:
        """Whether the backend holds the case: another's backward would be timed under its name."""
        unable = dispatch.NATIVE[self.backend].unsupported_reasons
        return not any(unable(problem) for problem in problems(case, self.plan.device))

    def items(self, part: str) -> list[Item]:
        """What a part measures, in order."""
        cases = [case for case in self.plan.cases if case.name in PARTS[part] and self.able(case)]
        timed = [self._item(case, functools.partial(self._case_rows, case), case.iterations[0]) for case in cases]
        if part != "headline":
            return timed
        first = [*self._probes(), self._item(self.plan.host, self._host_rows, metric="host")]
        memory = [
            self._item(case, functools.partial(self._memory_rows, case), metric="memory", unit="bytes",
                       work=4.0 * case.token_bytes())
            for case in self.plan.memory if self.able(case)
        ]  # fmt: skip
        return [*first, *timed, *memory, *self._solvers()]

    def _item(self, case: GpuCase, measure: Any, T: int = 3, **changes: Any) -> Item:
        return Item(f"{case.name} {case.mode} B{case.B} L={case.L}",
                    blank(case, self.backend, T, self.backend, **changes), measure)  # fmt: skip

    def _probes(self) -> list[Item]:
        there = {row.impl for row in rows(self.log.journal.read()) if row.case == "probe" and row.status == OK}
        return [
            Item(f"probe {name}", Row("probe", name, "", "rate", unit, SKIPPED, OUT_OF_TIME), self._probe_rows)
            for name, (unit, _) in PROBES.items()
            if name not in there
        ]

    def _solvers(self) -> list[Item]:
        found = []
        for size in self.plan.sinkhorn:
            count, n, m, T = size
            problem = Problem("sinkhorn", self.plan.device, torch.float32, M=m, N=n, num_iters=T)
            if not dispatch.NATIVE[self.backend].unsupported_reasons(problem):
                row = Row("sinkhorn", "set", FORWARD, "time", "s", SKIPPED, OUT_OF_TIME, T, count, L=n, M=m,
                          backend=self.backend)  # fmt: skip
                found.append(Item(f"sinkhorn {count}x{n}x{m}", row, functools.partial(self._sinkhorn_rows, size)))
        return found

    def run(self, part: str) -> int:
        """Measures what is left of a part; STICKY where the device no longer answers."""
        items = self.items(part)
        self.log.plan([written(item.row) for item in items])
        for item in items:
            if self.log.over(item.key):
                continue
            if time.monotonic() > self.deadline:
                print(f"out of time: {item.key}", flush=True)
                return 0
            self.log.begin(item.key, "", item.row)
            try:
                for row in item.measure(item.key, item.row):
                    self.log.row(row)
                self.log.end(item.key)
            except Exception as error:  # whatever it is, it is this item's
                why = f"{type(error).__name__}: {first_line(error)}"
                print(f"{item.key}: {why}", flush=True)
                self.log.lost(why)
                if self.device.broken():
                    return STICKY
            self.device.forget()
        return 0

    def _tried(self, key: str, entry: str, row: Row, call: Callable[[], Any]) -> tuple[Any, Row | None]:
        """What a call gives; its FAILED row where it raised or was lost in another process and the device goes on."""
        if self.log.over(key, entry):
            return None, replace(row, status=FAILED, note=self.log.lost_entries[key][entry])
        self.log.begin(key, entry, row)
        try:
            found = call()
            self.device.synchronize()
        except Exception as error:  # compilers have errors of their own
            if self.device.broken():
                raise
            return None, replace(row, status=FAILED, note=f"{type(error).__name__}: {first_line(error)}")
        return found, None

    def _probe_rows(self, key: str, row: Row) -> Iterator[Row]:
        def sampled() -> list[float]:
            call, work = PROBES[row.impl][1](self.plan)
            (samples,) = interleave({row.impl: call}, 1.0 if self.on_gpu else 0.05, self.device.clock).values()
            return [work / seconds for seconds in samples]

        rates, failed = self._tried(key, row.impl, row, sampled)
        if failed:
            yield replace(failed, status=UNAVAILABLE)
            return
        row = filled(row, rates)
        print(f"{row.impl}: {row.median:.4g} {row.unit}", flush=True)
        yield row

    def _host_rows(self, key: str, row: Row) -> Iterator[Row]:
        """Host seconds of one eager call until its first launch is on the stream."""
        samples, failed = self._tried(
            key, "host", row, lambda: host_times(self.plan.host, self.backend, self.plan.device)
        )
        if failed:
            yield failed
            return
        print(f"host time before the first launch, {self.backend}: {1e6 * statistics.median(samples):.1f} µs")
        yield filled(row, samples)

    def calls(self, case: GpuCase, x: Inputs) -> dict[Entry, Call]:
        """Everything this case is timed against, as plain calls; the backend first."""
        found: dict[Entry, tuple[Callable[[Inputs], Tensor], int]] = {}
        for T in case.iterations:
            own = functools.partial(set_attention, T=T, backend=self.backend, causal=case.causal)
            found[Entry(self.backend, T)] = (own, 4)
        for T in case.iterations:
            if case.reference and self.reference:
                found[Entry("reference", T)] = (functools.partial(set_attention, T=T, backend="reference"), 4)
            if case.compiled:
                found[Entry("compiled", T)] = (compiled_reference(T), 4)
        if not case.compiled:
            kinds = SDPA if self.on_gpu else {"sdpa default": None}
            for name, kind in kinds.items():
                found[Entry(name, None)] = (functools.partial(sdpa, backend=kind, causal=case.causal), 3)
        calls = {entry: timed_call(run, x, case.mode, leaves) for entry, (run, leaves) in found.items()}
        if not case.compiled:
            calls[Entry("copy", None)] = copies(case, self.plan.device)
        return calls

    def _case_rows(self, case: GpuCase, key: str, planned: Row) -> Iterator[Row]:
        if case.compiled:
            implementations.forget_graphs()
        x = inputs(case, self.plan.device)
        done, ready, counts, notes = [], {}, {}, {}
        for entry, call in self.calls(case, x).items():
            row = blank(case, entry.impl, entry.T, self.backend)
            found, failed = self._tried(key, str(entry), row, functools.partial(self._prepared, call))
            if failed:
                done.append(failed)
                yield failed
                continue
            ready[entry], counts[entry], notes[entry] = found
        if not any(entry.impl == self.backend for entry in ready):
            return
        self.log.begin(key, "", planned)
        budget = 1.0 if case.L < 65536 else 4.0
        samples = interleave(ready, budget if self.on_gpu else 0.05, self.device.clock)
        per_call = {entry: [s / counts[entry] for s in taken] for entry, taken in samples.items()}
        for entry, taken in per_call.items():
            row = filled(blank(case, entry.impl, entry.T, self.backend), taken, notes[entry])
            own = per_call.get(Entry(self.backend, entry.T or 3)), per_call.get(Entry(self.backend, 1))
            done.append(against(row, taken, *own))
            yield done[-1]
        print(f"{case.name} {case.mode} B{case.B} L={case.L}: " + brief(done), flush=True)

    def _prepared(self, call: Call) -> tuple[Call, int, str]:
        call()
        self.device.synchronize()
        return self.device.graph(call)

    def _memory_rows(self, case: GpuCase, key: str, planned: Row) -> Iterator[Row]:
        """Peak bytes of one forward and backward beyond inputs, output and gradients."""
        entries = [Entry(self.backend, T) for T in case.iterations]
        for entry in [*entries, *([Entry("reference", 3)] if self.reference else [])]:
            row = replace(planned, impl=entry.impl, T=entry.T)
            if not self.on_gpu:
                yield replace(row, status=UNAVAILABLE, note="counted by the CUDA allocator")
                continue
            assert entry.T is not None
            run = functools.partial(set_attention, T=entry.T, backend=entry.impl)
            extra, failed = self._tried(key, str(entry), row, lambda run=run: peak_extra(run, inputs(case, "cuda")))
            if not failed:
                print(f"memory {entry} L={case.L}: {extra / row.work:.3g} x (q, k, v, o)", flush=True)
            yield failed or filled(row, [float(extra)])

    def _sinkhorn_rows(self, size: tuple[int, int, int, int], key: str, planned: Row) -> Iterator[Row]:
        count, n, m, T = size
        generator = torch.Generator(self.plan.device).manual_seed(0)
        l = 5 * torch.randn(count, n, m, generator=generator, device=self.plan.device)
        own = implementations.Sinkhorn(lambda l, T: SF.sinkhorn(l, num_iters=T, backend=self.backend))
        calls, done = {}, []
        for impl in ("set", *OTHER_SOLVERS):
            row = replace(planned, impl=impl)
            if reason := implementations.missing(impl):
                yield replace(row, status=UNAVAILABLE, note=reason)
                continue
            solver = own if impl == "set" else implementations.SINKHORN[impl]
            call = implementations.sinkhorn_call(solver, l, T)
            check = self._checked_solver if impl == "set" else lambda: None
            _, failed = self._tried(key, impl, row, lambda check=check, call=call: (check(), call()))
            if failed:
                yield failed
                if impl == "set":
                    return
                continue
            calls[impl] = call
        self.log.begin(key, "", planned)
        samples = interleave(calls, 1.5 if self.on_gpu else 0.05, self.device.clock)
        for impl, taken in samples.items():
            done.append(against(filled(replace(planned, impl=impl), taken), taken, samples["set"], None))
            yield done[-1]
        print(f"sinkhorn {count} x {n} x {m}, {T} iterations: " + brief(done), flush=True)

    def _checked_solver(self) -> None:
        """An AssertionError where the backend's plans and their gradients are not within the error budget."""
        if self.on_gpu:
            with torch.device("cuda"):
                testing.measure.sinkhorn("plain", 7, torch.float32, self.backend).check("sinkhorn")


def main(argv: list[str] | None = None) -> int:
    """Entry point; STICKY where the device no longer answers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("backend", choices=[name for name in dispatch.NATIVE if name != "cpu"])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case is begun after this long")
    parser.add_argument("--no-reference", action="store_true", help="without the eager reference, which is slow")
    arguments = parser.parse_args(argv)
    plan = plan_of(arguments.dry_run)
    log = Log(Journal(arguments.journal), f"{arguments.part} {arguments.backend}")
    device = Cpu() if arguments.dry_run else Gpu()
    measure = Measure(plan, arguments.backend, device, log, arguments.seconds, reference=not arguments.no_reference)
    if not (measure.able(plan.check) and (arguments.dry_run or torch.cuda.is_available())):
        raise entry_point.NotHereError(f"backend {arguments.backend} cannot run here: {dispatch.available_backends()}")
    return measure.run(arguments.part)


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.measure", main)
