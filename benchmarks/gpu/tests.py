"""The steps that test: the suite in several processes, for a limited time, with nothing but pytest."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu import plugin
from benchmarks.gpu.journal import Record
from benchmarks.gpu.process import Worker, supervise
from benchmarks.gpu.steps import FAILED, OK, Run, Step, shares

SILENCE_S = 90.0  # a test that compiles a dozen kernels while every core does
# pytest's exit status: 0 and 1 are told by the outcomes, 5 is an empty share; all else is no test run at all.
CLEAN = frozenset({0, 1, 5})
# Installed plugins are not loaded (one unknown warning would be an error), and the options that need them are dropped;
# versions that are not the tested ones have warnings of their own, which are no errors here.
OPTIONS = ("-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors",
           "-p", "benchmarks.gpu.plugin")  # fmt: skip
ELSEWHERE = ("tests", "--ignore", "tests/models")  # models need no GPU, and minutes


class Result(NamedTuple):
    """What a part of the suite has found."""

    counts: dict[str, int]  # passed, failed, skipped, left (not run before the time was out)
    failures: list[str]

    @property
    def summary(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.counts.items() if number) or "nothing ran"


def worker(run: Run, part: str, share: int, number: int, since: int) -> Worker:
    """One share of a part of the suite, with the step's own name: a later call has shares of its own."""
    name = f"{part} {share}/{number} from {since}"
    dropped = [backend for backend in run.canaries() if backend not in run.alive()]
    variables = {
        plugin.SHARE: f"{share}/{number}",
        plugin.WORKER: name,
        plugin.JOURNAL: str(run.journal.path),
        plugin.SINCE: str(since),
        plugin.PART: part,
        plugin.DROPPED: ",".join(dropped),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    where = run.tests or (plugin.FILES if part == plugin.KERNELS else ELSEWHERE)
    command = [sys.executable, "-m", "pytest", *OPTIONS, *where]
    return Worker(name, lambda left: command, run.logs / f"{part}_{share}.log", variables, CLEAN)


def step(run: Run, seconds: float, part: str, number: int | None = None) -> Step:
    """A part of the suite in as many processes as the machine carries."""
    since = run.journal.size()
    count = number or shares()
    workers = [worker(run, part, share, count, since) for share in range(count)]
    supervise(workers, seconds, SILENCE_S, run.journal, run.system)
    off = [worker for worker in workers if worker.why and not worker.late]
    broken = [f"{worker.name} broke off: {worker.why}\n{_tail(worker)}" for worker in off]
    found = result([r for r in run.journal.read(since=since) if r.get("worker", "").startswith(f"{part} ")], broken)
    ran = found.counts["passed"] + found.counts["failed"]
    late = " (left: not run before the time was out)" if found.counts["left"] else ""
    status = FAILED if found.failures or not (ran or found.counts["skipped"]) else OK
    return Step(part, status, found.summary + late, details=tuple(found.failures))


def _tail(one: Worker) -> str:
    return one.log.read_text(errors="replace")[-2000:] if one.log.exists() else ""


def result(records: Sequence[Record], broken: Sequence[str] = ()) -> Result:
    """What the records of a part's workers say; a test that was lost has failed."""
    outcomes: dict[str, Record] = {}
    planned: set[str] = set()
    for record in records:
        planned |= set(record.get("plan", ()))
        if "lost" in record:
            outcomes[record["lost"]] = {"outcome": "failed", "text": record["why"]}
        elif "outcome" in record:
            outcomes[record["end"]] = record
    counts: Counter[str] = Counter(passed=0, failed=0, skipped=0, left=0)
    counts.update(record["outcome"] for record in outcomes.values())
    counts["left"] = len(planned - set(outcomes))
    failed = {test: record for test, record in outcomes.items() if record["outcome"] == "failed"}
    return Result(dict(counts), [*(f"{test}\n{record['text']}" for test, record in failed.items()), *broken])
