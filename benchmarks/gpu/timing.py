"""The steps that measure: a process for each backend, so that an error of one takes no rows of another."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import entry_point
from benchmarks.common.results import OK as MEASURED
from benchmarks.common.results import Row
from benchmarks.gpu.cases import PARTS
from benchmarks.gpu.journal import Record, identity, rows
from benchmarks.gpu.process import Worker, module, supervise
from benchmarks.gpu.steps import FAILED, OK, SKIPPED, Run, Step

SILENCE_S = {"headline": 60.0, "sweep": 60.0, "compiled": 120.0}  # torch.compile takes its time
BEGIN_SHARE = 0.85  # of its time, after which a worker begins no case: what has begun is to end


def worker(run: Run, part: str, name: str, reference: bool) -> Worker:
    """A backend's process for a part of the table."""

    def command(seconds: float) -> list[str]:
        options = [*(["--dry-run"] if run.dry else []), *([] if reference else ["--no-reference"])]
        return module("measure", run.journal.path, name, part, "--seconds", f"{BEGIN_SHARE * seconds:.1f}", *options)

    return Worker(f"{part} {name}", command, run.logs / f"{part}_{name}.log", run.variables())


def step(run: Run, seconds: float, part: str) -> Step:
    """Every backend that passed its canary, one after the other, each with an equal share of what time is left."""
    alive, deadline, before, broken = run.alive(), run.system.now() + seconds, run.journal.size(), []
    if not alive:
        return Step(part, FAILED, "no backend passed its canary")
    for index, name in enumerate(alive):
        one = worker(run, part, name, reference=index == len(alive) - 1)
        share = (deadline - run.system.now()) / (len(alive) - index)
        supervise([one], share, SILENCE_S[part], run.journal, run.system)
        if one.log.exists():
            print(one.log.read_text(errors="replace"), end="", flush=True)
        if one.why and not one.late and one.status != entry_point.NOT_HERE:
            broken.append(f"{name} broke off: {one.why}")
    return judged(part, run.journal.read(), run.journal.read(since=before), broken)


def judged(part: str, records: Sequence[Record], new: Sequence[Record], broken: Sequence[str] = ()) -> Step:
    """What a part's rows say about it: FAILED where something was lost, or a backend raised, in this call."""
    cases = {*PARTS[part], *(("host", "memory", "sinkhorn", "probe") if part == "headline" else ())}
    found = [row for row in rows(records) if row.case in cases]
    measured = sum(row.status == MEASURED for row in found)
    late = sum(row.status == SKIPPED for row in found)
    troubles = [f"{r['worker']}, {r['lost']}, {r['entry'] or 'all'}: {r['why']}" for r in new if "lost" in r]
    lost = {identity(Row(**r["row"])) for r in new if "lost" in r and "row" in r}
    own = [row for row in rows(new) if row.status == FAILED and row.impl == row.backend and identity(row) not in lost]
    troubles += [f"{row.impl} T={row.T}, {row.case} {row.mode} L={row.L}: {row.note}" for row in own]
    troubles += broken
    summary = f"{measured} rows" + (f", {late} cases out of time" if late else "")
    summary += f"; {len(troubles)} lost: {'; '.join(troubles[:5])}" if troubles else ""
    return Step(part, FAILED if troubles or not measured else OK, summary, details=tuple(troubles))
