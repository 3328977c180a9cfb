"""What comes before each chunk: sums of the chunks' keys, scanned along the length.

Sums and means of every chunk take memory; so the heads are worked on in parts, one after another, each with enough
programs to fill the device (`parts`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, replaced
from .causal_chunk import at_head, chunk_log_weights
from .config import Tile
from .launch import launch
from .logits import head_parameters, load_references_t, load_rows
from .prepare import Prepared
from .primitives import INF, dot, finite_or_zero, log_sum, rounded

WORKSPACE_SHARE = 0.2  # of the bytes of q, k, v and o: what the states of one part may take
SCAN = Tile(rows=0, depth=256, warps=2, stages=4)  # 4 numbers a thread: one wide load; many programs hide the steps


class Part(NamedTuple):
    """Some heads of one call."""

    x: Operands
    prepared: Prepared
    batch: slice
    heads: slice
    all_heads: int  # H of the call: dropout counts heads from its first

    @property
    def first_head(self) -> int:
        """b·H + h of the part's first head."""
        return self.batch.start * self.all_heads + self.heads.start


STRIDES = tuple(f"stride_{t}{n}" for t in "qkvoasp" for n in "bhn")
COUNTS = (*STRIDES, "H", "L", "chunks", "first_head", "all_heads", "threshold")


@triton.jit(do_not_specialize=[*COUNTS])
def sums_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, peaks, totals, pooled,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, all_heads, threshold, keep_scale, uniform,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BC: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk's Σ e^ω = totals · 2^peaks and Σ e^ω v = pooled · 2^peaks."""
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b, h = bh // H, bh % H
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
    out = (bh * chunks + chunk) * MP + j
    tl.store(peaks + out, peak)
    tl.store(totals + out, tl.sum(e, 0))
    weights = tl.trans(rounded(e, value.dtype.element_ty))
    for first in tl.static_range(0, EP, VDEPTH):
        columns = first + tl.arange(0, VDEPTH)
        v = load_rows(value, rows, live, stride_vn * STEP, columns, E)
        tl.store(pooled + out[:, None] * EP + columns[None, :], dot(weights, v, PRECISION))


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    peaks, totals, pooled, log_c, chunks, MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Sums of each chunk (units 2^peak) become what comes before it: log C in log_c, means in place of `pooled`."""
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = index // EP
    first = index % EP == 0  # one number of each column also writes log C
    peak = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        at = (bh * chunks + chunk) * MP
        here, mass = tl.load(peaks + at + column), tl.load(totals + at + column)
        sums = tl.load(pooled + at * EP + index)
        tl.store(pooled + at * EP + index, tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0))
        tl.store(log_c + at + column, log_sum(peak, total), mask=first)
        new = tl.maximum(peak, here)
        safe = finite_or_zero(new)
        fade, weight = tl.exp2(peak - safe), tl.exp2(here - safe)
        total = total * fade + mass * weight
        value = value * fade + sums * weight
        peak = new


@triton.jit
def _scan_back(log_c, later, bh, chunks, index, column, size, MP: tl.constexpr, STAGES: tl.constexpr):
    """Sums of each chunk become the sums of all later ones; both in units of C where they begin."""
    carry = tl.zeros([index.shape[0]], tl.float32)
    after = tl.zeros([index.shape[0]], tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        at = bh * chunks + chunks - 1 - step
        begin = tl.load(log_c + at * MP + column)
        own = tl.load(later + at * size + index)
        tl.store(later + at * size + index, carry)
        carry = own + carry * tl.exp2(begin - finite_or_zero(after))
        after = begin


@triton.jit(do_not_specialize=["chunks"])
def scan_back_kernel(
    log_c, later_o, later_c, chunks, MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """BLOCK numbers of Σ W do, or in the head's last program Σ d log C, from the last chunk to the first."""
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // (blocks + 1)).to(tl.int64)
    block = tl.program_id(0) % (blocks + 1)
    if block < blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        _scan_back(log_c, later_o, bh, chunks, index, index // EP, MP * EP, MP, STAGES)
    else:
        j = tl.arange(0, MP)
        _scan_back(log_c, later_c, bh, chunks, j, j, MP, MP, STAGES)


class Arguments(NamedTuple):
    """What every kernel on the chunks of some heads is launched with."""

    tensors: tuple[Any, ...]
    counts: tuple[Any, ...]  # strides, lengths, dropout
    constants: dict[str, Any]
    cut: Tile


def states(part: Part, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """(log2 C [BH, chunks, MP], z [BH, chunks, MP, EP]) of all keys before each chunk."""
    tensors, counts, constants, cut = arguments
    b, h, s, _ = part.x.key.shape
    chunks, mp, ep = math.ceil(s / cut.rows), constants["MP"], constants["EP"]
    new = part.x.references.new_empty
    peaks, totals, log_c = (new((b * h, chunks, mp)) for _ in range(3))
    pooled = new((b * h, chunks, mp, ep))
    launch(sums_kernel, b * h * chunks, (*tensors, peaks, totals, pooled, *counts), constants, cut)
    block = min(SCAN.depth, mp * ep)
    scan = {"MP": mp, "EP": ep, "BLOCK": block, "STAGES": SCAN.stages}
    launch(scan_kernel, b * h * mp * ep // block, (peaks, totals, pooled, log_c, chunks), scan, SCAN)
    return log_c, pooled


def scan_back(log_c: Tensor, later_o: Tensor, later_c: Tensor) -> None:
    """In place: what each chunk's queries leave becomes what all later ones leave."""
    heads, chunks, mp, ep = later_o.shape
    block = min(SCAN.depth, mp * ep)
    constants = {"MP": mp, "EP": ep, "BLOCK": block, "STAGES": SCAN.stages}
    launch(scan_back_kernel, heads * (mp * ep // block + 1), (log_c, later_o, later_c, chunks), constants, SCAN)


def parts(x: Operands, prepared: Prepared, chunks: int, numbers: int, multiprocessors: int) -> Iterator[Part]:
    """Heads in parts whose states, `numbers` float32 a chunk, stay within WORKSPACE_SHARE, or just fill the device."""
    b, h, s, d = x.key.shape
    tokens = b * h * s * 2 * (d + x.value.shape[-1]) * x.key.element_size()
    at_once = int(WORKSPACE_SHARE * tokens) // max(1, 4 * chunks * numbers)
    at_once = max(1, at_once, math.ceil(multiprocessors / max(1, chunks)))
    batches, heads = max(1, at_once // h), min(h, at_once)
    for b0 in range(0, b, batches):
        for h0 in range(0, h, heads):
            yield _part(x, prepared, slice(b0, min(b, b0 + batches)), slice(h0, min(h, h0 + heads)))


def _part(x: Operands, prepared: Prepared, batch: slice, heads: slice) -> Part:
    """Views of some batch elements and heads."""
    both = ("query", "key", "value", "log_a", "query_position", "key_position")
    cut = {name: t if (t := getattr(x, name)) is None else t[batch, heads] for name in both}
    per_head = {
        name: t if (t := getattr(x, name)) is None else t[heads] for name in ("references", "reference_position")
    }
    fewer = Prepared._make([None if t is None else t[heads] for t in prepared])
    return Part(replaced(x, **cut, **per_head), fewer, batch, heads, x.key.shape[1])
