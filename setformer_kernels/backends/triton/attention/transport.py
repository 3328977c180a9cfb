"""Keys onto references: one pass over the keys per Sinkhorn iteration, the last pooling the values as well.

    u = ℓ + g^{t−1},  m_s = max_j u_sj,  p = e^{u − m},  f_s = log a_s − λ_a (m_s + log Σ_j p_sj),
    c^t_j = LSE_s(ℓ_sj + f_s);  last:  z_j = Σ_s e^{ℓ_sj + f_s − c_j} v_s

The M references fit a tile, so the row update is local.  A program walks a stretch of the keys of one head and leaves
partial column sums (peak, total) [M], and at the last pass the pooled values in units of e^peak [M, E]; the next pass
merges the partial sums as it begins, `transport_finish_kernel` those of the last.  Sums run in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_parameters
from ..device.logits import key_mass, load_references_t, load_rows, token_logits
from ..device.plan import farthest, log_domain_weights, narrow_weights, potentials_narrow, range_known
from ..device.primitives import INF, LN2, column_sum, dot, finite_or_zero, merged_log_sum, rounded
from ..host.launch import Split, device_of, kernel, launch, split_tokens
from ..host.rows import stride_step, strides, unit_rows
from ..host.tiles import Tile, padded, tile
from ..parameters.prepare import Prepared


@triton.jit
def walk_keys(
    key, value, log_a, position, pi, y, y_t, g, e, start, end, stride_kn, stride_vn, stride_an, stride_pn, uniform,
    beta, scale, tau, relaxation, NARROW: tl.constexpr, UPDATE_ROWS: tl.constexpr, POOL: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    BS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """(peak, total [MP], sums [MP, VDEPTH]) of keys start..end: Σ e^{ℓ+f} = total·e^peak, Σ e^{ℓ+f} v = sums·e^peak."""
    MP: tl.constexpr = g.shape[0]
    top = tl.max(g, 0)
    shift = g - top if UPDATE_ROWS else tl.zeros_like(g)
    peak = tl.full([MP], -INF, tl.float32)
    total = tl.zeros([MP], tl.float32)
    sums = tl.zeros([MP, e.shape[0]], tl.float32)
    # Where nothing is rescaled, sums over tokens can wait until after the loop: as long as registers last.
    DEFER: tl.constexpr = NARROW and MP <= 64
    tile = tl.zeros([BS, MP], tl.float32) if DEFER else total
    for first in range(start, end, BS):
        rows = first + tl.arange(0, BS)
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, kappa, cosine, inverse, first_columns = token_logits(
            key, rows, live, stride_kn, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
        )  # fmt: skip
        if NARROW:
            # Without positions ℓ is κ/ε − 1/ε: one multiply-add with the shift.
            exponent = l + shift[None, :] if P > 0 else kappa * scale + (shift - scale)[None, :]
            weights = narrow_weights(exponent, mass, relaxation, UPDATE_ROWS)  # [BS, MP]
        else:
            weights, here = log_domain_weights(l, g, mass, relaxation, UPDATE_ROWS)
            new = tl.maximum(peak, here)
            weights *= tl.exp2(here - finite_or_zero(new))[None, :]
            fade = tl.exp2(peak - finite_or_zero(new))
            total *= fade
            sums *= fade[:, None]
            peak = new
        if DEFER:
            tile += weights
        else:
            total += column_sum(weights)
        if POOL:
            v = load_rows(value, rows, live, stride_vn, e, E)
            high = rounded(weights, v.dtype)
            sums += dot(tl.trans(high), v, PRECISION)
            if v.dtype != tl.float32:  # the backward subtracts ⟨dz, z⟩ from ⟨dz, v⟩: z needs all of its weights
                sums += dot(tl.trans(rounded(weights - high.to(tl.float32), v.dtype)), v, PRECISION)
    if NARROW:
        total = column_sum(tile) if DEFER else total
        peak = tl.zeros_like(g)
        if UPDATE_ROWS:
            peak = tl.where(g > -INF, (1.0 - relaxation) * top - finite_or_zero(g), -INF)
    return peak, total, sums


@kernel
def transport_kernel(
    key, value, log_a, position, y, log_b, pi, parameters,
    peak_in, total_in, peak_out, total_out, pooled, c,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, iteration, iterations, uniform,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    P: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, BS: tl.constexpr, DEPTH: tl.constexpr,
    VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Iteration t ≥ 1 (not UPDATE_ROWS: the one column sum of T = 0) over `stretch` keys of one head.

    The last iteration also pools; its programs each take VDEPTH columns of the values.
    """
    v_blocks: tl.constexpr = EP // VDEPTH if LAST else 1
    block = tl.program_id(0) % v_blocks
    split = tl.program_id(0) // v_blocks % splits
    bh = (tl.program_id(0) // (v_blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    j, e = tl.arange(0, MP), block * VDEPTH + tl.arange(0, VDEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    key += b * (stride_kb * STEP) + h * (stride_kh * STEP)
    value += b * (stride_vb * STEP) + h * (stride_vh * STEP)
    if log_a is not None:
        log_a += b * stride_ab + h * stride_ah
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    g = tl.load(log_b + h * MP + j)  # [MP]
    if not FIRST:
        before = merged_log_sum(peak_in + bh * splits * MP, total_in + bh * splits * MP, splits, MP)
        g -= lam_b * finite_or_zero(before)
        if (split == 0) & (block == 0):
            tl.store(c + (bh * iterations + iteration - 2) * M + j, before * LN2, mask=j < M)
    start, end = split * stretch, tl.minimum(S, (split + 1) * stretch)
    if RANGE == "always":
        narrow = True
    elif RANGE == "device":
        distance = tau * farthest(position, start, end, stride_pn, pi, M, MP, P) if P > 0 else 0.0
        narrow = potentials_narrow(g, beta, scale, M, distance)
    else:
        narrow = False
    if narrow:
        peak, total, sums = walk_keys(
            key, value, log_a, position, pi, y, y_t, g, e, start, end, stride_kn * STEP, stride_vn * STEP, stride_an,
            stride_pn, uniform, beta, scale, tau, lam_a, True, UPDATE_ROWS, LAST, M, D, DP, E, P, DOT, BS, DEPTH,
            PRECISION, ACROSS,
        )  # fmt: skip
    else:
        peak, total, sums = walk_keys(
            key, value, log_a, position, pi, y, y_t, g, e, start, end, stride_kn * STEP, stride_vn * STEP, stride_an,
            stride_pn, uniform, beta, scale, tau, lam_a, False, UPDATE_ROWS, LAST, M, D, DP, E, P, DOT, BS, DEPTH,
            PRECISION, ACROSS,
        )  # fmt: skip
    out = (bh * splits + split) * MP + j
    if block == 0:
        tl.store(peak_out + out, peak)
        tl.store(total_out + out, total)
    if LAST:
        tl.store(pooled + out[:, None] * EP + e[None, :], sums)


@kernel
def transport_finish_kernel(
    peaks, totals, pooled, c, z, splits, iterations,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
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
        tl.store(c + (bh * iterations + iterations - 1) * M + j, last * LN2, mask=j < M)
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
        sums = tl.load(pooled + (bh * splits + split) * (MP * EP) + index[None, :], mask=some, other=0.0)
        total = total * fade + tl.sum(mass * weight, 0)
        value = value * fade + tl.sum(sums * weight, 0)
        peak = new
    mean = tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(z + (bh * M + row) * E + e, mean, mask=(row < M) & (e < E))


FINISH = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 splits, 256] tile is 32 numbers a thread


def transport(x: Operands, opt: Options, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E] and c [B, H, max(T, 1), M] of the keys and values."""
    b, h, s, _ = x.key.shape
    m, e = x.references.shape[1], x.value.shape[-1]
    iterations = max(opt.num_iters, 1)
    z, c = x.references.new_empty((b, h, m, e)), x.references.new_empty((b, h, iterations, m))
    split, partial = column_sums(x, opt, prepared, c)
    mp, ep = padded(m), padded(e)
    block = min(256, mp * ep)
    constants = {"M": m, "MP": mp, "E": e, "EP": ep, "BLOCK": block}
    launch(
        transport_finish_kernel,
        b * h * mp * ep // block,
        (*partial, c, z, split.programs, iterations),
        constants,
        FINISH,
    )
    return z, c


def _range(x: Operands, opt: Options) -> str:
    """`range_known`, with positions bounded by their boxes; what is left runs in the log domain."""
    boxed = x.reference_position is not None and opt.kernel == "rbf" and x.key.dtype != torch.float16
    return "device" if boxed else range_known(x, opt)


def warps_across(references: int, known: str, itemsize: int) -> bool:
    """Whether warps share the references rather than the keys.

    Sharing keys, a thread holds M/4 entries of every [M] vector: too many beyond 128 references, and beyond 64 where
    the log domain adds peaks to potentials and sums, or float32 operands come in three parts.  Sharing references
    costs each row's logarithm in many threads.
    """
    return references > (128 if known == "always" and itemsize == 2 else 64)


def column_sums(x: Operands, opt: Options, prepared: Prepared, c: Tensor) -> tuple[Split, tuple[Tensor, ...]]:
    """Writes c^1..c^{T−1}; the last iteration's (peaks, totals [BH, splits, MP], pooled [BH, splits, MP, EP])."""
    key, value = unit_rows(x.key), unit_rows(x.value)
    position = None if x.key_position is None else unit_rows(x.key_position)
    (b, h, s, d), m, e = key.shape, x.references.shape[1], value.shape[-1]
    device = device_of(key)
    _, mp, dp = prepared.y.shape
    ep = padded(e)
    known = _range(x, opt)
    across = warps_across(mp, known, key.element_size())
    kind = "column" if known == "always" and not across else "across"
    cut = tile(kind, device.family, max(mp, dp, ep), key.element_size())
    split = split_tokens(s, cut.rows, b * h, device.multiprocessors)
    new = x.references.new_empty
    sums = [new((b * h, split.programs, mp)) for _ in range(4)]  # (peak, total) of this iteration and of the one before
    pooled = new((b * h, split.programs, mp, ep))
    step = stride_step(key, value)
    counts = (*strides(key, step), *strides(value, step), *strides(x.log_a), *strides(position), h, s, *split)
    tokens = (key, value, x.log_a, position, prepared.y, prepared.log_b, prepared.position, prepared.parameters)
    constants: dict[str, Any] = {
        "RANGE": known, "UPDATE_ROWS": opt.num_iters > 0, "M": m, "MP": mp, "D": d, "DP": dp, "E": e, "EP": ep,
        "P": 0 if position is None else position.shape[-1], "DOT": opt.kernel == "dot",
        "STEP": step, "BS": cut.rows, "DEPTH": min(cut.depth, dp), "VDEPTH": min(cut.depth, ep),
        "PRECISION": device.precision, "ACROSS": across,
    }  # fmt: skip
    uniform = -math.log2(s) if s else 0.0
    iterations = c.shape[2]
    for t in range(1, iterations + 1):
        last = t == iterations
        blocks = ep // constants["VDEPTH"] if last else 1
        args = (*tokens, *sums[2:], *sums[:2], pooled, c, *counts, t, iterations, uniform)
        variant = constants | {"FIRST": t == 1, "LAST": last}
        launch(transport_kernel, b * h * split.programs * blocks, args, variant, cut)
        sums = sums[2:] + sums[:2]
    return split, (*sums[2:], pooled)
