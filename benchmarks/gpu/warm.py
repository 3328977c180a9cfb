"""`python -m benchmarks.gpu.warm JOURNAL I/N`: Triton's compilations of a run, on all cores, before the GPU waits.

The calls of the canary, the table and the smoke run go through the backend with its launches taken instead of run; the
distinct binaries are shared among N processes, which compile them into Triton's cache.  Nothing runs on the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import entry_point
from benchmarks.common.cases import BOTH
from benchmarks.gpu import smoke
from benchmarks.gpu.cases import GpuCase, full_plan, inputs, set_attention
from benchmarks.gpu.journal import Journal, Log
from benchmarks.gpu.process import Worker, module, supervise
from benchmarks.gpu.rows import first_line
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step, shares
from setformer_kernels import dispatch
from setformer_kernels import functional as SF

SILENCE_S = 60.0
BACKEND = "triton"


def _attention(case: GpuCase, T: int, device: str) -> None:
    x = inputs(replace(case, mode=BOTH), device)
    torch.autograd.grad(set_attention(x, T, BACKEND, case.causal), x[:4], x.d_output)


def _smoke(call: Callable[[str], torch.Tensor]) -> None:
    call(BACKEND).float().sum().backward()


def calls(device: str) -> Iterator[Callable[[], object]]:
    """What is going to run, the table first: split among programs and not, as no other length matters."""
    plan = full_plan()
    kinds = {(case.D, case.M, case.dtype): case for case in (plan.check, *plan.cases, *plan.memory) if not case.causal}
    for case in kinds.values():
        for T, (B, L) in itertools.product((3, 1), ((1, 4096), (8, 256))):
            yield lambda case=case, T=T, B=B, L=L: _attention(replace(case, B=B, L=L), T, device)
    for case in (case for case in plan.cases if case.causal and case.mode == BOTH):
        yield lambda case=case: _attention(case, max(case.iterations), device)
    for problems, n, m, T in plan.sinkhorn:
        l = torch.zeros(problems, n, m, device=device)
        yield lambda l=l, T=T: SF.sinkhorn(l, num_iters=T, backend=BACKEND)
    for problem, call in smoke.calls(device):
        if not dispatch.NATIVE[BACKEND].unsupported_reasons(problem):
            yield lambda call=call: _smoke(call)


def taken(device: str) -> list[Any]:
    """The launches of all calls."""
    from setformer_kernels.backends.triton.host.launch import device_of, recorded

    with recorded(device_of(torch.empty(0, device=device))) as launches:
        for call in calls(device):
            call()
    return launches


def compile_share(log: Log, share: int, number: int) -> None:
    """Every `number`-th binary, from `share` on; one that does not compile is named, and the next one is tried."""
    from benchmarks.compiled import aot

    found = taken("cuda")
    family = "sm_90"  # it is asked for keys alone, which name no target
    for variant in aot.variants(found, family)[share::number]:
        item = f"{variant.name} {hash_of(variant.key)}"
        if log.over(item):
            continue
        log.begin(item)
        try:
            aot.compiled_here(variant)
            log.end(item, outcome="ok")
        except Exception as error:
            log.end(item, outcome="failed", text=f"{variant.name}: {type(error).__name__}: {first_line(error)}")


def hash_of(key: str) -> str:
    """A short name of a specialisation."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def step(run: Run, seconds: float) -> Step:
    """All shares side by side."""
    if run.dry:
        return Step("warm", SKIPPED, "kernels are interpreted")
    number, before = shares(), run.journal.size()
    workers = [
        Worker(f"warm {i}/{number}", lambda left, i=i: module("warm", run.journal.path, f"{i}/{number}"),
               run.logs / f"warm_{i}.log", clean=frozenset({0, entry_point.NOT_HERE}))
        for i in range(number)
    ]  # fmt: skip
    supervise(workers, seconds, SILENCE_S, run.journal, run.system)
    new = run.journal.read(since=before)
    ended = [record for record in new if "outcome" in record]
    failed = sorted({record["text"] for record in ended if record["outcome"] == "failed"})
    failed += [f"{record['worker']}, {record['lost']}: {record['why']}" for record in new if "lost" in record]
    late = sum(worker.late for worker in workers)
    failed += [f"{worker.name}: {worker.why}" for worker in workers if worker.why and not worker.late]
    summary = f"{len(ended)} binaries in {number} processes" + (f", {late} stopped: out of time" if late else "")
    summary += f"; {len(failed)} did not compile: {failed[0]}" if failed else ""
    return Step("warm", FAILED if failed else OK if ended else SKIPPED, summary, details=tuple(failed))


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("share", help="I/N: the I-th of N processes")
    arguments = parser.parse_args(argv)
    share, number = map(int, arguments.share.split("/"))
    reason = dispatch.NATIVE[BACKEND].ABSENT or ("" if torch.cuda.is_available() else "no GPU")
    if reason:
        raise entry_point.NotHereError(reason)
    compile_share(Log(Journal(arguments.journal), f"warm {arguments.share}"), share, number)
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.warm", main)
