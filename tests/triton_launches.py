"""Launches of every Triton kernel with a GPU that does nothing, the package's way and Triton's own, side by side.

Run by test_triton_launch.py in a process whose kernels are not interpreted; prints what differed, and what was counted.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from benchmarks.compiled import workloads
from benchmarks.compiled.stubs import silent_triton
from benchmarks.compiled.workloads import Call
from setformer_kernels.backends.triton.host import direct
from setformer_kernels.backends.triton.host import launch as host
from setformer_kernels.backends.triton.host.tiles import Tile

started: list[tuple[Any, int, list[Any]]] = []  # binary, stream, arguments
by_triton = 0


def flat(args: Any) -> Iterator[Any]:
    for value in args:
        if isinstance(value, tuple):
            yield from flat(value)
        else:
            yield value


def given(args: Any) -> list[Any]:
    """Arguments as the hardware gets them: pointers in place of tensors."""
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in flat(args)]


driver = silent_triton(lambda binary, stream, args: started.append((binary, stream, given(args))))
jit_run = JITFunction.run


def counted_run(self: Any, *args: Any, **options: Any) -> Any:
    global by_triton
    by_triton += 1
    return jit_run(self, *args, **options)


JITFunction.run = counted_run


def recorded() -> Iterator[Any]:
    """A launch of every form in which the backend launches its kernels, on small problems."""
    seen = set()
    for launch in _all_recorded():
        form = (launch.kernel.fn.__name__, *map(str, launch.constants.values()), *map(_form, flat(launch.args)))
        if form not in seen:
            seen.add(form)
            yield launch


def _all_recorded() -> Iterator[Any]:
    for op in ("attention", "pool", "causal", "step", "masked", "features", "sinkhorn"):
        for dtype in (torch.float32,) if op == "sinkhorn" else (torch.bfloat16, torch.float32):
            for rich in (False, True):
                call = Call(
                    op,
                    T=1 if op in ("causal", "step") else 3,
                    B=2,
                    H=3,
                    L=40,
                    M=32,
                    dtype=dtype,
                    rich=rich,
                    mask="float",
                )
                for one in (call, replace(call, backward=True)):
                    yield from workloads.launches(one, "sm_90")
    call = Call("causal", T=1, B=2, H=3, L=40, M=32, given=workloads.STREAM)
    for one in (call, replace(call, backward=True)):
        yield from workloads.launches(one, "sm_90")


def _form(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value)


def changed(args: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*args[:at], value, *args[at + 1 :])


def shifted(t: Tensor) -> Tensor:
    """As `t`, one element further in memory, where nothing is aligned to 16 bytes."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)


def variations(launch: Any) -> Iterator[tuple[str, Any]]:
    """The launch, and launches that Triton reads otherwise: each what a cache that knows too little would confuse."""
    yield "as it is", launch
    yield "other warps", launch._replace(tile=launch.tile._replace(warps=2 * launch.tile.warps))
    names = list(launch.constants)
    flags = [name for name in names if isinstance(launch.constants[name], bool)]
    for name in flags:
        yield f"{name} not", launch._replace(constants=launch.constants | {name: not launch.constants[name]})
    for at, value in enumerate(launch.args):
        if isinstance(value, Tensor):
            other = torch.float64 if value.dtype == torch.float32 else torch.float32
            yield f"{at} unaligned", launch._replace(args=changed(launch.args, at, shifted(value)))
            yield f"{at} of another type", launch._replace(args=changed(launch.args, at, value.to(other)))
            yield f"{at} absent", launch._replace(args=changed(launch.args, at, None))
        elif isinstance(value, int):
            yield f"{at} wide", launch._replace(args=changed(launch.args, at, 2**31))
            yield f"{at} negative", launch._replace(args=changed(launch.args, at, -1))
        elif isinstance(value, tuple):
            for i, member in enumerate(value):
                if isinstance(member, Tensor):
                    for what, new in (("unaligned", shifted(member)), ("absent", None)):
                        group = value._replace(**{value._fields[i]: new})
                        yield f"{at}.{i} {what}", launch._replace(args=changed(launch.args, at, group))


def run(launch: Any) -> None:
    host.launch(*launch)


def triton_runs(launch: Any) -> None:
    launch.kernel[(launch.programs,)](*launch.args, **launch.constants, **direct.options_of(launch.tile))


def same(a: tuple[Any, int, list[Any]], b: tuple[Any, int, list[Any]]) -> bool:
    """One binary, on one stream, with equal arguments."""
    return a[0] is b[0] and a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(equal, a[2], b[2]))


def equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def compared(launches: list[Any]) -> tuple[list[str], int, int]:
    """(launches that differ from Triton's, how many were compared, how many of those went the short way)."""
    global by_triton
    wrong, total, short = [], 0, 0
    forms: Counter[str] = Counter()
    for launch in launches:
        forms[launch.kernel.fn.__name__] += 1
        every = forms[launch.kernel.fn.__name__] <= 2  # of a kernel's forms; the others as they are
        for what, one in itertools.islice(variations(launch), None if every else 1):
            started.clear()
            triton_runs(one)
            run(one)
            before = by_triton
            run(one)
            total, short = total + 1, short + (by_triton == before)
            if not (same(started[0], started[1]) and same(started[0], started[2])):
                wrong.append(f"{launch.kernel.fn.__name__}: {what}")
            if what == "as it is" and by_triton != before:
                wrong.append(f"{launch.kernel.fn.__name__}: by Triton")
    return wrong, total, short


def short_way(launch: Any, disturb: Callable[[], Any], restore: Callable[[], Any]) -> list[bool]:
    """Whether a launch goes the short way: before, while and after something is disturbed."""
    found = []
    run(launch)
    for step in (lambda: None, disturb, restore):
        step()
        before = by_triton
        run(launch)
        found.append(by_triton == before)
    return found


def disturbances(launch: Any) -> dict[str, list[bool]]:
    runtime, compilation = knobs.runtime, knobs.compilation

    def hook(*_: Any, **__: Any) -> None:
        """What a profiler would set."""

    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "enter hook": (lambda: enter.add(hook), lambda: enter.remove(hook)),
        "exit hook": (lambda: leave.add(hook), lambda: leave.remove(hook)),
        "hook in place of a chain": (
            lambda: setattr(runtime, "launch_enter_hook", hook),
            lambda: setattr(runtime, "launch_enter_hook", enter),
        ),
        "pre-run hook": (lambda: launch.kernel.add_pre_run_hook(hook), lambda: launch.kernel.pre_run_hooks.clear()),
        "debug": (lambda: setattr(runtime, "debug", True), lambda: setattr(runtime, "debug", False)),
        "instrumentation": (
            lambda: setattr(compilation, "instrumentation_mode", "proton"),
            lambda: setattr(compilation, "instrumentation_mode", ""),
        ),
    }
    return {name: short_way(launch, *pair) for name, pair in pairs.items()}


def elsewhere(launch: Any) -> list[str]:
    """What goes wrong where the current stream or device is another."""
    wrong = []
    run(launch)
    for device, stream in ((0, 8), (1, 9), (1, 10), (0, 7)):
        driver.device, driver.stream = device, stream
        started.clear()
        triton_runs(launch)
        run(launch)
        run(launch)
        if not (same(started[0], started[1]) and same(started[0], started[2]) and started[2][1] == stream):
            wrong.append(f"device {device}, stream {stream}")
    return wrong


def bounds() -> list[int | None]:
    """What a tile without and one with a bound of registers ask for, and the latter on an AMD GPU."""
    free, bounded = Tile(16, 64, 8, 1), Tile(16, 64, 8, 1, registers=255)
    asked = [direct.options_of(tile).get("maxnreg") for tile in (free, bounded)]
    with mock.patch.object(torch.version, "hip", "7.0"):
        return [*asked, direct.options_of(bounded).get("maxnreg")]


def main() -> None:
    launches = list(recorded())
    wrong, total, short = compared(launches)
    kernels = sorted({launch.kernel.fn.__name__ for launch in launches})
    found = {
        "wrong": wrong, "total": total, "short": short, "kernels": kernels, "elsewhere": elsewhere(launches[1]),
        "disturbed": disturbances(launches[1]),
        "bounds": bounds(),
        "launcher": tuple(inspect.signature(CudaLauncher.__call__).parameters)[1:] in direct.LAUNCHERS,
    }  # fmt: skip
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
