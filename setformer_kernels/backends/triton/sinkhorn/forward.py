"""Log-domain Sinkhorn on a given log-kernel ℓ [G, N, M]: resident for small problems, streaming for the others.

    g⁰ = log b;  f^t = log a − λ_a LSE_j(ℓ + g^{t−1});  c^t = LSE_s(ℓ + f^t);  g^t = log b − λ_b c^t

ℓ may have any magnitude, so nothing is carried in base 2: that would round ℓ itself.  Differences are taken in natural
units and only then scaled for the hardware's exponential.

Resident: ℓ stays in registers for all iterations of one launch, tolerance included.  Streaming: an iteration is two
launches, rows (f, and partial sums of the columns over a stretch of rows) and columns (merged in a fixed order: c, g);
whether a problem still runs is read on the device from how far each block of its columns moved.

Defined by `reference.transport.sinkhorn`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Sinkhorn
from ....reference.transport import started as started_at
from ..device.primitives import INF, distance, finite_or_zero, potential
from ..device.rows import wide
from ..host.launch import device_of, kernel, launch
from .problem import (
    COLUMNS,
    add_exponentials,
    exp,
    given,
    load_problems,
    load_tile,
    mass,
    natural_log_sum,
    numbers,
    peak_and_total,
    rate,
    resident,
    spanned,
    stream,
    unit,
)


@triton.jit
def log_sum_exp(x, AXIS: tl.constexpr):
    """LSE over an axis of x [PB, NP, MP]; −∞ where every term is."""
    peak, total = peak_and_total(x, AXIS)
    return natural_log_sum(peak, total)


@kernel
def sinkhorn_resident_kernel(
    log_kernel, stride_lg, stride_ln,  # [G, N, M]
    log_a, stride_ag, stride_an,  # [G, N] or None
    log_b, stride_bg, stride_bm,  # [G, M] or None
    lam_a, lam_b, numbers, start,  # [G] or None, [G] or None, Numbers, [G, M] or None
    f_out, g_out, c, iters,  # [G, N], [G, M], [G, max(T, 1), M] (LAST: [G, 1, M]), [G]
    G, N, M, T,
    LAST: tl.constexpr, PB: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """All iterations of PB problems; LAST: of c that of the last one alone."""
    group, i, j, l, a, b, relax_a, relax_b = load_problems(
        log_kernel, stride_lg, stride_ln, log_a, stride_ag, stride_an, log_b, stride_bg, stride_bm, lam_a, lam_b,
        numbers, G, N, M, PB, NP, MP,
    )  # fmt: skip
    live = group < G
    f, g = a, b
    if start is not None:
        g = tl.load(start + group * M + j, mask=live & (j < M), other=-INF)
    running = live.to(tl.int32)  # [PB, 1, 1]
    done = running * 0
    latest = finite_or_zero(b) * 0.0
    rows = 1 if LAST else tl.maximum(T, 1)
    c += group * rows * M + j
    if T == 0:
        tl.store(c, log_sum_exp(l + a, 1), mask=live & (j < M))
    some = tl.max(running)
    t = T * 0
    while (t < T) & (some > 0):
        now = running > 0
        new_f = potential(a, relax_a, log_sum_exp(l + g, 2))
        new_c = log_sum_exp(l + new_f, 1)
        new_g = potential(b, relax_b, new_c)
        moved = tl.max(distance(new_g, g), 2, keep_dims=True)
        f, g = tl.where(now, new_f, f), tl.where(now, new_g, g)
        latest = tl.where(now, new_c, latest)
        done += running
        running = tl.where(moved <= numbers.tol, 0, running)
        some = tl.max(running)
        if not LAST:
            tl.store(c + t * wide(M), latest, mask=live & (j < M))
        t += 1
    if LAST:
        tl.store(c, latest, mask=live & (j < M) & (T > 0))
    else:
        for rest in range(t, T):  # all have converged
            tl.store(c + rest * wide(M), latest, mask=live & (j < M))
    tl.store(f_out + group * N + i, f, mask=live & (i < N))
    tl.store(g_out + group * M + j, g, mask=live & (j < M))
    problem = tl.program_id(0).to(tl.int64) * PB + tl.arange(0, PB)
    tl.store(iters + problem, tl.reshape(done, [PB]).to(tl.int64), mask=problem < G)


@triton.jit
def still_running(moved, group, blocks, tol, step):
    """Whether a problem takes part in this iteration: some block of its columns moved by more than tol in the last."""
    far = tl.where(step > 1, -1.0, INF)
    for block in range(0, tl.where(step > 1, blocks, 0)):
        far = tl.maximum(far, tl.load(moved + group * blocks + block))
    return far > tol


@triton.jit
def row_log_sums(log_kernel, rows, live, stride, g, M, BM: tl.constexpr):
    """LSE_j(ℓ + g) [BN], M beyond one tile in blocks of columns."""
    peak = tl.full([rows.shape[0]], -INF, tl.float32)
    total = tl.zeros([rows.shape[0]], tl.float32)
    for column in range(0, M, BM):
        j = column + tl.arange(0, BM)
        u = load_tile(log_kernel, rows, live, stride, j, M)
        u += tl.load(g + j, mask=j < M, other=-INF)[None, :]
        peak, total = add_exponentials(peak, total, u, 1)
    return natural_log_sum(peak, total)


@kernel
def sinkhorn_rows_kernel(
    log_kernel, stride_lg, stride_ln,  # [G, N, M]
    log_a, stride_ag, stride_an,  # [G, N] or None
    lam_a, numbers,  # [G] or None, Numbers
    f, g, moved,  # [G, N], [G, M], [G, blocks] in the iteration before
    peaks, totals,  # [G, splits, M]
    N, M, stretch, splits, blocks, step,
    UPDATE: tl.constexpr, LIMITED: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """f of a stretch of rows of one problem, and their column sums (peak, total) [M].

    ONE: the columns fit one tile, and their sums stay in registers over the stretch; else a stretch is BN rows.
    """
    split = tl.program_id(0) % splits
    group = (tl.program_id(0) // splits).to(tl.int64)
    log_kernel += group * wide(stride_lg)
    f += group * N
    g += group * M
    out = (group * splits + split) * M
    end = tl.minimum(N, (split + 1) * stretch)
    if LIMITED:
        end = tl.where(still_running(moved, group, blocks, numbers.tol, step), end, 0)
    peak = tl.full([BM], -INF, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(split * stretch, end, BN):
        rows = start + tl.arange(0, BN)
        live = rows < end
        if UPDATE:
            a = mass(log_a, group * wide(stride_ag) + rows * wide(stride_an), live, numbers.uniform_a)
            sums = row_log_sums(log_kernel, rows, live, stride_ln, g, M, BM)
            own = potential(a, rate(lam_a, numbers.rate_a, group, group >= 0), sums)
            tl.store(f + rows, own, mask=live)
        else:
            own = tl.load(f + rows, mask=live, other=-INF)
        for column in range(0, M, BM):
            j = column + tl.arange(0, BM)
            h = load_tile(log_kernel, rows, live, stride_ln, j, M) + own[:, None]
            if ONE:
                peak, total = add_exponentials(peak, total, h, 0)
            else:
                here = tl.max(h, 0)
                tl.store(peaks + out + j, here, mask=j < M)
                tl.store(totals + out + j, tl.sum(exp(h - finite_or_zero(here)[None, :]), 0), mask=j < M)
    if ONE:
        j = tl.arange(0, BM)
        tl.store(peaks + out + j, peak, mask=j < M)
        tl.store(totals + out + j, total, mask=j < M)


@triton.jit
def merged_columns(peaks, totals, j, M, splits, ROWS: tl.constexpr):
    """LSE [BM] of the partial sums [splits, M] of some columns, in a fixed order."""
    peak = tl.full([j.shape[0]], -INF, tl.float32)
    total = tl.zeros([j.shape[0]], tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        index = split[:, None] * wide(M) + j[None, :]
        some = (split < splits)[:, None] & (j < M)[None, :]
        part = tl.load(peaks + index, mask=some, other=-INF)
        new = tl.maximum(peak, tl.max(part, 0))
        safe = finite_or_zero(new)
        parts = tl.load(totals + index, mask=some, other=0.0) * exp(part - safe[None, :])
        total = total * exp(peak - safe) + tl.sum(parts, 0)
        peak = new
    return natural_log_sum(peak, total)


@kernel
def sinkhorn_columns_kernel(
    log_b, stride_bg, stride_bm,  # [G, M] or None
    lam_b, numbers,  # [G] or None, Numbers
    peaks, totals,  # [G, splits, M]
    g, c, iters,  # [G, M], [G, max(T, 1), M] (LAST: [G, 1, M]), [G]
    moved_before, moved,  # [G, blocks] in the iteration before, in this one
    M, T, splits, blocks, step,
    LAST: tl.constexpr, UPDATE: tl.constexpr, LIMITED: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """c^t and g^t of one block of columns; how far g moved; how many iterations the problem has run."""
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    j = block * BM + tl.arange(0, BM)
    inside = j < M
    new_c = merged_columns(peaks + group * splits * M, totals + group * splits * M, j, M, splits, ROWS)
    row = 0 if LAST else step - 1
    c += group * (1 if LAST else T) * M + j
    if UPDATE:
        old = tl.load(g + group * M + j, mask=inside, other=-INF)
        b = mass(log_b, group * wide(stride_bg) + j * wide(stride_bm), inside, numbers.uniform_b)
        new = potential(b, rate(lam_b, numbers.rate_b, group, group >= 0), new_c)
        if LIMITED:
            running = still_running(moved_before, group, blocks, numbers.tol, step)
            far = tl.max(distance(new, old), 0)
            tl.store(moved + group * blocks + block, tl.where(running, far, -1.0))
            new = tl.where(running, new, old)
            above = 0 if LAST else step - 2
            before = tl.load(c + above * wide(M), mask=j < tl.where(step > 1, M, 0), other=-INF)
            new_c = tl.where(running, new_c, before)
            if running & (block == 0):
                tl.store(iters + group, step.to(tl.int64))
        elif block == 0:
            tl.store(iters + group, step.to(tl.int64))
        tl.store(g + group * M + j, new, mask=inside)
    tl.store(c + row * wide(M), new_c, mask=inside)


def _fill(out: Tensor, given: Tensor | None) -> None:
    """Log masses, or the uniform ones, into `out` [G, n]."""
    out.fill_(-math.log(out.shape[1])) if given is None else out.copy_(given)


def sinkhorn(x: Sinkhorn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [G, N], g [G, M], c [G, max(T, 1), M], iters [G]."""
    return _iterated(x, None, last=False)


def started(x: Sinkhorn, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sinkhorn`, from g⁰ = start [G, M] where that is finite and there is mass; of c the last alone."""
    return _iterated(x, start, last=True)


def _iterated(x: Sinkhorn, start: Tensor | None, last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`started`; unless `last`, with the c of every iteration."""
    x = unit(x)
    (groups, n, m), new = x.log_kernel.shape, x.log_kernel.new_empty
    f, g, iters = new((groups, n)), new((groups, m)), new(groups, dtype=torch.int64)
    steps = max(x.num_iters, 1)
    c = new((groups, 1 if last else steps, m)).expand(-1, steps, -1)
    cut = resident(n, m)
    if start is not None or cut is None:
        _fill(g, x.log_b)
    if start is not None:
        start = g.copy_(started_at(start, g))  # read before it is written again
    if cut is None:
        _stream(x, f, g, c, iters, last)
    else:
        constants = {"LAST": last, "PB": cut.PB, "NP": cut.NP, "MP": cut.MP}
        args = (*given(x), start, f, g, c, iters, groups, n, m, x.num_iters)
        launch(sinkhorn_resident_kernel, -(-groups // cut.PB), args, constants, cut.tile)
    return f, g, c, iters


def _stream(x: Sinkhorn, f: Tensor, g: Tensor, c: Tensor, iters: Tensor, last: bool) -> None:
    """Two launches an iteration (T = 0: for the one column sum), from g."""
    (groups, n, m), new, own = x.log_kernel.shape, x.log_kernel.new_empty, numbers(x)
    _fill(f, x.log_a)
    if x.num_iters == 0:
        iters.zero_()
    t, split = stream(n, m, groups, device_of(x.log_kernel))
    blocks = -(-m // COLUMNS.depth)
    sums = [new((groups, split.programs, m)) for _ in range(2)]  # peaks, totals
    moved = [new((groups, blocks)) for _ in range(2)]  # in the iteration before, in this one
    flags: dict[str, Any] = {"UPDATE": x.num_iters > 0, "LIMITED": own.tol >= 0 and x.num_iters > 0}
    cut_rows = flags | {"ONE": m <= t.depth, "BN": t.rows, "BM": t.depth}
    cut_columns = flags | {"LAST": last, "ROWS": COLUMNS.rows, "BM": COLUMNS.depth}
    rows, columns = (*spanned(x.log_kernel), *spanned(x.log_a), x.lam_a, own), (*spanned(x.log_b), x.lam_b, own)
    for step in range(1, max(x.num_iters, 1) + 1):
        args: tuple[Any, ...] = (*rows, f, g, moved[0], *sums, n, m, *split, blocks, step)
        launch(sinkhorn_rows_kernel, groups * split.programs, args, cut_rows, t)
        args = (*columns, *sums, g, c, iters, *moved, m, c.shape[1], split.programs, blocks, step)
        launch(sinkhorn_columns_kernel, groups * blocks, args, cut_columns, COLUMNS)
        moved.reverse()
