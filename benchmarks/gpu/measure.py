"""`python -m benchmarks.gpu.measure`: the benchmark table on a GPU, correctness first, as rows in a CSV.

Everything of one case is timed in interleaved rounds, as replays of CUDA graphs where a call can be captured (`note`
says where it cannot) and with CUDA events.  Inputs stay where the last replay left them, so short lengths run from the
L2 cache, opponents and copies alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import entry_point, implementations
from benchmarks.common.cases import BOTH, FORWARD, Entry
from benchmarks.common.hardware import cpu_flags, cpu_model, default_threads
from benchmarks.common.measure import Clock, interleave, paired_ratio, quartiles, wall_clock
from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row, Stamp, write_csv
from benchmarks.gpu.cases import (
    SDPA,
    Call,
    GpuCase,
    GpuPlan,
    Inputs,
    compiled_reference,
    copies,
    dry_plan,
    full_plan,
    inputs,
    sdpa,
    set_attention,
    timed_call,
)
from setformer_kernels import dispatch, testing
from setformer_kernels.problem import Problem

GRAPH_CALLS_S = 200e-6  # calls shorter than this are captured several times into one graph, so that replays overlap
HOST_CALLS = 100


def event_clock(call: Call, repeats: int) -> float:
    """Seconds per call on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def captured(call: Call) -> tuple[Call, int]:
    """A replay of `n` calls in one CUDA graph, and n."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    count = max(1, min(10, int(GRAPH_CALLS_S / max(event_clock(call, 3), 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph.replay, count


class Measure:
    """One run: its plan, its device, and what is left of its time."""

    def __init__(self, plan: GpuPlan, seconds: float, log: Callable[[str], None] = print) -> None:
        self.plan, self.log = plan, functools.partial(log, flush=True) if log is print else log
        self.deadline = time.monotonic() + seconds
        self.on_gpu = plan.device == "cuda"
        self.clock: Clock = event_clock if self.on_gpu else wall_clock
        self.backends = [name for name in dispatch.NATIVE if name != "cpu" and self._able(name, plan.check)]

    def _able(self, name: str, case: GpuCase) -> bool:
        sizes = {"D": case.D, "E": case.D, "M": case.M, "N": case.L}
        forward = Problem("attention", self.plan.device, case.dtype, num_iters=max(case.iterations), **sizes)
        problems = [forward, replace(forward, backward=True)] if case.mode == BOTH else [forward]
        return not any(dispatch.NATIVE[name].unsupported_reasons(problem) for problem in problems)

    def _backends_of(self, case: GpuCase) -> list[str]:
        """Those that hold the case's keys: another backend's backward would be timed under the name of the first."""
        return [name for name in self.backends if self._able(name, case)]

    def rows(self) -> Iterator[list[Row]]:
        """The rows of the run, group by group; nothing is timed before it is right."""
        if not self.backends:
            raise entry_point.NotHereError(f"no GPU backend can run here: {dispatch.available_backends()}")
        yield [self._checked(name, T) for name in self.backends for T in (3, 1)]
        yield [self._probe(name) for name in PROBES]
        yield [self._host_row(name) for name in self.backends if name != "cuda"]  # its launch is not seen from Python
        parts: list[tuple[Any, Callable[[Any], list[Row]]]] = [(case, self._case_rows) for case in self.plan.cases]
        parts += [(case, self._memory_rows) for case in self.plan.memory]
        parts += [(size, self._sinkhorn_rows) for size in self.plan.sinkhorn]
        for what, measure in parts:
            if time.monotonic() > self.deadline:
                self.log(f"out of time: {what}")
                yield [Row(getattr(what, "name", "sinkhorn"), "set", "", "time", "s", SKIPPED, "out of time")]
                continue
            yield measure(what)
            if self.on_gpu:
                torch.cuda.empty_cache()

    def _checked(self, backend: str, T: int) -> Row:
        """The output and every gradient within the error budget, or an AssertionError."""
        case = self.plan.check
        x = inputs(case, self.plan.device)
        leaves = dict(zip(("query", "key", "value", "references"), x[:4], strict=True))

        def run(query: Tensor, key: Tensor, value: Tensor, references: Tensor, by: str) -> Tensor:
            return set_attention(Inputs(query, key, value, references, x.d_output), T, by)

        by_reference = functools.partial(run, by="reference")
        exact, model = testing.model_inputs(by_reference, leaves, case.dtype, x.d_output)
        fast = testing.gradients(functools.partial(run, by=backend), leaves, x.d_output)
        testing.assert_within_budget(fast, exact, model, f"{backend}, T = {T}:")
        error = ((fast["output"].double() - exact["output"]).norm() / exact["output"].norm()).item()
        self.log(f"correct: {backend} T={T}, relative error of o {error:.2g}")
        row = _row(case, backend, T, metric="error", unit="relative")
        return replace(row, status=OK, runs=1, median=error, q25=error, q75=error)

    def _probe(self, name: str) -> Row:
        unit, prepare = PROBES[name]
        row = Row("probe", name, "", "rate", unit, UNAVAILABLE)
        try:
            call, work = prepare(self.plan)
            (samples,) = interleave({name: call}, 1.0, self.clock).values()
        except (RuntimeError, ImportError) as error:
            return replace(row, note=str(error).splitlines()[0])
        row = _filled(row, [work / seconds for seconds in samples])
        self.log(f"{name}: {row.median:.4g} {unit}")
        return row

    def _host_row(self, backend: str) -> Row:
        """Host seconds of one eager call until its first launch is on the stream."""
        case = self.plan.host
        row = _row(case, backend, 3, metric="host", unit="s")
        try:
            samples = host_times(case, backend, self.plan.device)
        except (RuntimeError, ImportError, AttributeError) as error:
            return replace(row, status=FAILED, note=str(error).splitlines()[0])
        self.log(f"host time before the first launch, {backend}: {1e6 * statistics.median(samples):.1f} µs")
        return _filled(row, samples)

    def _calls(self, case: GpuCase, x: Inputs) -> dict[Entry, Call]:
        """Everything this case is timed against, as plain calls."""
        found: dict[Entry, tuple[Callable[[Inputs], Tensor], int]] = {}
        for T in case.iterations:
            for name in self._backends_of(case):
                found[Entry(name, T)] = (functools.partial(set_attention, T=T, backend=name), 4)
            if case.reference:
                found[Entry("reference", T)] = (functools.partial(set_attention, T=T, backend="reference"), 4)
            if case.compiled:
                found[Entry("compiled", T)] = (compiled_reference(T), 4)
        if not case.compiled:
            kinds = SDPA if self.on_gpu else {"sdpa default": None}
            found |= {Entry(name, None): (functools.partial(sdpa, backend=kind), 3) for name, kind in kinds.items()}
        calls = {entry: timed_call(run, x, case.mode, leaves) for entry, (run, leaves) in found.items()}
        if not case.compiled:
            calls[Entry("copy", None)] = copies(case, self.plan.device)
        return calls

    def _case_rows(self, case: GpuCase) -> list[Row]:
        torch._dynamo.reset()
        x = inputs(case, self.plan.device)
        rows, ready, counts, notes = [], {}, {}, {}
        for entry, call in self._calls(case, x).items():
            try:
                call()
            except (RuntimeError, NotImplementedError, ImportError) as error:
                note = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                rows.append(replace(_row(case, entry.impl, entry.T), status=FAILED, note=note))
                continue
            ready[entry], counts[entry], notes[entry] = self._graph(call)
        budget = 1.0 if case.L < 65536 else 4.0
        samples = interleave(ready, budget if self.on_gpu else 0.05, self.clock)
        per_call = {entry: [s / counts[entry] for s in taken] for entry, taken in samples.items()}
        base = self.backends[-1]  # Triton, which runs every case
        for entry, taken in per_call.items():
            row = replace(_filled(_row(case, entry.impl, entry.T), taken), note=notes[entry])
            rows.append(_against(row, taken, per_call.get(Entry(base, entry.T or 3)), per_call.get(Entry(base, 1))))
        self.log(f"{case.name} {case.mode} B{case.B} L={case.L}: " + _brief(rows))
        return rows

    def _graph(self, call: Call) -> tuple[Call, int, str]:
        """The call as a graph replay where it can be captured."""
        if not self.on_gpu:
            return call, 1, "no CUDA graph: not on a GPU"
        try:
            return *captured(call), "graph"
        except RuntimeError as error:
            torch.cuda.synchronize()
            return call, 1, f"no CUDA graph: {str(error).splitlines()[0][:100]}"

    def _memory_rows(self, case: GpuCase) -> list[Row]:
        """Peak bytes of one forward and backward beyond inputs, output and gradients."""
        rows = []
        entries = [(name, T) for T in case.iterations for name in self._backends_of(case)]
        for name, T in [*entries, ("reference", 3)]:
            row = _row(case, name, T, metric="memory", unit="bytes", work=4.0 * case.token_bytes())
            if not self.on_gpu:
                rows.append(replace(row, status=UNAVAILABLE, note="counted by the CUDA allocator"))
                continue
            x = inputs(case, "cuda")
            run = functools.partial(set_attention, T=T, backend=name)
            extra = float(peak_extra(run, x))
            self.log(f"memory {name} T={T} L={case.L}: {extra / row.work:.3g} x (q, k, v, o)")
            rows.append(_filled(row, [extra]))
        return rows

    def _sinkhorn_rows(self, size: tuple[int, int, int, int]) -> list[Row]:
        problems, rows_, columns, T = size
        generator = torch.Generator(self.plan.device).manual_seed(0)
        l = 5 * torch.randn(problems, rows_, columns, generator=generator, device=self.plan.device)
        base = Row("sinkhorn", "", FORWARD, "time", "s", SKIPPED, T=T, B=problems, L=rows_, M=columns)
        rows, calls = [], {}
        for impl in ("set", "reference", "plain", "pot", "geomloss"):
            row = replace(base, impl=impl)
            if reason := implementations.missing(impl):
                rows.append(replace(row, status=UNAVAILABLE, note=reason))
                continue
            call = implementations.sinkhorn_call(implementations.SINKHORN[impl], l, T)
            try:
                call()
            except (RuntimeError, ValueError, TypeError) as error:
                rows.append(replace(row, status=FAILED, note=str(error).splitlines()[0][:200]))
                continue
            calls[impl] = call
        samples = interleave(calls, 1.5 if self.on_gpu else 0.05, self.clock)
        for impl, taken in samples.items():
            rows.append(_against(_filled(replace(base, impl=impl), taken), taken, samples.get("set"), None))
        self.log(f"sinkhorn {problems} x {rows_} x {columns}, {T} iterations: " + _brief(rows))
        return rows


def peak_extra(run: Callable[[Inputs], Tensor], x: Inputs) -> int:
    """Bytes at the peak of a forward and backward, beyond what was there before, the output and the gradients."""
    torch.autograd.grad(run(x), x[:4], x.d_output)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run(x)
    gradients = torch.autograd.grad(output, x[:4], x.d_output)
    asked_for = sum(t.numel() * t.element_size() for t in (output, *gradients))
    return torch.cuda.max_memory_allocated() - before - asked_for


def host_times(case: GpuCase, backend: str, device: str) -> list[float]:
    """Seconds from the call of set_attention to the return of its first kernel's launch, the queue empty."""
    from benchmarks.compiled import workloads
    from setformer_kernels.backends.triton.host import launch

    if backend != "triton":
        raise RuntimeError(f"the first launch of backend {backend!r} cannot be seen from Python")
    sizes = {"B": case.B, "H": case.H, "L": case.L, "D": case.D, "E": case.D, "M": case.M}
    first = workloads.launches(workloads.Call("attention", dtype=case.dtype, **sizes), "sm_90")[0].kernel
    x = inputs(replace(case, mode=FORWARD), device)
    marks: list[float] = []
    plain = launch.start

    def marked(kernel: Any, *launched: Any) -> None:
        plain(kernel, *launched)
        if kernel is first:
            marks.append(time.perf_counter())

    samples = []
    launch.start = marked
    try:
        with torch.no_grad():
            for _ in range(HOST_CALLS if device == "cuda" else 3):
                if device == "cuda":
                    torch.cuda.synchronize()
                marks.clear()
                start = time.perf_counter()
                set_attention(x, 3, backend)
                if not marks:
                    raise RuntimeError(f"no launch of {first} was seen")
                samples.append(marks[0] - start)
    finally:
        launch.start = plain
    return samples[len(samples) // 10 :]


def _copy_probe(plan: GpuPlan) -> tuple[Call, float]:
    source = torch.ones(int(plan.probe_scale * 2**28), device=plan.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * 4


def _matmul_probe(plan: GpuPlan) -> tuple[Call, float]:
    n = 8192 if plan.probe_scale == 1 else 64
    a, b = (torch.randn(n, n, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def _exp_probe(plan: GpuPlan) -> tuple[Call, float]:
    from benchmarks.gpu import probe

    return probe.exponentials(plan.device, plan.probe_scale)


PROBES: dict[str, tuple[str, Callable[[GpuPlan], tuple[Call, float]]]] = {
    "copy bandwidth": ("bytes/s", _copy_probe),
    "matmul": ("FLOP/s", _matmul_probe),
    "exp rate": ("exp/s", _exp_probe),
}


def _row(case: GpuCase, impl: str, T: int | None, **changes: Any) -> Row:
    values = {"metric": "time", "unit": "s", "status": SKIPPED, "work": float(case.token_bytes())} | changes
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(case.name, impl, case.mode, T=T, B=case.B, H=case.H, L=case.L, M=case.M, D=case.D, dtype=dtype, **values)


def _filled(row: Row, samples: list[float]) -> Row:
    q25, median, q75 = quartiles(samples)
    return replace(row, status=OK, runs=len(samples), q25=q25, median=median, q75=q75)


def _against(row: Row, taken: list[float], base: list[float] | None, at_t1: list[float] | None) -> Row:
    """The row with its ratios to SeT in the same rounds."""
    if base:
        q25, median, q75 = paired_ratio(taken, base)
        row = replace(row, ratio=median, ratio_q25=q25, ratio_q75=q75)
    if at_t1:
        q25, median, q75 = paired_ratio(taken, at_t1)
        row = replace(row, ratio_t1=median, ratio_t1_q25=q25, ratio_t1_q75=q75)
    return row


def _brief(rows: list[Row]) -> str:
    def one(row: Row) -> str:
        name = row.impl if row.T is None else f"{row.impl} T={row.T}"
        return f"{name} {1e6 * row.median:.1f} µs" if row.status == OK else f"{name} {row.status}"

    return ", ".join(map(one, rows))


def stamp(device: str, commit: str) -> Stamp:
    """What the rows of this run share."""
    from datetime import datetime, timezone

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu (dry run)"
    today = datetime.now(timezone.utc).date().isoformat()
    python = sys.version.split()[0]
    return Stamp(commit, cpu_model(), cpu_flags(), default_threads(), name, torch.__version__, python, today)


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case is begun after this long")
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args(argv)
    plan = dry_plan() if arguments.dry_run else full_plan()
    rows: list[Row] = []
    try:
        for group in Measure(plan, arguments.seconds).rows():
            rows += group
            write_csv(arguments.csv, rows, stamp(plan.device, arguments.commit))
    except AssertionError as error:
        print(f"wrong result, nothing is timed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.measure", main)
