"""`python -m benchmarks.gpu.canary JOURNAL BACKEND`: is a backend right on this machine, before anything depends on it.

A process for each backend, with a limit: one that is wrong, raises, or never returns is dropped and named, and takes
nothing of the others with it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import entry_point
from benchmarks.common.results import OK as MEASURED
from benchmarks.common.results import Row
from benchmarks.gpu.cases import GpuPlan, Inputs, inputs, plan_of, problems, set_attention
from benchmarks.gpu.device import Cpu, Gpu
from benchmarks.gpu.journal import Journal, Log, written
from benchmarks.gpu.process import child, last_line, module
from benchmarks.gpu.rows import blank, first_line
from benchmarks.gpu.steps import FAILED, OK, Run, Step
from setformer_kernels import dispatch, testing
from setformer_kernels.backends import _extension

LIMIT_S = 60.0  # imports, a dozen compilations and a second of work
ABSENT = "absent"  # a backend that this machine does not have: no failure


def reasons(plan: GpuPlan, backend: str) -> list[str]:
    """Why this machine cannot run the canary on a backend."""
    asked = problems(plan.check, plan.device)
    return list(dict.fromkeys(r for p in asked for r in dispatch.NATIVE[backend].unsupported_reasons(p)))


def chip(extension: Any, device: Gpu | Cpu) -> dict[str, object]:
    """What the CUDA C++ backend lays problems out for: the driver's word on the first device."""
    device.synchronize()  # makes a context: without one the driver is not asked, and counts of clusters are estimates
    *_, shared, largest, at_once = extension.cuda_devices()[0]
    clusters = {str(2**i): count for i, count in enumerate(at_once)}
    return {"shared_bytes": shared, "largest_cluster": largest, "clusters_at_once": clusters}


def checked(plan: GpuPlan, backend: str, T: int) -> Row:
    """The output and every gradient within the error budget, or an AssertionError."""
    case = plan.check
    x = inputs(case, plan.device)
    leaves = dict(zip(("query", "key", "value", "references"), x[:4], strict=True))

    def run(query: Tensor, key: Tensor, value: Tensor, references: Tensor, by: str) -> Tensor:
        return set_attention(Inputs(query, key, value, references, x.d_output), T, by)

    by_reference = functools.partial(run, by="reference")
    with torch.device(plan.device):
        exact, model = testing.model_inputs(by_reference, leaves, case.dtype, x.d_output)
    fast = testing.gradients(functools.partial(run, by=backend), leaves, x.d_output)
    testing.assert_within_budget(fast, exact, model, f"{backend}, T = {T}:")
    error = ((fast["output"].double() - exact["output"]).norm() / exact["output"].norm()).item()
    print(f"correct: {backend} T={T}, relative error of o {error:.2g}", flush=True)
    row = blank(case, backend, T, backend, metric="error", unit="relative")
    return replace(row, status=MEASURED, note="", runs=1, median=error, q25=error, q75=error)


def step(run: Run, seconds: float) -> Step:
    """A canary for each backend; what failed is dropped, and the step says so."""
    notes, failed, deadline = [], False, run.system.now() + seconds
    for name in run.backends:
        left = deadline - run.system.now()
        status, why = _sent(run, name, min(LIMIT_S, left)) if left > 0 else (FAILED, "out of time")
        run.journal.write(canary=name, status=status, why=why)
        if status == FAILED:
            lost = blank(plan_of(run.dry).check, name, 3, name, metric="error", unit="relative")
            run.journal.write(row=written(replace(lost, status=FAILED, note=f"dropped: {why}")))
        failed |= status == FAILED
        notes.append({OK: f"{name} is right", FAILED: f"{name} is dropped: {why}"}.get(status, f"{name}: {why}"))
    alive = run.alive()
    return Step("canary", OK if alive and not failed else FAILED, "; ".join(notes) or "no GPU backend")


def _sent(run: Run, name: str, seconds: float) -> tuple[str, str]:
    command = module("canary", run.journal.path, name, *(["--dry-run"] if run.dry else []))
    status, output = child(run.system, command, seconds, run.logs / f"canary_{name}.log", **run.variables())
    if status == 0:
        return OK, ""
    if status == entry_point.NOT_HERE:
        return ABSENT, last_line(output)
    return FAILED, f"hung: no answer in {seconds:.0f} s" if status is None else last_line(output)


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where the backend is wrong or raises."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.canary", description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("backend", choices=[name for name in dispatch.NATIVE if name != "cpu"])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args(argv)
    plan = plan_of(arguments.dry_run)
    if found := reasons(plan, arguments.backend):
        raise entry_point.NotHereError("; ".join(found))
    journal = Journal(arguments.journal)
    log = Log(journal, f"canary {arguments.backend}")
    try:
        if arguments.backend == "cuda":
            journal.write(chip=chip(_extension.MODULE, Cpu() if arguments.dry_run else Gpu()))
        for T in (3, 1):
            log.row(checked(plan, arguments.backend, T))
    except AssertionError as error:
        print(f"wrong: {first_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.canary", main)
