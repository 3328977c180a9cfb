"""What a step is, what it is given, and how steps share the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.common.hardware import default_threads
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.process import LEAST_S, System

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
TOTAL_S = 840.0
# At most this many seconds each, and what is left of the time of those before: what is worth most comes first.
SECONDS = {
    "build": 150.0,  # nvcc, a file a kernel, side by side
    "warm": 45.0,  # Triton's compilations, on all cores
    "canary": 90.0,
    "kernels": 120.0,  # the tests of the GPU backends
    "headline": 120.0,  # with memory, host time and Sinkhorn
    "profile": 60.0,
    "sanitizer": 90.0,
    "tests": 60.0,  # the other tests
    "sweep": 120.0,
    "compiled": 120.0,  # opponents that torch.compile makes: slow
}
MEMORY_PER_PROCESS = 2 << 30  # a CUDA context and the largest test


@dataclass
class Step:
    """What became of one step."""

    name: str
    status: str
    summary: str
    seconds: float = 0.0
    details: tuple[str, ...] = ()


@dataclass
class Run:
    """One call of the command: what its steps write to, and what they stand on."""

    journal: Journal
    logs: Path
    system: System = field(default_factory=System)
    dry: bool = False
    tests: tuple[str, ...] = ()
    prebuilt: Path | None = None
    backends: tuple[str, ...] = ()  # those that may be there

    def canaries(self) -> dict[str, tuple[str, str]]:
        """Backend -> what became of its last canary, and why."""
        told = [record for record in self.journal.read() if "canary" in record]
        return {record["canary"]: (record["status"], record["why"]) for record in told}

    def alive(self) -> list[str]:
        """The backends that passed their canary."""
        found = self.canaries()
        return [name for name in self.backends if found.get(name, ("", ""))[0] == OK]

    def variables(self) -> dict[str, str]:
        """What a process of a dry run finds in its environment: kernels are interpreted."""
        return {"TRITON_INTERPRET": "1"} if self.dry else {}


Steps = Mapping[str, Callable[[Run, float], Step]]


def shares() -> int:
    """Processes at a time: as many as cores and GPU memory allow."""
    import torch

    by_memory = torch.cuda.mem_get_info()[0] // MEMORY_PER_PROCESS if torch.cuda.is_available() else 2
    return max(1, min(default_threads(), int(by_memory), 16))


def wanted(only: Sequence[str]) -> list[str]:
    """The steps of a run in their order; none named: all."""
    return [name for name in SECONDS if not only or name in only]


NEED_CANARY = {"headline", "profile", "sanitizer", "sweep", "compiled"}


def with_canary(names: Sequence[str], run: Run) -> list[str]:
    """The steps, with the canary before the first that needs one where this run's journal has none."""
    if "canary" in names or run.canaries() or not NEED_CANARY & set(names):
        return list(names)
    return [name for name in SECONDS if name == "canary" or name in names]


def battery(
    names: Sequence[str],
    steps: Steps,
    run: Run,
    limits: Mapping[str, float],
    total_s: float,
    after: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Runs the steps in order; each is in the journal, and `after` has run, before the next begins."""
    now = run.system.now
    deadline, done = now() + total_s, []
    for index, name in enumerate(names):
        later = sum(limits[other] for other in names[index + 1 :])
        left, start = deadline - now(), now()
        share = max(min(left, limits[name]), left - later)
        if left < LEAST_S:
            step = Step(name, SKIPPED, "out of time")
        else:
            print(f"=== {name} (at most {share:.0f} s)", flush=True)
            step = _guarded(name, steps[name], run, share)
        step.seconds = round(now() - start, 1)
        run.journal.write(step=asdict(step))
        print(f"=== {step.name}: {step.status}, {step.seconds:.0f} s: {step.summary}", flush=True)
        for detail in step.details[:10]:
            print(detail, flush=True)
        done.append(step)
        with suppress(Exception):  # the journal has everything; the files are written again at the end
            after()
    return done


def _guarded(name: str, step: Callable[[Run, float], Step], run: Run, seconds: float) -> Step:
    try:
        return step(run, seconds)
    except Exception as error:  # one step's accident must not take the others' results
        return Step(name, FAILED, f"{type(error).__name__}: {error}")
