"""`python -m benchmarks.gpu.tune OUT`: other tiles for Triton's kernels, timed beside the table's own.

One row of the tile table (setformer_kernels/backends/triton/host/tiles.py) is changed at a time; a call's output and
gradients are held to the error budget, and whole calls timed as replays of a CUDA graph.  A line of JSON for each is in
OUT as it begins and as it ends: a tile that breaks the CUDA context ends the process with status 70, and the next one
goes on behind it.  The best of each row are printed last.  No file changes: a number moves into the table by hand.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import entry_point
from benchmarks.common.cases import BOTH, FORWARD
from benchmarks.gpu.cases import Call, GpuCase, Inputs, inputs, set_attention, timed_call
from benchmarks.gpu.device import Gpu, captured, event_clock
from benchmarks.gpu.process import STICKY
from benchmarks.gpu.rows import first_line
from setformer_kernels import testing
from setformer_kernels.backends.triton.host import launch, tiles
from setformer_kernels.backends.triton.host.tiles import Tile

DTYPES = {"half": torch.bfloat16, "single": torch.float32}
WIDTHS = {"small": (64, 64), "wide": (128, 64), "medium": (128, 128)}  # D = E, M
SAMPLES = 9


class Work(NamedTuple):
    """A call in which a kind of kernel takes its time, and the tiles that are tried."""

    kind: str
    op: str  # "attention", "causal" or "masked"
    backward: bool
    rows: tuple[int, ...]
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1, 2, 3)
    keys: tuple[int, ...] = (0,)


WORKS = (
    Work("column", "attention", False, (32, 64, 128)),
    Work("pooling", "attention", False, (32, 64, 128)),
    Work("row", "attention", False, (32, 64, 128)),
    Work("read_backward", "attention", True, (16, 32, 64, 128)),
    Work("columns_backward", "attention", True, (16, 32, 64, 128)),
    Work("keys_backward", "attention", True, (16, 32, 64, 128)),
    Work("chunk", "causal", False, (16, 32, 64), stages=(1, 2)),
    Work("chunk_backward", "causal", True, (16, 32), stages=(1, 2)),
    Work("masked", "masked", False, (16, 32, 64), stages=(1, 2), keys=(32, 64)),
    Work("masked_backward", "masked", True, (16, 32), stages=(1,), keys=(16, 32, 64)),
    Work("masked_keys_backward", "masked", True, (16, 32), stages=(1,), keys=(16, 32, 64)),
)
LENGTHS = {"attention": ((1, 16384), (8, 1024)), "causal": ((1, 8192),), "masked": ((1, 2048),)}  # B, L


def iterations(op: str) -> int:
    """T of a call: 3 launches every pass, and a scan has one."""
    return 1 if op == "causal" else 3


class Trial(NamedTuple):
    """One tile at one size; None: the table's own."""

    work: Work
    size: str
    half: str
    tile: Tile | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.work.kind, self.size, self.half


def trials(kinds: tuple[str, ...], sizes: tuple[str, ...], halves: tuple[str, ...], family: str) -> Iterator[Trial]:
    """The table's own tile of a row, then each other."""
    for half, size, work in itertools.product(halves, sizes, WORKS):
        if work.kind not in kinds:
            continue
        own = tiles.shipped(family, (work.kind, size, half))
        depths = sorted({own.depth, WIDTHS[size][0]} if half == "half" else {own.depth})
        yield Trial(work, size, half, None)
        for numbers in itertools.product(work.rows, depths, work.warps, work.stages, work.keys):
            tile = own._replace(**dict(zip(("rows", "depth", "warps", "stages", "keys"), numbers, strict=True)))
            if tile != own:
                yield Trial(work, size, half, tile)


@contextmanager
def changed(trial: Trial, family: str) -> Iterator[None]:
    """The table with the trial's tile."""
    before = tiles.OVERRIDES[family]
    if trial.tile is not None:
        tiles.OVERRIDES[family] = before | {trial.key: trial.tile}
    try:
        yield
    finally:
        tiles.OVERRIDES[family] = before


def call_of(trial: Trial, device: str, B: int, L: int) -> Call:
    """The forward, or forward and backward, that the trial times."""
    work, (D, M) = trial.work, WIDTHS[trial.size]
    mode, causal = BOTH if work.backward else FORWARD, work.op != "attention"
    case = GpuCase("tune", L, mode, B=B, D=D, M=M, dtype=DTYPES[trial.half], causal=causal)
    run = functools.partial(set_attention, T=iterations(work.op), backend="triton", causal=causal)
    return timed_call(run, inputs(case, device), mode, 4)


def timed(call: Call) -> list[float]:
    """Seconds of a call, as replays of a graph."""
    replay, count = captured(call)
    repeats = max(1, math.ceil(2e-3 / max(event_clock(replay, 2), 1e-6)))
    return [event_clock(replay, repeats) / count for _ in range(SAMPLES)]


@functools.cache
def judged(op: str, size: str, half: str) -> Callable[[], None]:
    """What raises an AssertionError where the output or a gradient of a call is beyond the error budget."""
    (D, M), dtype, causal = WIDTHS[size], DTYPES[half], op != "attention"
    x = inputs(GpuCase("tune", 600, BOTH, H=2, D=D, M=M, dtype=dtype, causal=causal), "cuda")
    leaves = dict(zip(("query", "key", "value", "references"), x[:4], strict=True))

    def run(by: str, **given: Tensor) -> Tensor:
        return set_attention(Inputs(**given, d_output=x.d_output), iterations(op), by, causal)

    with torch.device("cuda"):
        exact, model = testing.model_inputs(functools.partial(run, "reference"), leaves, dtype, x.d_output)

    def judge() -> None:
        fast = testing.gradients(functools.partial(run, "triton"), leaves, x.d_output)
        testing.assert_within_budget(fast, exact, model)

    return judge


def measured(chosen: list[Trial], family: str, out: Path, deadline: float) -> None:
    """What each trial took, in each length of its op; what an earlier process has begun is left out."""
    begun = {record["trial"] for record in read(out) if "trial" in record}
    for trial in chosen:
        name = f"{'/'.join(trial.key)} {trial.tile and list(trial.tile)}"
        if name in begun:
            continue
        if time.monotonic() > deadline:
            return
        write(out, trial=name)
        with changed(trial, family):
            try:
                judged(trial.work.op, trial.size, trial.half)()
                for B, L in LENGTHS[trial.work.op]:
                    samples = timed(call_of(trial, "cuda", B, L))
                    at = {"key": "/".join(trial.key), "tile": trial.tile and list(trial.tile), "B": B, "L": L}
                    write(out, **at, us=1e6 * statistics.median(samples), least=1e6 * min(samples))
            except Exception as error:  # a tile that does not fit, or is wrong
                write(out, failed=name, why=f"{type(error).__name__}: {first_line(error)}")
                if Gpu().broken():
                    raise SystemExit(STICKY) from None


def write(out: Path, **record: Any) -> None:
    """Append a record."""
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def report(found: list[dict[str, Any]]) -> Iterator[str]:
    """For each row and length the table's own tile and the best three."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        if "us" in one:
            rows.setdefault((one["key"], one["B"], one["L"]), []).append(one)
    for (key, B, L), ones in rows.items():
        own = next((one for one in ones if one["tile"] is None), None)
        best = sorted(ones, key=lambda one: one["us"])[:4]
        said = ", ".join(f"{one['tile'] or 'own'} {one['us']:.1f}" for one in best)
        yield f"{key} B{B} L={L}: own {own and own['us']:.1f} µs; {said}"


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("out", type=Path, help="where a line of JSON for each trial goes")
    parser.add_argument("--kind", action="append", choices=[work.kind for work in WORKS])
    parser.add_argument("--size", action="append", choices=list(WIDTHS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=120.0, help="no trial begins after this long")
    arguments = parser.parse_args(argv)
    if tiles.INTERPRETED or not torch.cuda.is_available():
        raise entry_point.NotHereError("no GPU")
    family = launch.device_of(torch.empty(0, device="cuda")).family
    kinds = tuple(arguments.kind or [work.kind for work in WORKS])
    chosen = list(trials(kinds, tuple(arguments.size or ["small"]), tuple(arguments.dtype or ["half"]), family))
    measured(chosen, family, arguments.out, time.monotonic() + arguments.seconds)
    found = read(arguments.out)
    wrong = [f"{one['failed']}: {one['why']}" for one in found if "failed" in one]
    print(f"{len(chosen)} trials", *report(found), *wrong, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.tune", main)
