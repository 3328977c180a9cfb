"""`python -m benchmarks.gpu.profile BACKEND L`: one headline call, for a profiler; and the step that runs it under ncu.

The call's kernels are timed by torch.profiler first, which needs no permission; ncu then counts what a few of them do.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import entry_point
from benchmarks.common.cases import BOTH
from benchmarks.gpu.cases import GpuCase, inputs, problems, set_attention
from benchmarks.gpu.journal import Record
from benchmarks.gpu.process import LEAST_S, child, last_line, module
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step
from setformer_kernels import dispatch

LENGTHS = (4096, 16384)
KERNELS = {
    "cuda": ("attention_kernel", "attention_narrow_kernel", "attention_backward_kernel"),
    "triton": ("transport_kernel", "read_kernel", "read_backward_kernel", "transport_keys_backward_kernel"),
}
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")
REFUSED = re.compile(r"ERR_NVGPUCTRPERM|LibraryNotLoaded|not supported|does not have permission", re.I)
TIMES = "kernel times: "  # before the JSON that the worker prints


def counting(ncu: str, name: str, L: int, report: Path) -> list[str]:
    """ncu on the worker, between its start and its stop; the machine's clocks stay as they are."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    kernels = "regex:^(" + "|".join(KERNELS[name]) + ")$"
    options = ["--profile-from-start", "off", "--clock-control", "none", "--kernel-name", kernels]
    return [ncu, *options, *sections, "--csv", "--log-file", str(report), *module("profile", name, L)]


def metrics(report: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(kernel, section, metric, unit, value) of ncu's CSV."""
    lines = [line for line in report.splitlines() if not line.startswith("==")]
    for cells in csv.DictReader(lines):
        if cells.get("Metric Name"):
            yield tuple(cells.get(c) or "" for c in
                        ("Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value"))  # type: ignore[misc]  # fmt: skip


def step(run: Run, seconds: float) -> Step:
    """Times of all kernels, then ncu's counts of a few; a call that fails takes no other with it."""
    if run.dry:
        return Step("profile", SKIPPED, "kernels are interpreted")
    deadline, ncu, notes, errors, counted = run.system.now() + seconds, run.system.which("ncu"), [], [], 0
    calls = [(name, L) for L in LENGTHS for name in run.alive()]
    for name, L in calls:
        left, what = deadline - run.system.now(), f"{name} L={L}"
        if left < LEAST_S:
            notes.append(f"{what}: out of time")
            continue
        command = module("profile", name, L, "--times")
        status, output = child(run.system, command, left, run.logs / f"profile_{name}_{L}.log")
        _keep_times(run, name, L, output)
        if status == entry_point.NOT_HERE:
            notes.append(f"{what}: {last_line(output)}")
        elif status != 0:
            errors.append(f"{what}: {'out of time' if status is None else last_line(output)}")
        elif ncu and (left := deadline - run.system.now()) > LEAST_S:
            note, number = _counted(run, ncu, name, L, left)
            counted += number
            notes += [f"{what}: {note}"] if note else []
    if ncu is None:
        notes.append("ncu is not on the PATH")
    outcome = FAILED if errors or not calls else OK if counted else SKIPPED
    said = [f"{counted} metrics of kernels", *notes, *errors] if calls else ["no backend passed its canary"]
    return Step("profile", outcome, "; ".join(said), details=tuple(errors))


def _keep_times(run: Run, name: str, L: int, output: str) -> None:
    lines = [line.removeprefix(TIMES) for line in output.splitlines() if line.startswith(TIMES)]
    for kernel, calls, us in json.loads(lines[-1]) if lines else ():
        run.journal.write(profile=_metric(name, L, kernel, "torch.profiler", f"time of {calls} launches", "us", us))


def _metric(backend: str, L: int, kernel: str, section: str, metric: str, unit: str, value: Any) -> Record:
    return {"backend": backend, "L": L, "kernel": kernel, "section": section, "metric": metric, "unit": unit,
            "value": value}  # fmt: skip


def _counted(run: Run, ncu: str, name: str, L: int, seconds: float) -> tuple[str, int]:
    """A note where ncu did not count, and how many metrics it gave."""
    report = run.logs / f"ncu_{name}_{L}.csv"
    status, output = child(run.system, counting(ncu, name, L, report), seconds, run.logs / f"ncu_{name}_{L}.log")
    text = report.read_text(errors="replace") if report.exists() else ""
    found = list(metrics(text))
    for metric in found:
        run.journal.write(profile=_metric(name, L, *metric))
    if found:
        return "", len(found)
    if status is None:
        return "ncu: out of time", 0
    refused = REFUSED.search(output + text)
    return f"ncu: refused by this machine ({refused[0]})" if refused else f"ncu: {last_line(text or output)}", 0


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__)
    parser.add_argument("backend", choices=list(KERNELS))
    parser.add_argument("L", type=int)
    parser.add_argument("--times", action="store_true", help="print what torch.profiler says")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise entry_point.NotHereError("no GPU")
    case = GpuCase("headline", arguments.L, BOTH)
    unable = dispatch.NATIVE[arguments.backend].unsupported_reasons
    if found := [reason for problem in problems(case, "cuda") for reason in unable(problem)]:
        raise entry_point.NotHereError("; ".join(found))
    x = inputs(case, "cuda")

    def call() -> None:
        torch.autograd.grad(set_attention(x, 3, arguments.backend), x[:4], x.d_output)
        torch.cuda.synchronize()

    call()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.cudart().cudaProfilerStop()
    if arguments.times:
        print(TIMES + json.dumps(kernel_times(call)), flush=True)
    return 0


def kernel_times(call: Any) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds) of a call, the slowest first; none where the profiler is already in use."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as taken:
            call()
        found = [(e.key, e.count, float(e.device_time_total)) for e in taken.key_averages() if e.device_time_total]
    except RuntimeError as error:
        print(f"torch.profiler: {error}")
        return []
    return sorted(found, key=lambda one: -one[2])


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.profile", main)
