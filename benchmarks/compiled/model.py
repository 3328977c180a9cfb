"""`python -m benchmarks.compiled.model`: what attention has to cost on a GPU, and what the kernels should take there.

A prediction, not a measurement: it needs triton and no GPU.

**Floor.**  Counts of the streaming algorithm per head (N = L = S tokens, 2 bytes a number, T' = max(T, 1)):

    stage                        moves over device memory        matrix products, FLOPs       exponentials
    forward, keys, each of T'    k (the last: k, v)              2NMD (the last: + 2NME)      2NM  (κ and e^ℓ)
    forward, queries             q, o                            2NM(D + E)                   2NM
    backward, queries            q, do, dq                       2NM(3D + 2E)                 2NM
    backward, keys, T' − 1       k (the first: k, v)             2NMD (the first: + 2NME)     2NM
    backward, keys, last         k, v, dk, dv                    2NM(3D + 2E)                 2NM

so 4 tensor moves forward and 11 forward + backward at T ≤ 1, the *copy floor*, whatever T. References, column sums
and z are M/N of that and not counted. `resident forward` and `resident backward` are the CUDA C++ backend's, whose
keys stay on the chip (`model_resident`): 4NM and 6NM exponentials and the copy floor's bytes for every T. Bytes move
at a copy's rate (0.9 of the data sheet), exponentials at 16 a clock and multiprocessor, products at the data sheet's
dense bf16 rate. floor = max(bytes/rate, exps/rate, FLOPs/rate), of the whole call; keys that stay in the L2 cache
between passes can beat it at short lengths.

**Prediction.**  Every launch of the call is compiled for the GPU.  Per iteration of its loop over tokens a program
needs warps · instructions/4 issue cycles, warps · 2 cycles per exponential or other MUFU result, warps · 32/lanes
cycles per float32 instruction, and one warp alone needs `loop_cycles` (stall counts, scoreboards, the
latencies of `sass.LATENCY`), which resident blocks share.  The largest of these, times iterations, plus the code around
the loop, over all multiprocessors, against the bytes of the tensors the kernel touches; launches follow each other at
LAUNCH_S.  Clocks are the boost clock, shared-memory conflicts and cache misses are left out: expect a real run to be
slower.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import entry_point
from benchmarks.compiled import aot, model_resident, sass, workloads
from benchmarks.compiled.gpus import COPY_SHARE, FAMILIES, GPUS, SCHEDULERS, Gpu, resident_blocks
from benchmarks.compiled.model_resident import HALF, Work, resident, resident_backward
from benchmarks.compiled.workloads import Call

LAUNCH_S = 1.5e-6  # from the end of one kernel to the start of the next in a CUDA graph, an assumption
LENGTHS = (4096, 16384, 65536)
LEAST_LENGTH, LEAST_SHARE = 16384, 70.0  # the target: percent of the floor, forward


def stages(call: Call) -> list[Work]:
    """The stages of a forward, or of a backward, as the table above counts them."""
    N, M, D, E, passes = call.L, call.M, call.D, call.E, max(call.T, 1)
    heads = call.B * call.H

    def work(name: str, width: int, products: int) -> Work:
        """`width` numbers moved per token, `products` multiply-adds per token and reference."""
        return Work(name, heads * HALF * N * width, heads * 2 * N * M * products, heads * 2 * N * M)

    if not call.backward:
        keys = [work(f"keys {t + 1}", D, D) for t in range(passes - 1)]
        return [*keys, work("keys, values", D + E, D + E), work("queries", D + E, D + E)]
    columns = [work(f"columns {n + 1}", D + E * (n == 0), D + E * (n == 0)) for n in range(passes - 1)]
    last = work("key gradients", 2 * (D + E), 3 * D + 2 * E)
    return [work("query gradients", 2 * D + E, 3 * D + 2 * E), *columns, last]


def total(name: str, parts: Sequence[Work]) -> Work:
    """All stages together."""
    return Work(name, sum(p.bytes for p in parts), sum(p.flops for p in parts), sum(p.exps for p in parts))


def limits(work: Work, gpu: Gpu) -> dict[str, float]:
    """Seconds that each resource alone would need."""
    return {
        "bytes": work.bytes / (COPY_SHARE * gpu.bandwidth),
        "exps": work.exps / gpu.exps,
        "FLOPs": work.flops / gpu.bf16,
    }


def copy_floor(call: Call, gpu: Gpu, moves: int) -> float:
    """Seconds to move `moves` token tensors once."""
    return call.B * call.H * HALF * call.L * call.D * moves / (COPY_SHARE * gpu.bandwidth)


class Code(NamedTuple):
    """What the model needs of one binary."""

    registers: int
    shared: int
    used: tuple[bool, ...]  # which tensor arguments it touches, in order
    loop: dict[str, int]
    loop_cycles: int
    rest: dict[str, int]
    rest_cycles: int


@functools.cache
def _code(family: str, name: str, key: str) -> Code:
    kernel = aot.compiled(_variants[family, name, key], family)
    cubin = kernel.asm["cubin"]
    code = sass.listing(cubin)
    body = sass.main_loop(code)
    inside = {i.address for i in body}
    bounds = (body[0].address, body[-1].address) if body else (0, -1)
    rest = [i for i in sass.hot_path(code) if not bounds[0] <= i.address <= bounds[1] and i.address not in inside]
    return Code(
        sass.usage(cubin).registers,
        kernel.metadata.shared,
        _touched(kernel.asm["ttir"]),
        dict(sass.count(body)),
        sass.loop_cycles(body),
        dict(sass.count(rest)),
        sass.loop_cycles(rest),
    )


_variants: dict[tuple[str, str, str], aot.Variant] = {}


def remember(family: str, variant: aot.Variant) -> None:
    """Makes a binary known by its name and key."""
    _variants.setdefault((family, variant.name, variant.key), variant)


def _touched(ttir: str) -> tuple[bool, ...]:
    """Which pointer arguments of the kernel its code uses."""
    header = re.search(r"tt\.func public @\w+\((.*)$", ttir, re.MULTILINE)
    if header is None:
        raise ValueError("no kernel in the intermediate code")
    pointers = re.findall(r"(%\w+): !tt\.ptr", header.group(1))
    return tuple(len(re.findall(rf"{name}\b", ttir)) > 1 for name in pointers)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among a kernel's arguments, those of groups in their place."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _moved(launch: Any, used: Iterable[bool]) -> float:
    """Bytes of the tensors a launch touches, each storage once; broadcasts count what is there."""
    sizes = {}
    for tensor, touched in zip(_tensors(launch.args), used, strict=True):
        if touched:
            extent = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            sizes[tensor.data_ptr()] = extent * tensor.element_size()
    return float(sum(sizes.values()))


def _iterations(launch: Any) -> int:
    """Turns of one program's main loop: a stretch of tokens by the tile, or the splits that a merge reads."""
    given = dict(zip([p.name for p in launch.kernel.params], launch.args, strict=False))
    if "stretch" in given:
        return math.ceil(given["stretch"] / launch.tile.rows)
    return math.ceil(given.get("splits", 1) / 16)


class Prediction(NamedTuple):
    """One launch on one GPU, seconds and what bounds it."""

    kernel: str
    seconds: float
    bound: str
    bytes: float
    blocks_per_sm: int
    iterations: float  # loop turns of all programs
    limits: dict[str, float]


def _cycles(counts: dict[str, int], alone: int, warps: int, resident: int, gpu: Gpu) -> dict[str, float]:
    """Cycles of one multiprocessor for one program's piece of code, by resource."""
    lanes = FAMILIES[gpu.family].fp32_per_clock
    return {
        "issue": warps * counts.get("all", 0) / SCHEDULERS,
        "exps": warps * 2.0 * (counts.get("ex2", 0) + counts.get("mufu", 0)),
        "float32": warps * counts.get("fp32", 0) * 32 / lanes,
        "latency": alone / resident,
    }


def predict(launch: Any, name: str, key: str, gpu: Gpu) -> Prediction:
    """One launch on a GPU, from its machine code."""
    code = _code(gpu.family, name, key)
    resident = resident_blocks(gpu.family, code.registers, code.shared, launch.tile.warps)
    # Fewer programs than places: latency is shared by those that are there.
    share = max(1, min(resident, math.ceil(launch.programs / gpu.multiprocessors)))
    loop = _cycles(code.loop, code.loop_cycles, launch.tile.warps, share, gpu)
    around = max(_cycles(code.rest, code.rest_cycles, launch.tile.warps, share, gpu).values())
    turns = _iterations(launch) if code.loop else 0
    programs = max(launch.programs / gpu.multiprocessors, 1.0)
    seconds = {name: programs * turns * cycles / gpu.clock for name, cycles in loop.items()}
    moved = _moved(launch, code.used)
    memory = moved / (COPY_SHARE * gpu.bandwidth)
    busy = max(seconds.values()) + programs * around / gpu.clock
    bound = max(seconds, key=seconds.__getitem__) if max(seconds.values()) * 2 > busy else "around the loop"
    if memory > busy:
        bound = "bytes"
    waits = {**seconds, "bytes": memory}
    return Prediction(name, LAUNCH_S + max(memory, busy), bound, moved, resident, launch.programs * turns, waits)


def predictions(call: Call, gpu: Gpu) -> list[Prediction]:
    """Every launch of a call on a GPU."""
    found = []
    for launch in workloads.launches(call, gpu.family, gpu.multiprocessors):
        (variant,) = aot.variants([launch], gpu.family)
        remember(gpu.family, variant)
        found.append(predict(launch, variant.name, variant.key, gpu))
    return found


@dataclass(frozen=True)
class Row:
    """One call on one GPU; times in microseconds."""

    gpu: str
    mode: str
    L: int
    T: int
    bytes: float
    flops: float
    exps: float
    us_bytes: float
    us_exps: float
    us_flops: float
    us_floor: float
    us_copy_floor: float
    us_predicted: float
    percent_of_floor: float
    percent_of_copy_floor: float
    launches: int
    bound: str


def row(gpu: Gpu, L: int, T: int, both: bool, predicting: Callable[[Call, Gpu], list[Prediction]] = predictions) -> Row:
    """Floor and prediction of a forward, or of a forward with its backward."""
    calls = [Call("attention", L=L, T=T, backward=backward) for backward in ((False, True) if both else (False,))]
    work = total("", [stage for call in calls for stage in stages(call)])
    found = [prediction for call in calls for prediction in predicting(call, gpu)]
    seconds, floor = sum(p.seconds for p in found), max(limits(work, gpu).values())
    copy = copy_floor(calls[0], gpu, 11 if both else 4)
    slowest = max(found, key=lambda p: p.seconds) if found else None
    us = {name: 1e6 * value for name, value in limits(work, gpu).items()}
    return Row(
        gpu=gpu.name,
        mode="forward+backward" if both else "forward",
        L=L,
        T=T,
        bytes=work.bytes,
        flops=work.flops,
        exps=work.exps,
        us_bytes=us["bytes"],
        us_exps=us["exps"],
        us_flops=us["FLOPs"],
        us_floor=1e6 * floor,
        us_copy_floor=1e6 * copy,
        us_predicted=1e6 * seconds if found else math.nan,
        percent_of_floor=100 * floor / seconds if found else math.nan,
        percent_of_copy_floor=100 * copy / seconds if found else math.nan,
        launches=len(found),
        bound=f"{slowest.kernel}: {slowest.bound}" if slowest else "",
    )


def stage_table(L: int, T: int) -> str:
    """Counts of every stage."""
    found = []
    for backward in (False, True):
        parts = stages(Call("attention", L=L, T=T, backward=backward))
        found += [*parts, total("**backward**" if backward else "**forward**", parts)]
    call = Call("attention", L=L, T=T)
    found += [resident(call), resident_backward(call)]
    lines = [f"| {p.name} | {p.bytes:.3g} | {p.flops:.3g} | {p.exps:.3g} |" for p in found]
    return "\n".join(["| stage | bytes | FLOPs | exps |", "|---|---|---|---|", *lines])


def table(rows: Sequence[Row]) -> str:
    """Floors and predictions as markdown."""
    head = ("GPU", "", "L", "T", "bytes / exps / FLOPs, µs", "floor", "copy floor", "predicted", "of floor",
            "of copy floor", "slowest")  # fmt: skip
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_line, rows)])


def _line(r: Row) -> str:
    return (
        f"| {r.gpu} | {r.mode} | {r.L} | {r.T} | {r.us_bytes:.1f} / {r.us_exps:.1f} / {r.us_flops:.1f} | "
        f"{r.us_floor:.1f} | {r.us_copy_floor:.1f} | {r.us_predicted:.1f} | {r.percent_of_floor:.0f} % | "
        f"{r.percent_of_copy_floor:.0f} % | {r.bound} |"
    )


def launch_table(gpu: Gpu, L: int, T: int, both: bool) -> str:
    """Every launch of one call: where the predicted time goes."""
    lines = ["| launch | µs | bound | MB | blocks per SM | loop turns | issue / exps / float32 / latency / bytes, µs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for backward in (False, True) if both else (False,):
        for p in predictions(Call("attention", L=L, T=T, backward=backward), gpu):
            waits = " / ".join(f"{1e6 * p.limits[n]:.1f}" for n in ("issue", "exps", "float32", "latency", "bytes"))
            where = f"| {p.kernel} | {1e6 * p.seconds:.1f} | {p.bound} | {p.bytes / 1e6:.1f} "
            lines.append(f"{where}| {p.blocks_per_sm} | {p.iterations:.0f} | {waits} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    about = "What attention has to cost on a GPU, and what the compiled kernels are predicted to take."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.model", description=about)
    parser.add_argument("--gpu", choices=sorted(GPUS), action="append", help="only this one (repeatable)")
    parser.add_argument("--L", type=int, action="append", help="lengths (default: 4096, 16384, 65536)")
    parser.add_argument("--T", type=int, action="append", help="iterations (default: 1 and 3)")
    parser.add_argument("--forward", action="store_true", help="leave the backward out")
    parser.add_argument("--floor", action="store_true", help="floors only: compiles nothing, needs no triton")
    parser.add_argument("--launches", action="store_true", help="also where the time of every call goes")
    parser.add_argument("--resident", action="store_true", help="also bytes and layouts of the CUDA C++ backend")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 where a forward at L ≥ 16k is predicted below the target."""
    arguments = _parser().parse_args(argv)
    gpus = [GPUS[name] for name in arguments.gpu or GPUS]
    lengths, iterations = arguments.L or LENGTHS, arguments.T or (1, 3)
    modes = (False,) if arguments.forward else (False, True)
    predicting = (lambda call, gpu: []) if arguments.floor else predictions
    print(f"bfloat16, B1 H16 D64 M64.  Counts at L = {lengths[0]}, T = {iterations[-1]}:\n")
    print(stage_table(lengths[0], iterations[-1]) + "\n")
    rows = [row(gpu, L, T, both, predicting) for gpu in gpus for both in modes for L in lengths for T in iterations]
    print(table(rows))
    for gpu in gpus if arguments.resident else ():
        print(f"\n{gpu.name}, resident, T = {iterations[-1]}\n\n{model_resident.table(gpu, iterations[-1])}")
    if arguments.launches:
        for gpu, both, L, T in [(g, b, L, T) for g in gpus for b in modes for L in lengths for T in iterations]:
            print(f"\n{gpu.name}, L = {L}, T = {T}\n\n{launch_table(gpu, L, T, both)}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)
    judged = [r for r in rows if r.mode == "forward" and r.L >= LEAST_LENGTH and not math.isnan(r.percent_of_floor)]
    below = [r for r in judged if r.percent_of_floor < LEAST_SHARE]
    if judged:
        enough = f"{len(judged) - len(below)} of {len(judged)}"
        print(f"\nforward, L ≥ {LEAST_LENGTH}: {enough} predicted at ≥ {LEAST_SHARE:g} % of the floor")
    return 1 if below else 0


if __name__ == "__main__":
    entry_point.run("benchmarks.compiled.model", main)
