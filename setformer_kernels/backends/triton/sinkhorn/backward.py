"""Backward of Sinkhorn, exact for the iterations that ran; from c^1..c^T alone (reference/README.md).

    for t = T..1, with dg^T and d_f given:   dc = −λ_b dg^t,   Q = e^{ℓ + f^t − c^t},   R = e^{ℓ + g^{t−1} − LSE_j}
        df^t = [t = T] d_f + Σ_j Q dc,   dℓ += Q dc − λ_a R df^t,   dg^{t−1} = −λ_a Σ_s R df^t
    d log a = Σ_t df^t,  d log b = Σ_{t≥0} dg^t,  dλ_a = −Σ_t ⟨df^t, LSE_j(ℓ + g^{t−1})⟩,  dλ_b = −Σ_{t≥1} ⟨dg^t, c^t⟩

What is −∞ passes nothing on.  The routes are those of the forward pass; streaming, dℓ is added up in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Sinkhorn, in_order
from ..device.primitives import INF, finite_or_zero, potential
from ..device.rows import wide
from ..host.launch import device_of, kernel, launch
from ..host.tiles import Tile
from .problem import (
    COLUMNS,
    add_exponentials,
    exp,
    given,
    load_problems,
    load_tile,
    mass,
    natural_log_sum,
    peak_and_total,
    rate,
    resident,
    stream,
    unit,
)

RESIDENT = 4096  # numbers of ℓ in one program: ℓ, dℓ, Q and R are 8 registers a thread of sixteen warps each
STREAM = 2048  # numbers of a tile that streams: twice the arrays of the forward pass, half their size
FINISH = Tile(rows=1, depth=256, warps=4, stages=1)


@triton.jit
def softmax(x, peak, total):
    """e^{x − LSE} from the parts of the LSE, whose sum would round them away where it is large; 0 where it is −∞."""
    return exp(x - finite_or_zero(peak)) / tl.where(total > 0, total, 1.0)


@kernel
def sinkhorn_resident_backward_kernel(
    log_kernel, stride_lg, stride_ln,  # [G, N, M]
    log_a, stride_ag, stride_an,  # [G, N] or None
    log_b, stride_bg, stride_bm,  # [G, M] or None
    lam_a, lam_b, numbers,  # [G] or None, [G] or None, Numbers
    c, iters, d_f, d_g,  # [G, T, M], [G], [G, N], [G, M]
    d_log_kernel, d_log_a, d_log_b, d_lam,  # [G, N, M], [G, N], [G, M], [G, 2], None where not needed
    G, N, M, T,
    PB: tl.constexpr, NP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """All iterations of PB problems, downwards."""
    group, i, j, l, a, b, relax_a, relax_b = load_problems(
        log_kernel, stride_lg, stride_ln, log_a, stride_ag, stride_an, log_b, stride_bg, stride_bm, lam_a, lam_b,
        numbers, G, N, M, PB, NP, MP,
    )  # fmt: skip
    live = group < G
    in_rows, in_columns = live & (i < N), live & (j < M)
    ran = tl.load(iters + group, mask=live, other=0).to(tl.int32)
    given_f = tl.load(d_f + group * N + i, mask=in_rows, other=0.0)
    dg = tl.load(d_g + group * M + j, mask=in_columns, other=0.0)
    c += group * T * M + j
    dl = tl.zeros([PB, NP, MP], tl.float32)
    da = tl.where(ran == 0, given_f, 0.0)
    db = dg * 0.0
    d_lam_a, d_lam_b = tl.zeros([PB, 1, 1], tl.float32), tl.zeros([PB, 1, 1], tl.float32)
    top = tl.max(ran)
    for back in range(0, top):
        t = top - back
        now = t <= ran
        this = tl.load(c + (t - 1) * wide(M), mask=in_columns & now, other=-INF)
        before = tl.load(c + (t - 2) * wide(M), mask=in_columns & now & (j < tl.where(t > 1, M, 0)), other=-INF)
        g = tl.where(j < tl.where(t > 1, M, 0), potential(b, relax_b, before), b)
        dg_here = tl.where(this > -INF, dg, 0.0)
        db += dg_here
        d_lam_b -= tl.sum(dg_here * finite_or_zero(this), 2, keep_dims=True)
        row_peak, row_total = peak_and_total(l + g, 2)
        sums = natural_log_sum(row_peak, row_total)
        f = potential(a, relax_a, sums)
        through = softmax(l + f, *peak_and_total(l + f, 1)) * (-relax_b * dg_here)  # Q dc
        df = tl.sum(through, 2, keep_dims=True) + tl.where(t == ran, given_f, 0.0)
        df = tl.where(now & (sums > -INF), df, 0.0)
        da += df
        d_lam_a -= tl.sum(df * finite_or_zero(sums), 1, keep_dims=True)
        back_r = softmax(l + g, row_peak, row_total) * (-relax_a * df)
        dl += through + back_r
        dg = tl.where(now, tl.sum(back_r, 1, keep_dims=True), dg)
    if d_log_kernel is not None:
        tl.store(d_log_kernel + (group * N + i) * M + j, dl, mask=in_rows & in_columns)
    if d_log_a is not None:
        tl.store(d_log_a + group * N + i, da, mask=in_rows)
    if d_log_b is not None:
        tl.store(d_log_b + group * M + j, db + dg, mask=in_columns)
    if d_lam is not None:
        tl.store(d_lam + group * 2, d_lam_a, mask=live)
        tl.store(d_lam + group * 2 + 1, d_lam_b, mask=live)


@triton.jit
def potentials_before(log_b, stride_bm, c, relax_b, uniform_b, j, t, M):
    """g^{t−1} of some columns: log b − λ_b c^{t−1}, log b at t = 1."""
    b = mass(log_b, j * wide(stride_bm), j < M, uniform_b)
    before = tl.load(c + (t - 2) * wide(M) + j, mask=j < tl.where(t > 1, M, 0), other=-INF)
    return tl.where(j < tl.where(t > 1, M, 0), potential(b, relax_b, before), b)


@triton.jit
def column_cotangent(d_g, dg, c, t, ran, j, M):
    """(dg^t where column j was reached, c^t or 0 where not): d_g at the last iteration, else what t + 1 left."""
    value = tl.load(d_g + j, mask=j < tl.where(t == ran, M, 0), other=0.0)
    value += tl.load(dg + t * wide(M) + j, mask=j < tl.where(t < ran, M, 0), other=0.0)
    this = tl.load(c + (t - 1) * wide(M) + j, mask=j < M, other=-INF)
    return tl.where(this > -INF, value, 0.0), finite_or_zero(this)


@kernel
def sinkhorn_rows_backward_kernel(
    log_kernel, stride_lg, stride_ln,  # [G, N, M]
    log_a, stride_ag, stride_an,  # [G, N] or None
    log_b, stride_bg, stride_bm,  # [G, M] or None
    lam_a, lam_b, numbers,  # [G] or None, [G] or None, Numbers
    c, iters, d_f, d_g, dg,  # [G, T, M], [G], [G, N], [G, M], [G, T + 1, M]
    d_log_kernel, d_log_a,  # [G, N, M] or None, [G, N] or None
    partial, partial_lam,  # [G, splits, M], [T, G, splits]
    N, M, T, stretch, splits, t, G,
    ONE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Iteration t on a stretch of rows of one problem: df^t, dℓ, and partial sums of dg^{t−1} [M] and dλ_a."""
    split = tl.program_id(0) % splits
    group = (tl.program_id(0) // splits).to(tl.int64)
    ran = tl.load(iters + group).to(tl.int32)
    relax_a, relax_b = rate(lam_a, numbers.rate_a, group, group >= 0), rate(lam_b, numbers.rate_b, group, group >= 0)
    log_kernel += group * wide(stride_lg)
    c += group * T * M
    d_g += group * M
    dg += group * (T + 1) * M
    if log_b is not None:
        log_b += group * wide(stride_bg)
    out = partial + (group * splits + split) * M
    end = tl.where(t <= ran, tl.minimum(N, (split + 1) * stretch), 0)
    total = tl.zeros([BM], tl.float32)
    total_lam = tl.zeros([BN], tl.float32)
    for start in range(split * stretch, end, BN):
        rows = start + tl.arange(0, BN)
        live = rows < end
        peak, mass_sum = tl.full([BN], -INF, tl.float32), tl.zeros([BN], tl.float32)
        for column in range(0, M, BM):
            j = column + tl.arange(0, BM)
            g = potentials_before(log_b, stride_bm, c, relax_b, numbers.uniform_b, j, t, M)
            u = load_tile(log_kernel, rows, live, stride_ln, j, M) + g[None, :]
            peak, mass_sum = add_exponentials(peak, mass_sum, u, 1)
        sums = natural_log_sum(peak, mass_sum)
        a = mass(log_a, group * wide(stride_ag) + rows * wide(stride_an), live, numbers.uniform_a)
        f = potential(a, relax_a, sums)
        df = tl.load(d_f + group * N + rows, mask=rows < tl.where(t == ran, end, 0), other=0.0)
        for column in range(0, M, BM):
            j = column + tl.arange(0, BM)
            dg_here, this = column_cotangent(d_g, dg, c, t, ran, j, M)
            h = load_tile(log_kernel, rows, live, stride_ln, j, M) + f[:, None]
            df += tl.sum(exp(h - this[None, :]) * (-relax_b * dg_here)[None, :], 1)
        df = tl.where(sums > -INF, df, 0.0)
        total_lam -= df * finite_or_zero(sums)
        if d_log_a is not None:
            own = d_log_a + group * N + rows
            tl.store(own, df + tl.load(own, mask=rows < tl.where(t < ran, end, 0), other=0.0), mask=live)
        for column in range(0, M, BM):
            j = column + tl.arange(0, BM)
            l = load_tile(log_kernel, rows, live, stride_ln, j, M)
            g = potentials_before(log_b, stride_bm, c, relax_b, numbers.uniform_b, j, t, M)
            back_r = softmax(l + g[None, :], peak[:, None], mass_sum[:, None]) * (-relax_a * df)[:, None]
            if ONE:
                total += tl.sum(back_r, 0)
            else:
                tl.store(out + j, tl.sum(back_r, 0), mask=j < M)
            if d_log_kernel is not None:
                dg_here, this = column_cotangent(d_g, dg, c, t, ran, j, M)
                dl = back_r + exp(l + f[:, None] - this[None, :]) * (-relax_b * dg_here)[None, :]
                at = d_log_kernel + (group * N + rows)[:, None] * M + j[None, :]
                old = tl.load(at, mask=live[:, None] & (j < tl.where(t < ran, M, 0))[None, :], other=0.0)
                tl.store(at, old + dl, mask=live[:, None] & (j < M)[None, :])
    if ONE:
        j = tl.arange(0, BM)
        tl.store(out + j, total, mask=j < M)
    tl.store(partial_lam + ((t - 1) * wide(G) + group) * splits + split, tl.sum(total_lam, 0))


@kernel
def sinkhorn_columns_backward_kernel(
    partial, iters, dg,  # [G, splits, M], [G], [G, T + 1, M]
    M, T, splits, blocks, t,
    ROWS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """dg^{t−1} of one block of columns, from the partial sums in a fixed order."""
    group = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        mask = (split < splits)[:, None] & (j < M)[None, :]
        total += tl.sum(tl.load(partial + (group * splits + split)[:, None] * M + j[None, :], mask=mask, other=0.0), 0)
    ran = tl.load(iters + group)
    tl.store(dg + (group * (T + 1) + t - 1) * M + j, total, mask=j < tl.where(t <= ran, M, 0))


@kernel
def sinkhorn_finish_backward_kernel(
    c, iters, d_g, dg,  # [G, T, M], [G], [G, M], [G, T + 1, M]
    partial_lam, d_log_b, d_lam,  # [T, G, splits], [G, M] or None, [G, 2] or None
    M, T, splits, G,
    BM: tl.constexpr
):  # fmt: skip
    """d log b, dλ_a and dλ_b of one problem: sums over its iterations."""
    group = tl.program_id(0).to(tl.int64)
    ran = tl.load(iters + group).to(tl.int32)
    c += group * T * M
    d_g += group * M
    dg += group * (T + 1) * M
    near = tl.arange(0, BM)
    total_b, total_a = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for column in range(0, M, BM):
        j = column + near
        total = tl.load(dg + j, mask=j < M, other=0.0)
        for t in range(1, ran + 1):
            here, this = column_cotangent(d_g, dg, c, t, ran, j, M)
            total += here
            total_b -= here * this
        if d_log_b is not None:
            tl.store(d_log_b + group * M + j, total, mask=j < M)
    for t in range(0, ran):
        for split in range(0, splits, BM):
            at = partial_lam + (t * wide(G) + group) * splits + split + near
            total_a += tl.load(at, mask=split + near < splits, other=0.0)
    if d_lam is not None:
        tl.store(d_lam + group * 2, tl.sum(total_a, 0))
        tl.store(d_lam + group * 2 + 1, tl.sum(total_b, 0))


def _stream_backward(x: Sinkhorn, state: tuple[Tensor, ...], out: tuple[Tensor | None, ...]) -> None:
    """Two launches an iteration, and one that sums over the iterations."""
    c, iters, d_f, d_g = state
    d_l, d_log_a, d_log_b, d_lam = out
    (groups, n, m), T, new = x.log_kernel.shape, c.shape[1], x.log_kernel.new_empty
    t, split = stream(n, m, groups, device_of(x.log_kernel), STREAM)
    blocks = -(-m // COLUMNS.depth)
    dg, partial = new((groups, T + 1, m)), new((groups, split.programs, m))
    partial_lam = new((T, groups, split.programs))
    cut_rows = {"ONE": m <= t.depth, "BN": t.rows, "BM": t.depth}
    cut_columns = {"ROWS": COLUMNS.rows, "BM": COLUMNS.depth}
    if T == 1:  # or 0, which only the device knows: then nothing below writes these
        dg[:, 0].copy_(d_g)
        for gradient, value in ((d_l, None), (d_log_a, d_f)):
            if gradient is not None:
                gradient.zero_() if value is None else gradient.copy_(value)
    tensors = (*given(x), c, iters, d_f, d_g, dg, d_l, d_log_a, partial, partial_lam)
    for step in range(T, 0, -1):
        args: tuple[Any, ...] = (*tensors, n, m, T, *split, step, groups)
        launch(sinkhorn_rows_backward_kernel, groups * split.programs, args, cut_rows, t)
        args = (partial, iters, dg, m, T, split.programs, blocks, step)
        launch(sinkhorn_columns_backward_kernel, groups * blocks, args, cut_columns, COLUMNS)
    args = (c, iters, d_g, dg, partial_lam, d_log_b, d_lam, m, T, split.programs, groups)
    launch(sinkhorn_finish_backward_kernel, groups, args, {"BM": FINISH.depth}, FINISH)


def sinkhorn_backward(
    x: Sinkhorn, c: Tensor, iters: Tensor, d_f: Tensor, d_g: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(d log_kernel, d log_a, d log_b, dλ_a, dλ_b), None where not needed."""
    tensors, x = x.tensors, unit(x)
    wanted = [n and t is not None for t, n in zip(tensors, needs, strict=True)]
    groups, n, m = x.log_kernel.shape
    shapes = ((groups, n, m), (groups, n), (groups, m), (groups, 2))
    flags = (*wanted[:3], any(wanted[3:]))
    out = tuple([x.log_kernel.new_empty(s) if w else None for s, w in zip(shapes, flags, strict=True)])
    state = (c, iters, d_f.contiguous(), d_g.contiguous())
    cut = resident(n, m, RESIDENT)
    if cut is None:
        _stream_backward(x, state, out)
    else:
        t = cut.tile._replace(warps=16) if cut.NP * cut.MP == RESIDENT else cut.tile
        constants = {"PB": cut.PB, "NP": cut.NP, "MP": cut.MP}
        args = (*given(x), *state, *out, groups, n, m, c.shape[1])
        launch(sinkhorn_resident_backward_kernel, -(-groups // cut.PB), args, constants, t)
    grads = [in_order(t, g) for t, g in zip(tensors[:3], out[:3], strict=True)]
    # Outputs of an op share no memory, but `contiguous` would leave the columns of one problem where they are.
    d_lams = [
        out[3].new_empty(groups).copy_(out[3][:, k]) if out[3] is not None and wanted[3 + k] else None for k in range(2)
    ]
    return *grads, *d_lams
