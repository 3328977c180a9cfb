"""Commands in sessions of their own, ended with everything that they started; workers that are started again.

A worker tells the journal what it is at.  One that dies, or says nothing for too long, loses what it was at and goes on
with the rest in a new process: an error that stays in a CUDA context, or a kernel that never returns, costs one item.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.gpu.journal import Journal, Record, write_lost

ROOT = Path(__file__).resolve().parents[2]
STICKY = 70  # exit status of a worker whose device answers nothing any more
POLL_S = 0.05
END_S = 10.0
MOST_STARTS = 6  # of one worker in one step
LEAST_S = 5.0  # with less time left nothing is started


class Process(Protocol):
    """A command that runs."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def end(self) -> None:
        """Ends it and whatever it started; nothing where that is over."""


class Session:
    """A command in a session of its own."""

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, **options)  # type: ignore[call-overload]

    def poll(self) -> int | None:
        return self._process.poll()  # type: ignore[no-any-return]

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits in the driver may outlive even this
            self._process.wait(END_S)


class System:
    """Processes, time and tools of this machine; a rehearsal has a stand-in."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def which(self, tool: str) -> str | None:
        return shutil.which(tool)

    def start(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Process:
        return Session(command, log, variables)


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of this folder with this interpreter."""
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *map(str, arguments)]


def last_line(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


@dataclass
class Child:
    """A command that runs once."""

    command: Sequence[str]
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    process: Process | None = None
    status: int | None = None  # its exit status; None: stopped, its time was out

    def start(self, system: System) -> None:
        self.log.unlink(missing_ok=True)
        self.process = system.start(self.command, self.log, self.variables)

    def over(self) -> bool:
        """Whether it has ended by itself."""
        if self.process is not None and self.status is None:
            self.status = self.process.poll()
        return self.status is not None

    def end(self) -> None:
        if self.process is not None:
            self.process.end()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def child(
    system: System, command: Sequence[str], seconds: float, log: Path, **variables: str
) -> tuple[int | None, str]:
    """A command's exit status (None: stopped, its time was out) and output, which also goes to `log`."""
    one = Child(command, log, variables)
    one.start(system)
    deadline = system.now() + seconds
    try:
        while not one.over() and system.now() < deadline:
            system.sleep(POLL_S)
    finally:
        one.end()
    return one.status, one.output()


def children(system: System, all_of: Sequence[Child], seconds: float, at_once: int) -> None:
    """Runs commands in their order, so many side by side; those that the time does not reach have no process."""
    deadline = system.now() + seconds
    waiting, running = list(all_of), list[Child]()
    try:
        while True:
            for one in [one for one in running if one.over()]:
                one.end()
                running.remove(one)
            while waiting and len(running) < at_once and deadline - system.now() >= LEAST_S:
                running.append(waiting.pop(0))
                running[-1].start(system)
            if not running or system.now() >= deadline:
                return
            system.sleep(POLL_S)
    finally:
        for one in running:
            one.end()


@dataclass
class Worker:
    """A command that works through items and writes them to the journal under its name."""

    name: str
    command: Callable[[float], Sequence[str]]  # of the seconds that are left
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    clean: frozenset[int] = frozenset({0})  # exit statuses that end it
    starts: int = 0
    process: Process | None = None
    heard: float = 0.0
    open: Record | None = None  # what it has begun and not ended
    why: str = ""  # it did not get through
    late: bool = False  # because the time was out
    status: int | None = None

    def start(self, system: System, seconds: float) -> None:
        self.process = system.start(self.command(seconds), self.log, self.variables)
        self.starts, self.heard, self.open = self.starts + 1, system.now(), None


def supervise(workers: Sequence[Worker], seconds: float, silence_s: float, journal: Journal, system: System) -> None:
    """Runs workers side by side until all have ended or the time is out; `why` says which did not get through."""
    deadline = system.now() + seconds
    watch = _Watch(workers, deadline, silence_s, journal, system)
    journal.follow()
    try:
        for worker in workers:
            worker.start(system, seconds)
        while any(worker.process for worker in workers) and system.now() < deadline:
            system.sleep(POLL_S)
            for worker in workers:
                watch.judge(worker)
        watch.listen()
        for worker in workers:
            if worker.process:
                worker.late = True
                worker.why = f"out of time at {worker.open['begin']}" if worker.open else "out of time"
    finally:
        for worker in workers:
            if worker.process:
                worker.process.end()
                worker.process = None


class _Watch:
    """What `supervise` knows."""

    def __init__(
        self, workers: Sequence[Worker], deadline: float, silence_s: float, journal: Journal, system: System
    ) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.deadline, self.silence_s, self.journal, self.system = deadline, silence_s, journal, system

    def listen(self) -> None:
        """Take in what the workers wrote."""
        for record in self.journal.follow():
            worker = self.workers.get(record.get("worker", ""))
            if worker is None:
                continue
            worker.heard = self.system.now()
            if "begin" in record:
                worker.open = record
            elif "end" in record or "lost" in record:
                worker.open = None

    def judge(self, worker: Worker) -> None:
        """Whether a worker goes on, is through, or is started again without what it was at."""
        if worker.process is None:
            return
        status = worker.process.poll()
        self.listen()
        silent = self.system.now() - worker.heard > self.silence_s
        if status is None and not silent:
            return
        worker.process.end()
        worker.process, worker.status = None, status
        if status in worker.clean:
            return
        said = last_line(worker.log.read_text(errors="replace")) if worker.log.exists() else "no output"
        why = f"hung: nothing for {self.silence_s:.0f} s" if status is None else f"died ({_ending(status)}): {said}"
        begun, left = worker.open, self.deadline - self.system.now()
        if begun:
            write_lost(self.journal, worker.name, begun, why)
        if (begun or status == STICKY) and worker.starts < MOST_STARTS and left > LEAST_S:
            worker.start(self.system, left)
        else:
            worker.why = why


def _ending(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"
