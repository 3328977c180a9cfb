"""A machine with a GPU made of stand-ins: processes, time, device, profiler; what fails on it, and how, is asked for.

The workers' own code runs, in this process, on calls that take no time; time passes where somebody waits.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.common import entry_point, implementations
from benchmarks.common import measure as common
from benchmarks.common.cases import Entry
from benchmarks.compiled import aot
from benchmarks.gpu import build, canary, measure, plugin, sanitizer, steps, table, tests, warm
from benchmarks.gpu import profile as profiling
from benchmarks.gpu.cases import Call, GpuCase, Inputs, dry_plan
from benchmarks.gpu.journal import Journal, Log
from benchmarks.gpu.process import STICKY, System
from benchmarks.gpu.rows import blank, filled
from setformer_kernels import dispatch

BACKENDS = ("cuda", "triton")
# Rank 0 and 1 run in the step `kernels`, what comes after in `tests`.
TESTS = ("tests/test_cuda_kernels.py::test_a[gpu]", "tests/test_cuda_kernels.py::test_b[gpu]",
         "tests/test_backends.py::test_c[triton]", "tests/test_backends.py::test_d[triton]",
         "tests/test_ops.py::test_e", "tests/test_ops.py::test_f")  # fmt: skip
BINARIES = ("one_kernel", "two_kernel", "three_kernel")
ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Hang(BaseException):
    """What never returns."""


class Death(BaseException):
    """The end of a process."""

    def __init__(self, status: int) -> None:
        self.status = status


class Running:
    """A process that has done what it does, and ends, or not, as time passes."""

    def __init__(self, world: World, took: float, status: int) -> None:
        self.world, self.due, self.status, self.ended = world, world.time + took, status, False

    def poll(self) -> int | None:
        return self.status if self.world.time >= self.due else None

    def end(self) -> None:
        self.ended = True


class StandInDevice:
    """A device that may stop answering."""

    name = "cuda"

    def __init__(self) -> None:
        self.is_broken = False
        self.has_context = False

    def clock(self, call: Call, repeats: int) -> float:
        call()
        return 1e-3

    def label(self) -> str:
        return "stand-in"

    def synchronize(self) -> None:
        self.has_context = True
        if self.is_broken:
            raise RuntimeError(ILLEGAL)

    def broken(self) -> bool:
        return self.is_broken

    def graph(self, call: Call) -> tuple[Call, int, str]:
        return call, 1, "graph"

    def forget(self) -> None:
        self.synchronize()


@dataclass
class World(System):
    """The machine: `accidents` says what happens where, from "raise", "hang", "sticky", "die" and "wrong"."""

    accidents: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ("nvcc", "c++", "ncu", "compute-sanitizer")
    time: float = 0.0
    commands: list[list[str]] = field(default_factory=list)
    processes: list[Running] = field(default_factory=list)
    device: StandInDevice = field(default_factory=StandInDevice)
    met: list[str] = field(default_factory=list)
    most_at_once: int = 0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += max(seconds, 0.5)

    def which(self, tool: str) -> str | None:
        return f"/usr/bin/{tool}" if tool in self.tools else None

    def start(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Running:
        self.commands.append(list(command))
        self.device = StandInDevice()
        took, status = 1.0, 0
        try:
            with log.open("a") as out:
                status = self.does(list(command), out, variables)
        except Hang:
            took = math.inf
        except Death as death:
            status = death.status
        self.processes.append(Running(self, took, status))
        self.most_at_once = max(self.most_at_once, sum(not one.ended for one in self.processes))
        return self.processes[-1]

    def meet(self, place: str) -> None:
        """What happens at a place."""
        self.device.synchronize()
        kind = self.accidents.get(place, "")
        if not kind:
            return
        self.met.append(place)
        if kind == "hang":
            raise Hang
        if kind == "die":
            raise Death(-11)
        if kind == "wrong":
            raise AssertionError(f"{place}: error 1, budget 0.1")
        self.device.is_broken = kind == "sticky"
        raise RuntimeError(ILLEGAL if kind == "sticky" else f"{place} raised")

    def does(self, command: list[str], out: Any, variables: Mapping[str, str]) -> int:
        """A command's own work; its exit status."""
        words = command[1:]
        tool = Path(command[0]).name
        if tool in ("ncu", "compute-sanitizer"):
            return self.watched(tool, command, out)
        if words[0] in ("setup.py", "-c"):
            return self.plain("build", out) if words[0] == "setup.py" else 0
        if words[1] == "pytest":
            return self.pytest(variables)
        name, arguments = words[1].removeprefix("benchmarks.gpu."), words[2:]
        return getattr(self, name)(arguments, out)

    def plain(self, place: str, out: Any) -> int:
        """A program that may fail."""
        try:
            self.meet(place)
        except (RuntimeError, AssertionError) as error:
            print(f"{type(error).__name__}: {error}", file=out)
            return 1
        return 0

    def canary(self, arguments: list[str], out: Any) -> int:
        return _exit(canary.main, arguments, out)

    def measure(self, arguments: list[str], out: Any) -> int:
        journal, backend, part = Path(arguments[0]), arguments[1], arguments[2]
        log = Log(Journal(journal), f"{part} {backend}")
        reference = "--no-reference" not in arguments
        one = measure.Measure(plan(), backend, self.device, log, 1e9, reference=reference)  # type: ignore[arg-type]
        return one.run(part)

    def warm(self, arguments: list[str], out: Any) -> int:
        share, number = map(int, arguments[1].split("/"))
        warm.compile_share(Log(Journal(Path(arguments[0])), f"warm {arguments[1]}"), share, number)
        return 0

    def smoke(self, arguments: list[str], out: Any) -> int:
        print(f"{arguments[1]} attention", file=out)
        return self.plain(f"smoke {arguments[1]}", out) or print("27 calls", file=out) or 0

    def profile(self, arguments: list[str], out: Any) -> int:
        name, L = arguments[0], arguments[1]
        times = [["transport_kernel", 3, 12.5]]
        status = self.plain(f"profile {name} {L}", out)
        print(profiling.TIMES + profiling.json.dumps(times), file=out)
        return status

    def watched(self, tool: str, command: list[str], out: Any) -> int:
        """A program under a tool."""
        at = command.index("-m")
        arguments = command[at + 2 :]
        if tool == "compute-sanitizer":
            place = f"{command[command.index('--tool') + 1]} {arguments[1]}"
            status = 9 * self.plain(place, out)
            print(f"========= ERROR SUMMARY: {status} errors", file=out)
            return status
        status = self.plain(f"ncu {arguments[0]} {arguments[1]}", out)
        if not status:
            _ncu_report(Path(command[command.index("--log-file") + 1]))
        return status

    def pytest(self, variables: Mapping[str, str]) -> int:
        """The plugin's hooks in the order in which pytest calls them."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(plugin, "broken", lambda: self.device.is_broken)
            patch.setattr(plugin.os, "_exit", _die)
            items = [SimpleNamespace(nodeid=test, fixturenames=()) for test in TESTS]
            plugin.pytest_collection_modifyitems(None, items)
            for item in items:
                self._test(item.nodeid)
        return 0

    def _test(self, nodeid: str) -> None:
        plugin.pytest_runtest_logstart(nodeid, None)
        failed, text = False, ""
        try:
            self.meet(nodeid)
        except (RuntimeError, AssertionError) as error:
            failed, text = True, str(error)
        outcome = "failed" if failed else "passed"
        report = SimpleNamespace(nodeid=nodeid, when="call", outcome=outcome, failed=failed, duration=0.1,
                                 longreprtext=text)  # fmt: skip
        plugin.pytest_runtest_logreport(report)
        plugin.pytest_runtest_logfinish(nodeid, None)


def _exit(main: Callable[[list[str]], int], arguments: list[str], out: Any) -> int:
    """A worker's own main, with what it prints in its log."""
    import contextlib

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            return main(arguments)
        except entry_point.NotHereError as error:
            print(error)
            return entry_point.NOT_HERE


def _die(status: int) -> None:
    raise Death(status)


def _ncu_report(path: Path) -> None:
    columns = ("ID", "Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value")
    with path.open("w") as file:
        print("==PROF== Connected to process 1", file=file)
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerow((0, "transport_kernel", "GPU Speed Of Light Throughput", "Duration", "us", "12.5"))


def plan() -> Any:
    """The dry run's, without solvers, which have no stand-in."""
    return replace(dry_plan(), sinkhorn=())


def calls_of(world: World) -> Callable[[Any, GpuCase, Inputs], dict[Entry, Call]]:
    """What `Measure.calls` gives: the entries of a case, as calls that may meet an accident."""

    def calls(self: Any, case: GpuCase, x: Inputs) -> dict[Entry, Call]:
        entries = [Entry(self.backend, T) for T in case.iterations]
        entries += [Entry("compiled", 3)] if case.compiled else [Entry("sdpa flash", None), Entry("copy", None)]

        def call(entry: Entry) -> Iterator[None]:
            first = True
            while True:
                # the first call is an implementation's own, those that come later are the rounds'
                world.meet(f"{case.name} {case.mode} {self.backend}: {entry}" + ("" if first else " later"))
                first = False
                yield

        return {entry: call(entry).__next__ for entry in entries}

    return calls


def described(device: StandInDevice) -> tuple[Any, ...]:
    """What the extension says of a device: clusters as its driver counts them, estimated where there is no context."""
    return (9, 0, 132, 232448, 8, (132, *((64, 28, 13) if device.has_context else (66, 30, 15))))


def install(world: World, patch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where the workers look."""
    able = SimpleNamespace(unsupported_reasons=lambda problem: [], ABSENT="")
    patch.setattr(dispatch, "NATIVE", {"cpu": able, "cuda": able, "triton": able})
    patch.setattr(canary, "plan_of", lambda dry: plan())

    def checked(of: Any, backend: str, T: int) -> Any:
        world.meet(f"canary {backend}")
        return filled(blank(of.check, backend, T, backend, metric="error", unit="relative"), [1e-3])

    patch.setattr(canary, "checked", checked)
    patch.setattr(canary._extension, "MODULE", SimpleNamespace(cuda_devices=lambda: [described(world.device)]))
    patch.setattr(canary, "Gpu", lambda: world.device)
    patch.setattr(measure.Measure, "calls", calls_of(world))
    patch.setattr(measure, "host_times", lambda case, backend, device: world.meet(f"host {backend}") or [3e-5])
    patch.setattr(measure, "PROBES", {"matmul": ("FLOP/s", lambda of: (lambda: world.meet("probe"), 1e12))})
    patch.setattr(warm, "taken", lambda device: list(BINARIES))
    variants = [SimpleNamespace(name=name, key=name, launch=name) for name in BINARIES]
    patch.setattr(aot, "variants", lambda launches, family: variants)
    patch.setattr(aot, "compiled_here", lambda variant: world.meet(f"warm {variant.name}"))
    for module in (warm, steps, tests, sanitizer):
        patch.setattr(module, "shares", lambda: 2)
    patch.setattr(implementations, "forget_graphs", lambda: None)
    patch.setattr(table, "draw", lambda rows, stamp, path: path.write_bytes(b""))
    patch.setattr(common.gc, "collect", lambda: 0)  # a tenth of a second before every case
    patch.setattr(build, "is_new", lambda: False)
    patch.setattr(build, "cuda_variables", lambda: {"SETFORMER_KERNELS_CUDA": "1"})


__all__ = ["BACKENDS", "BINARIES", "STICKY", "TESTS", "World", "install", "plan"]
