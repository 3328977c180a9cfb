"""Counts of the CUDA C++ backend, whose keys stay on the chip: what each of its launches moves, from the code.

Device memory: every token tensor moves once, whatever T: q, k, v, o forward; q, do, k, v, dq, dk, dv backward.  z and c
are float32 and move once a head, references once a cluster; dy is written in parts, one a cluster, which the host adds.
What is read again comes from the L2 cache and is counted apart: k and v by the backward's last pass; z twice and c
three times by every block of a cluster; the references by every block; the parts of dy.  Without masks, positions and
gradients of hyperparameters; backward in the scaled form (the log domain reads the keys a third time).

The prediction is from the forward's instructions (`cuda_instructions`), of sm_90 for every GPU.

Layouts are asked of the host's own code (`make -C csrc cuda-layout`), for bfloat16.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.compiled import cuda_instructions
from benchmarks.compiled.gpus import FAMILIES, Gpu
from benchmarks.compiled.workloads import Call
from setformer_kernels.backends._extension import DTYPE_CODES

ROOT = Path(__file__).resolve().parents[2]
HALF, FLOAT = 2, 4  # bytes
SIZES = ((16, 4096), (4096, 49), (4096, 196), (128, 256), (128, 512), (128, 1024), (128, 2048), (144, 4096))  # B·H, L


class Work(NamedTuple):
    """Counts of one stage, all heads together."""

    name: str
    bytes: float
    flops: float
    exps: float


class Layout(NamedTuple):
    """How a launch is laid out: blocks of a cluster, warps, steps of tokens and bytes in shared memory of a block,
    batch elements a cluster takes, clusters of a head; of the forward where the logits lie close together: warps, turns
    that the device takes with all blocks, and whether they meet in device memory, as no clusters."""

    cluster: int
    warps: int
    buffers: int
    shared: int
    problems: int
    groups: int
    narrow_warps: int
    narrow_turns: int
    narrow_in_grid: int


def resident(call: Call, groups: int | None = None) -> Work:
    """The forward, with `groups` clusters a head (default: one for every batch element).

    Pooling takes two products, of the weights' high and low parts.
    """
    N, M, D, E = call.L, call.M, call.D, call.E
    heads, clusters = call.B * call.H, call.H * (call.B if groups is None else groups)
    parameters = FLOAT * M * (heads * (E + max(call.T, 1)) + clusters * D)
    moved = heads * HALF * 2 * N * (D + E) + parameters
    return Work("resident forward", moved, heads * 2 * N * M * (2 * D + 3 * E), heads * 4 * N * M)


def resident_backward(call: Call, groups: int | None = None) -> Work:
    """The backward, with `groups` clusters a head (default: one for every batch element).

    Queries and keys alike: 4D + 3E multiply-adds for ℓ, ĉ, dx, dŷ and two products with z or dz and one with their
    transpose; three exponentials, κ twice and e^ℓ.
    """
    N, M, D, E, T = call.L, call.M, call.D, call.E, max(call.T, 1)
    heads, clusters = call.B * call.H, call.H * (call.B if groups is None else groups)
    tokens = HALF * N * (4 * D + 3 * E)
    parameters = FLOAT * (heads * M * (E + T) + clusters * 2 * M * D)
    return Work(
        "resident backward", heads * tokens + parameters, heads * 4 * N * M * (4 * D + 3 * E), heads * 6 * N * M
    )


def second_reads(call: Call, layout: Layout) -> float:
    """Bytes that the backward reads from the L2 cache, beyond their first reads."""
    M, D, E, T, ranks = call.M, call.D, call.E, max(call.T, 1), layout.cluster
    clusters = call.H * layout.groups
    state = (2 * ranks - 1) * M * E + (3 * ranks - 1) * M * T
    parts = clusters * M * D if layout.groups > 1 else 0
    heads = call.B * call.H * (HALF * call.L * (D + E) + FLOAT * state)
    return heads + FLOAT * (clusters * ranks * M * D + parts)


def layouts(calls: Sequence[Call], gpu: Gpu) -> list[Layout]:
    """What the host picks for each call; cluster 0 where the keys do not fit."""
    subprocess.run(["make", "--silent", "-C", str(ROOT / "csrc"), "cuda-layout"], check=True, timeout=600)
    family = FAMILIES[gpu.family]
    device = family.capability // 10, gpu.multiprocessors, family.shared_per_block, int(family.capability >= 90)
    lines = [(*device, int(c.backward), c.B, c.H, c.L, c.M, c.D, c.E, c.T, DTYPE_CODES[torch.bfloat16]) for c in calls]
    given = "\n".join(" ".join(map(str, line)) for line in lines)
    command = [str(ROOT / "build" / "shim" / "layout")]
    told = subprocess.run(command, input=given, check=True, capture_output=True, text=True, timeout=60).stdout
    return [Layout(*map(int, line.split())) for line in told.splitlines()]


def table(gpu: Gpu, T: int, sizes: Sequence[tuple[int, int]] = SIZES) -> str:
    """Bytes over the copy floor's (4 token tensors forward, 11 with the backward) and layouts, H = 16."""
    if shutil.which("make") is None or shutil.which("g++") is None:
        return "No layouts: they need make and g++."
    lines = [
        "| B·H | L | forward predicted, µs | bytes: forward | both | L2, of both "
        "| forward: blocks = clusters × blocks, warps, KiB, problems | backward: the same |",
        "|---" * 8 + "|",
    ]
    for heads, L in sizes:
        call = Call("attention", L=L, T=T, B=heads // 16)
        backward = Call("attention", L=L, T=T, B=heads // 16, backward=True)
        one, two = layouts((call, backward), gpu)
        if not (one.cluster and two.cluster):
            lines.append(f"| {heads} | {L} | does not fit |||||| ")
            continue
        unit, forward = heads * HALF * L * call.D, resident(call, one.groups).bytes
        both, again = forward + resident_backward(call, two.groups).bytes, second_reads(call, two)
        shares = f"{forward / unit / 4:.3f} | {both / unit / 11:.3f} | {again / unit / 11:.3f}"
        predicted = 1e6 * forward_seconds(call, one, gpu)
        lines.append(f"| {heads} | {L} | {predicted:.1f} | {shares} | {_brief(call, one)} | {_brief(call, two)} |")
    return "\n".join(lines)


def forward_seconds(call: Call, layout: Layout, gpu: Gpu) -> float:
    """What the forward should take where its logits lie close together, from the committed counts of sm_90."""
    running = max(1, min(FAMILIES[gpu.family].shared_per_sm // (layout.shared + 1024), 16 // layout.narrow_warps))
    blocks, tile = call.H * layout.groups * layout.cluster, cuda_instructions.TILE
    work = cuda_instructions.Work(
        tiles=math.ceil(call.L / layout.cluster / tile) * layout.problems,
        warps=layout.narrow_warps,
        blocks=max(1, min(running, blocks // gpu.multiprocessors)),
        waves=layout.narrow_turns,
        cluster=layout.cluster,
        in_grid=bool(layout.narrow_in_grid),
        iterations=max(call.T, 1),
        problems=layout.problems,
    )
    return cuda_instructions.seconds(cuda_instructions.committed(), gpu, work)


def _brief(call: Call, l: Layout) -> str:
    clusters = call.H * l.groups
    return f"{clusters * l.cluster} = {clusters} × {l.cluster}, {l.warps}, {l.shared / 1024:.0f}, {l.problems}"
