"""What comes before each chunk: sums of the chunks' keys, scanned along the length.

Sums and means of every chunk take memory; so the heads are worked on in parts, one after another (`parts`), and where
one head alone would take too much, its length in stretches.  Kernels get the tensors of the whole call, and count heads
and chunks from the part's first: so no address, whose alignment Triton compiles for, depends on the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands
from ..device.head import head_parameters
from ..device.logits import load_references_t, load_rows
from ..device.primitives import INF, dot, finite_or_zero, log_sum, rounded
from ..host.launch import kernel, launch
from ..host.tiles import Tile
from .chunk import at_head, chunk_log_weights, place

WORKSPACE_SHARE = 0.23  # of the bytes of q, k, v and o: what a part may take, so that all workspaces stay within 1/4
FEW_TOKENS = 8 * 4096  # of all heads: with fewer, a part may fill the device, which takes some megabytes
PROGRAMS = 2  # on chunks, that a multiprocessor holds at once: the backward kernels' registers, M = D = E = 64
SCAN = Tile(rows=0, depth=256, warps=2, stages=4)  # 4 numbers a thread: one wide load; many programs hide the steps


class Part(NamedTuple):
    """Some heads of one call, counted by b·H + h, and some chunks of their length."""

    first_head: int
    heads: int
    first_chunk: int
    chunks: int
    stretch: int  # number of the part among those of the same heads
    stretches: int  # how many these are


@kernel
def causal_sums_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, peaks, totals, pooled,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, first_chunk, threshold, keep_scale, uniform,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BC: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk's Σ e^ω = totals · 2^peaks and Σ e^ω v = pooled · 2^peaks."""
    at, head, chunk = place(chunks, first_head, first_chunk)
    b, h = head // H, head % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    j = tl.arange(0, MP)
    rows = chunk * BC + tl.arange(0, BC)
    live, omega = chunk_log_weights(
        key, log_a, key_position, pi, y, load_references_t(y, 0, MP, DP, DEPTH), tl.load(log_b + h * MP + j), rows, L,
        stride_kn * STEP, stride_an, stride_pn, beta, scale, lam_a, tau, uniform,
        UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    peak = tl.max(omega, 0)
    e = tl.exp2(omega - finite_or_zero(peak)[None, :])
    out = at * MP + j
    tl.store(peaks + out, peak)
    tl.store(totals + out, tl.sum(e, 0))
    weights = tl.trans(rounded(e, value.dtype.element_ty))
    for first in tl.static_range(0, EP, VDEPTH):
        columns = first + tl.arange(0, VDEPTH)
        v = load_rows(value, rows, live, stride_vn * STEP, columns, E)
        tl.store(pooled + out[:, None] * EP + columns[None, :], dot(weights, v, PRECISION))


@kernel
def causal_scan_kernel(
    peaks, totals, pooled, log_c, log_end, passed_c, passed_z, chunks, stretch, stretches,
    MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of each chunk (units 2^peak) become what comes before it: log C in log_c, means in place of `pooled`.

    `log_end`: log C after it.  A stretch begins with what the one before passed on, and passes on the same.
    """
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = index // EP
    first = index % EP == 0  # one number of each column also writes log C
    passed_c += (bh * stretches + stretch) * MP + column
    passed_z += (bh * stretches + stretch) * (MP * EP) + index
    begun = index < tl.where(stretch > 0, MP * EP, 0)
    state = tl.load(passed_c - MP, mask=begun, other=-INF)
    peak = state
    total = tl.where(state > -INF, 1.0, 0.0)
    value = tl.load(passed_z - MP * EP, mask=begun, other=0.0)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        at = (bh * chunks + chunk) * MP
        here, mass = tl.load(peaks + at + column), tl.load(totals + at + column)
        sums = tl.load(pooled + at * EP + index)
        tl.store(pooled + at * EP + index, tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0))
        tl.store(log_c + at + column, state, mask=first)
        new = tl.maximum(peak, here)
        safe = finite_or_zero(new)
        fade, weight = tl.exp2(peak - safe), tl.exp2(here - safe)
        total = total * fade + mass * weight
        value = value * fade + sums * weight
        peak = new
        state = log_sum(peak, total)
        tl.store(log_end + at + column, state, mask=first)
    tl.store(passed_c, state, mask=first)
    tl.store(passed_z, tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0))


@triton.jit
def _scan_back(
    log_c, log_end, later, passed, more, bh, chunks, index, column, size, MP: tl.constexpr, STAGES: tl.constexpr
):
    """Sums of each chunk become the sums of all later ones; both in units of C where they begin."""
    passed += bh * size + index
    carry = tl.load(passed, mask=index < tl.where(more > 0, size, 0), other=0.0)
    after = tl.load(log_end + (bh * chunks + chunks - 1) * MP + column)
    for step in tl.range(0, chunks, num_stages=STAGES):
        at = bh * chunks + chunks - 1 - step
        begin = tl.load(log_c + at * MP + column)
        own = tl.load(later + at * size + index)
        tl.store(later + at * size + index, carry)
        carry = own + carry * tl.exp2(begin - finite_or_zero(after))
        after = begin
    tl.store(passed, carry)


@kernel
def causal_scan_backward_kernel(
    log_c, log_end, later_o, later_c, passed_o, passed_c, chunks, more,
    MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of Σ W do, or in the head's last program Σ d log C, from the last chunk to the first.

    Where `more` chunks follow, a stretch begins with what theirs passed on; it passes on the same, in its place.
    """
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // (blocks + 1)).to(tl.int64)
    block = tl.program_id(0) % (blocks + 1)
    if block < blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        _scan_back(log_c, log_end, later_o, passed_o, more, bh, chunks, index, index // EP, MP * EP, MP, STAGES)
    else:
        j = tl.arange(0, MP)
        _scan_back(log_c, log_end, later_c, passed_c, more, bh, chunks, j, j, MP, MP, STAGES)


class Arguments(NamedTuple):
    """What every kernel on the chunks of one call is launched with."""

    tensors: tuple[Any, ...]
    spans: tuple[int, ...]  # strides, H, L
    scalars: tuple[Any, ...]  # dropout, log2 of a uniform mass
    constants: dict[str, Any]
    cut: Tile

    def counts(self, part: Part) -> tuple[Any, ...]:
        """The arguments after the tensors."""
        return (*self.spans, part.chunks, part.first_head, part.first_chunk, *self.scalars)


class States(NamedTuple):
    """What comes before the chunks of a part."""

    log_c: Tensor  # [heads, chunks, MP] log2 C before each chunk
    log_end: Tensor  # [heads, chunks, MP] and after it
    z: Tensor  # [heads, chunks, MP, EP] means before each chunk


def new_passed(part: Part, arguments: Arguments, like: Tensor) -> tuple[Tensor, Tensor]:
    """What the stretches of the same heads pass on: log2 C [heads, stretches, MP] and z [heads, stretches, MP, EP]."""
    shape = (part.heads, part.stretches, arguments.constants["MP"])
    return like.new_empty(shape), like.new_empty((*shape, arguments.constants["EP"]))


def scan(part: Part, arguments: Arguments, passed: tuple[Tensor, Tensor], z: Tensor) -> States:
    """What comes before each chunk, the means in `z`, after the stretches before were scanned."""
    peaks, totals, log_c, log_end = (z.new_empty(z.shape[:3]) for _ in range(4))
    args = (*arguments.tensors, peaks, totals, z, *arguments.counts(part))
    launch(causal_sums_kernel, part.heads * part.chunks, args, arguments.constants, arguments.cut)
    args = (peaks, totals, z, log_c, log_end, *passed, part.chunks, part.stretch, part.stretches)
    _launch_scan(causal_scan_kernel, args, z)
    return States(log_c, log_end, z)


def scan_back(part: Part, states: States, later: tuple[Tensor, Tensor], passed: tuple[Tensor, Tensor]) -> None:
    """In place: what each chunk's queries leave becomes what all later ones leave; the stretches after it went first.

    `later` [heads, chunks, MP, EP] and [heads, chunks, MP]; `passed`, from stretch to stretch, without chunks.
    """
    more = part.stretches - 1 - part.stretch
    args = (states.log_c, states.log_end, *later, *passed, part.chunks, more)
    _launch_scan(causal_scan_backward_kernel, args, later[0], further=1)


def _launch_scan(kernel: Any, args: tuple[Any, ...], z: Tensor, further: int = 0) -> None:
    """A program for each BLOCK of a head's [MP, EP] numbers, and `further` ones; z [heads, chunks, MP, EP]."""
    heads, chunks, mp, ep = z.shape
    block = min(SCAN.depth, mp * ep)
    constants = {"MP": mp, "EP": ep, "BLOCK": block, "STAGES": SCAN.stages}
    programs = heads * (mp * ep // block + further) if chunks else 0
    launch(kernel, programs, args, constants, SCAN)


def parts(x: Operands, rows: int, numbers: int, multiprocessors: int) -> Iterator[list[Part]]:
    """Groups of heads as their stretches, whose workspaces, `numbers` float32 a chunk, stay within WORKSPACE_SHARE.

    With fewer than FEW_TOKENS they may always be as large as fills the device.
    """
    b, h, s, d = x.key.shape
    tokens = b * h * s * 2 * (d + x.value.shape[-1]) * x.key.element_size()
    least = 1 if b * h * s >= FEW_TOKENS else PROGRAMS * multiprocessors
    at_once = max(least, int(WORKSPACE_SHARE * tokens) // (4 * numbers))
    chunks = math.ceil(s / rows)
    stretch = max(1, math.ceil(chunks / max(1, math.ceil(chunks / at_once))))
    firsts = range(0, max(1, chunks), stretch)
    heads = max(1, at_once // max(1, chunks))
    for head in range(0, b * h, heads):
        some = min(heads, b * h - head)
        yield [Part(head, some, c, min(stretch, chunks - c), n, len(firsts)) for n, c in enumerate(firsts)]
