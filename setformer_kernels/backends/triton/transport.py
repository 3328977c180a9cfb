"""Keys onto references: one pass over the keys per Sinkhorn iteration, the last pooling the values as well.

    u = ℓ + g^{t−1},  m_s = max_j u_sj,  p = e^{u − m},  f_s = log a_s − λ_a (m_s + log Σ_j p_sj),  c^t_j = LSE_s(ℓ_sj + f_s)

The M references fit a tile, so the row update is local.  A program walks a stretch of the keys of one head and leaves
partial column sums (peak, total) [M], and at the last pass the pooled values in units of e^peak [M, E]; the next pass
merges the partial sums as it begins, `finish_kernel` those of the last.  Sums run in a fixed order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, Options
from .config import Tile, padded, tile
from .launch import device_of, launch
from .prepare import Prepared, aligned, unit_rows
from .primitives import (
    INF,
    LN2,
    LOG2E,
    SPAN,
    dot,
    finite_or_zero,
    head_parameters,
    inverse_norm,
    kernel_value,
    load_references,
    load_rows,
    log_sum,
    merged_log_sum,
    potential,
    products,
    squared_distance,
)

LENGTHS = ["stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn", "stride_ab", "stride_ah",
           "stride_an", "stride_pb", "stride_ph", "stride_pn", "H", "S", "stretch", "splits", "step"]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def transport_kernel(
    key, value, log_a, position, y, log_b, pi, parameters,
    peak_in, total_in, peak_out, total_out, pooled, c,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, step, uniform,
    T: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    P: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr, BS: tl.constexpr, DEPTH: tl.constexpr,
    VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration (T = 0: the one column sum) over `stretch` keys of one head, and VDEPTH columns of the values."""
    v_blocks: tl.constexpr = EP // VDEPTH if LAST else 1
    block = tl.program_id(0) % v_blocks
    split = tl.program_id(0) // v_blocks % splits
    bh = (tl.program_id(0) // (v_blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    j, e = tl.arange(0, MP), block * VDEPTH + tl.arange(0, VDEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    key += b * hinted(stride_kb, ALIGNED) + h * hinted(stride_kh, ALIGNED)
    value += b * hinted(stride_vb, ALIGNED) + h * hinted(stride_vh, ALIGNED)
    if log_a is not None:
        log_a += b * stride_ab + h * stride_ah
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    y_first = load_references(y, 0, MP, DP, DEPTH)
    g = tl.load(log_b + h * MP + j)  # [MP]
    if not FIRST:
        before = merged_log_sum(peak_in + bh * splits * MP, total_in + bh * splits * MP, splits, MP)
        g = potential(g, lam_b, before)
        if (split == 0) & (block == 0):
            tl.store(c + (bh * T + step - 2) * M + j, before * LN2, mask=j < M)
    always = potentials_narrow(g, beta, scale, M)
    peak = tl.full([MP], -INF, tl.float32)
    total = tl.zeros([MP], tl.float32)
    sums = tl.zeros([MP, VDEPTH], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in range(split * stretch, end, BS):
        rows = start + tl.arange(0, BS)
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, _, _, _, _ = token_logits(
            key, rows, live, hinted(stride_kn, ALIGNED), position, stride_pn, pi, y, y_first, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION,
        )  # fmt: skip
        narrow = tile_narrow(l, g, live, M) if DOT or P > 0 else always
        weights, here = column_weights(l, g, mass, lam_a, narrow, T > 0)
        new = tl.maximum(peak, here)
        safe = finite_or_zero(new)
        weights *= tl.exp2(here - safe)[None, :]  # [BS, MP]
        fade = tl.exp2(peak - safe)
        total = total * fade + tl.sum(weights, 0)
        peak = new
        if LAST:
            v = load_rows(value, rows, live, hinted(stride_vn, ALIGNED), e, E)
            sums = sums * fade[:, None] + dot(tl.trans(weights.to(v.dtype)), v, PRECISION)
    out = (bh * splits + split) * MP
    tl.store(peak_out + out + j, peak, mask=(j < MP) & (block == 0))
    tl.store(total_out + out + j, total, mask=(j < MP) & (block == 0))
    if LAST:
        tl.store(pooled + (out + j)[:, None] * EP + e[None, :], sums)


@triton.jit(do_not_specialize=["splits"])
def finish_kernel(
    peaks, totals, pooled, c, z, splits,
    ITERS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of the last pass, merged: its c [M], and BLOCK numbers of z [M, E]."""
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    peaks += bh * splits * MP
    totals += bh * splits * MP
    j = tl.arange(0, MP)
    if block == 0:
        last = merged_log_sum(peaks, totals, splits, MP)
        tl.store(c + (bh * ITERS + ITERS - 1) * M + j, last * LN2, mask=j < M)
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, e, i = index // EP, index % EP, tl.arange(0, 16)
    peak = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, 16):
        split = (start + i)[:, None]
        some = split < splits
        part = tl.load(peaks + split * MP + row[None, :], mask=some, other=-INF)  # [16, BLOCK]
        new = tl.maximum(peak, tl.max(part, 0))
        safe = finite_or_zero(new)
        fade, weight = tl.exp2(peak - safe), tl.exp2(part - safe[None, :])
        mass = tl.load(totals + split * MP + row[None, :], mask=some, other=0.0)
        sums = tl.load(pooled + split.to(tl.int64) * (MP * EP) + bh * splits * (MP * EP) + index[None, :], mask=some, other=0.0)
        total = total * fade + tl.sum(mass * weight, 0)
        value = value * fade + tl.sum(sums * weight, 0)
        peak = new
    mean = tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(z + (bh * M + row) * E + e, mean, mask=(row < M) & (e < E))
