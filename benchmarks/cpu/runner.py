"""One run: correctness first, then probes, attention, sinkhorn and memory, as rows."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.common import implementations
from benchmarks.common.cases import (
    BOTH,
    PACKED,
    SET_T1,
    SET_T3,
    AttentionCase,
    Entry,
    MemoryCase,
    Plan,
    SinkhornCase,
    attention_inputs,
    sinkhorn_log_kernel,
)
from benchmarks.common.hardware import Unavailable, probe
from benchmarks.common.measure import CLOCKS, Clock, interleave, paired_ratio, quartiles
from benchmarks.common.results import FAILED, OK, SKIPPED, UNAVAILABLE, Row
from benchmarks.common.targets import FMA_PEAK
from benchmarks.cpu import memory
from setformer_kernels import dispatch
from setformer_kernels.problem import Problem

PEAK = Entry(FMA_PEAK, None)
PROBES = {"fma_peak": "FLOP/s", "matmul": "FLOP/s", "exp_rate": "exp/s", "copy_bandwidth": "bytes/s"}
PROBE_SAMPLES = 9
NO_COMPILE = "compiling is left out of --quick"
GROWTH = {"sdpa": 2}  # power of L the time of one call grows with; 1 for all others


@dataclass
class Run:
    """State of one run: its plan, its clock, and what each implementation took at the last length."""

    plan: Plan
    threads: int
    device: str = "cpu"
    only: str = ""
    log: Callable[[str], None] = print
    last: dict[tuple[str, str, Entry], tuple[int, float]] = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        """How time is taken on this device."""
        return CLOCKS[self.device]

    def rows(self) -> Iterator[list[Row]]:
        """The rows of the run, group by group."""
        if self._wanted("probes"):
            yield [self._probe_row(name, unit) for name, unit in PROBES.items()]
        for case in self.plan.attention:
            if self._wanted(case.name):
                yield self._attention_rows(case)
        for sinkhorn in self.plan.sinkhorn:
            if self._wanted(sinkhorn.name):
                yield self._sinkhorn_rows(sinkhorn)
        for memory_case in self.plan.memory:
            if self._wanted("memory"):
                yield [self._memory_row(memory_case)]

    def _wanted(self, name: str) -> bool:
        return self.only in ("", name)

    def _probe_row(self, name: str, unit: str) -> Row:
        row = Row("probe", name.replace("_", " "), "", "rate", unit, UNAVAILABLE)
        try:
            sample = probe(name, self.plan.probe_s, self.threads)
        except Unavailable as reason:
            return replace(row, note=str(reason))
        samples = [sample() for _ in range(PROBE_SAMPLES)]
        self.log(f"{row.impl}: {quartiles(samples).median:.3g} {unit}")
        return _filled(row, samples)

    def _refusal(self, case: AttentionCase, entry: Entry) -> str:
        """Why this entry is not timed at this length, empty if it is."""
        if entry.impl == "compiled" and not self.plan.compile:
            return NO_COMPILE
        L, seconds = self.last.get((case.mask, case.mode, entry), (case.L, 0.0))
        if seconds * (case.L / L) ** (2 if case.mask else GROWTH.get(entry.impl, 1)) > self.plan.max_call_s:
            return f"one call would take more than {self.plan.max_call_s:g} s"
        return ""

    def _attention_rows(self, case: AttentionCase) -> list[Row]:
        self.log(f"{case.name}: {case.mode}, L = {case.L}")
        implementations.forget_graphs()
        x = attention_inputs(case, self.device)
        calls: dict[Entry, Callable[[], object]] = {}
        rows = []
        for entry in case.entries:
            status, note = SKIPPED, self._refusal(case, entry)
            if not note:
                run = implementations.attention(entry, case.mask)
                references = implementations.has_references(entry)
                call = implementations.attention_call(run, x, case.mode, references=references)
                status, note = _try(call)
            if note:
                rows.append(replace(_attention_row(case, entry, self.device), status=status, note=note))
            else:
                calls[entry] = call
        return rows + self._timed(case, calls)

    def _timed(self, case: AttentionCase, calls: dict[Entry, Callable[[], object]]) -> list[Row]:
        """Interleaved times of everything that runs, and the FMA peak out of the same rounds."""
        peaks: list[float] = []
        timed = dict(calls)
        if case.with_peak and (sample := self._peak_probe()):
            timed[PEAK] = lambda: peaks.append(sample())
        samples = interleave(timed, case.budget_s, self.clock)
        rows = []
        for entry in calls:
            self.last[case.mask, case.mode, entry] = (case.L, quartiles(samples[entry]).median)
            rows.append(_compared(_attention_row(case, entry, self.device), samples, entry, _baseline(entry)))
        if peaks:
            peak = replace(_attention_row(case, PEAK, self.device), metric="rate", unit=PROBES["fma_peak"])
            rows.append(_filled(peak, peaks))
        return rows

    def _peak_probe(self) -> Callable[[], float] | None:
        try:
            return probe("fma_peak", self.plan.probe_s, self.threads)
        except Unavailable:
            return None

    def _sinkhorn_rows(self, case: SinkhornCase) -> list[Row]:
        self.log(f"{case.name}: {case.mode}, {case.G} problems of {case.N} x {case.M}, T = {case.T}")
        log_kernel = sinkhorn_log_kernel(case).to(self.device)
        calls: dict[Entry, Callable[[], object]] = {}
        rows = []
        for impl in case.entries:
            if reason := implementations.missing(impl):
                rows.append(replace(_sinkhorn_row(case, impl, self.device), status=UNAVAILABLE, note=reason))
            else:
                solver = implementations.SINKHORN[impl]
                calls[Entry(impl, case.T)] = implementations.sinkhorn_call(solver, log_kernel, case.T)
        samples = interleave(calls, case.budget_s, self.clock)
        set_entry = Entry("set", case.T)
        return rows + [
            _compared(_sinkhorn_row(case, entry.impl, self.device), samples, entry, set_entry) for entry in calls
        ]

    def _memory_row(self, case: MemoryCase) -> Row:
        sized = AttentionCase(f"memory {case.mask}".strip(), case.L, BOTH, mask=case.mask)
        size = float(sized.qkvo_bytes())
        row = replace(_attention_row(sized, case.entry, self.device), metric="memory", unit="bytes", work=size)
        if case.entry.impl == "compiled" and not self.plan.compile:
            return replace(row, status=SKIPPED, note=NO_COMPILE)
        try:
            extra = float(memory.measure(case, self.threads))
        except Unavailable as reason:
            return replace(row, status=UNAVAILABLE, note=str(reason))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return replace(row, status=FAILED, note=str(error))
        self.log(f"{sized.name}: {case.entry}, L = {case.L}: {extra / size:.3g} x (q, k, v, o)")
        return _filled(row, [extra])


def _try(call: Callable[[], object]) -> tuple[str, str]:
    """First (compiling, warming) call of an implementation: what went wrong, if anything did."""
    try:
        call()
    except (RuntimeError, ImportError, NotImplementedError) as error:
        return FAILED, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return OK, ""


def _baseline(entry: Entry) -> Entry:
    return SET_T1 if entry.T == 1 else SET_T3


def _filled(row: Row, samples: list[float]) -> Row:
    """The row with the quartiles of its samples."""
    q25, median, q75 = quartiles(samples)
    return replace(row, status=OK, runs=len(samples), q25=q25, median=median, q75=q75)


def _compared(row: Row, samples: dict[Entry, list[float]], entry: Entry, baseline: Entry) -> Row:
    """The row with its quartiles and with its ratios to what ran in the same rounds."""
    row = _filled(row, samples[entry])
    if baseline in samples:
        q25, median, q75 = paired_ratio(samples[entry], samples[baseline])
        row = replace(row, ratio=median, ratio_q25=q25, ratio_q75=q75)
    if SET_T1 in samples:
        q25, median, q75 = paired_ratio(samples[entry], samples[SET_T1])
        row = replace(row, ratio_t1=median, ratio_t1_q25=q25, ratio_t1_q75=q75)
    return row


def _attention_row(case: AttentionCase, entry: Entry, device: str) -> Row:
    """Everything of a row that is known before it is measured."""
    scan = case.mask == "causal" and (entry.T or 0) <= 1
    op = "causal" if scan else "masked" if case.mask else "packed" if entry.impl == PACKED else "attention"
    problem = Problem(op, device, torch.float32, D=case.D, E=case.E, M=case.M, num_iters=entry.T or 0)
    backend = dispatch.select(problem) if entry.impl in ("set", PACKED) else ""
    work = 0.0 if case.mask else float(case.matmul_flops())  # under a mask what is done depends on it
    return _row(
        case, entry.impl, T=entry.T, B=case.B, H=case.H, L=case.L, M=case.M, D=case.D, work=work, backend=backend
    )


def _sinkhorn_row(case: SinkhornCase, impl: str, device: str) -> Row:
    """Everything of a row that is known before it is measured; B holds G and L holds N."""
    problem = Problem("sinkhorn", device, torch.float32, M=case.M, num_iters=case.T)
    backend = dispatch.select(problem) if impl == "set" else ""
    return _row(case, impl, T=case.T, B=case.G, L=case.N, M=case.M, backend=backend)


def _row(case: AttentionCase | SinkhornCase, impl: str, **known: Any) -> Row:
    return Row(case=case.name, impl=impl, mode=case.mode, metric="time", unit="s", status=SKIPPED, **known)
