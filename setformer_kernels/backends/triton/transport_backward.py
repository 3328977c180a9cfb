"""Backward of the transport, exact for the T iterations that ran: from dz and dg^T to dk, dv and the parameters' parts.

With p = e^{ℓ+g^{t−1}−m} the numerators of the row update, r = Σ_j p, and dc^t = −λ_b dg^t:

    R^t = p/r,   Q^t_sj = e^{ℓ+f^t−c^t} = p · e^{f+m−K} · e^{K−g^{t−1}−c^t},   W^k = Q^T
    contribution^t_sj = Q^t_sj dc^t_j   (t = T: Q^T_sj (⟨v_s, dz_j⟩ − ⟨dz_j, z_j⟩ + dc^T_j)),   df^t_s = Σ_j contribution^t_sj
    dℓ = Σ_t contribution^t − λ_a R^t df^t,   dg^{t−1}_j = −λ_a Σ_s R^t_sj df^t_s

`state_kernel` merges what the queries left and prepares the columns (g^{t−1}, c^t, K, e^{K−g−c}); `column_kernel` is one
pass over the keys per t = T..2 for dg^{t−1}; `key_kernel` then sums all terms of dℓ in one last pass, and dg^0 with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, Options
from .config import Tile, padded, tile
from .gradients import (
    Partials,
    kernel_sums,
    position_sums,
    power_of_two,
    store_sums,
    sum_slots,
    token_gradient,
)
from .launch import device_of, launch
from .logits import head_parameters, key_mass, load_references, load_references_t, load_rows, token_logits
from .plan import potentials_narrow, range_known, row_update, tile_narrow
from .prepare import Prepared, stride_step, strides, unit_rows
from .primitives import INF, LN2, LOG2E, dot, finite_or_zero
from .transport import Split

COLUMNS = tl.constexpr(3)  # vectors [MP] a head keeps per iteration: g^{t−1} − top, c^t (∞ where padded), e^{K−g−c}
FACTORS = tl.constexpr(3)  # and scalars: K, top, and whether Q may be formed from p
FACTOR_SPREAD = tl.constexpr(200.0)  # of g + c, so that e^{K−g−c} keeps 27 bits from either end of float32


class State(NamedTuple):
    """What the passes over the keys share; everything exponential in base 2."""

    d_z: Tensor  # [BH, MP, EP] in the dtype of the values
    offset: Tensor  # [BH, MP] ⟨dz_j, z_j⟩ − dc^T_j
    use_values: Tensor  # [BH] 1, or 0 where one key takes part: its weight is 1, whatever its value
    d_g: Tensor  # [BH, max(T, 1), MP] dg^t
    columns: Tensor  # [BH, max(T, 1), COLUMNS, MP]
    factors: Tensor  # [BH, max(T, 1), FACTORS]


@triton.jit
def _few_keys(log_a, stride, S):
    """Whether at most one key takes part; reads on only until the second."""
    if log_a is None:
        return S < 2
    else:
        seen = 0
        start = 0
        while (start < S) & (seen < 2):
            rows = start + tl.arange(0, 1024)
            mass = tl.load(log_a + rows.to(tl.int64) * stride, mask=rows < S, other=-INF)
            seen += tl.sum((mass > -INF).to(tl.int32), 0)
            start += 1024
        return seen < 2


@triton.jit
def _store_columns(
    log_b, c, columns, factors, at, h, t, lam_b, beta, scale,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """The columns and factors of iteration t of one head, `at` counting iterations of all heads."""
    j = tl.arange(0, MP)
    c_t = tl.load(c + at * M + j, mask=j < M, other=INF) * LOG2E
    g = tl.load(log_b + h * MP + j)
    if UPDATE_ROWS:
        before = tl.load(c + (at - 1) * M + j, mask=j < tl.where(t > 1, M, 0), other=0.0)
        g -= lam_b * finite_or_zero(before) * LOG2E
    reached = (j < M) & (c_t > -INF) & (g > -INF)
    total = tl.where(reached, g, 0.0) + tl.where(reached, c_t, 0.0)
    high = tl.max(tl.where(reached, total, -INF))
    low = tl.min(tl.where(reached, total, INF))
    middle = tl.where(high > -INF, 0.5 * (high + low), 0.0)
    close = high - low <= FACTOR_SPREAD
    if RANGE == "device":
        close = close & potentials_narrow(g, beta, scale, M)
    top = tl.max(g, 0) if RANGE == "always" else middle * 0.0
    out = columns + at * (COLUMNS * MP) + j
    tl.store(out, g - top)
    tl.store(out + MP, finite_or_zero(c_t))
    tl.store(out + 2 * MP, tl.where(reached, tl.exp2(middle - total), 0.0))
    tl.store(factors + at * FACTORS, middle)
    tl.store(factors + at * FACTORS + 1, top)
    tl.store(factors + at * FACTORS + 2, close.to(tl.float32))


@triton.jit(do_not_specialize=["stride_ab", "stride_ah", "stride_an", "H", "S", "splits", "slots", "iterations"])
def state_kernel(
    part_z, part_g, d_z, d_c, z, c, log_b, log_a, parameters, d_z_out, offset, use_values, d_g, columns, factors,
    stride_ab, stride_ah, stride_an, H, S, splits, slots, iterations,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One iteration's columns, or ROWS rows of dz and dg^T with their offsets, of one head."""
    blocks: tl.constexpr = MP // ROWS
    tasks = blocks + iterations
    bh = (tl.program_id(0) // tasks).to(tl.int64)
    task = tl.program_id(0) % tasks
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    if task >= blocks:
        t = task - blocks + 1
        at = bh * iterations + t - 1
        _store_columns(log_b, c, columns, factors, at, h, t, lam_b, beta, scale, RANGE, UPDATE_ROWS, M, MP)
    else:
        rows = task * ROWS + tl.arange(0, ROWS)
        flat = task * ROWS * EP + tl.arange(0, ROWS * EP)
        row, e = flat // EP, flat % EP
        inside = (row < M) & (e < E)
        if part_z is None:
            total = tl.load(d_z + (bh * M + row) * E + e, mask=inside, other=0.0)
            g_rows = tl.zeros([ROWS], tl.float32)
        else:
            total = sum_slots(part_z, bh, 0, 1, splits, splits, MP * EP, flat, inside)
            g_rows = sum_slots(part_g, bh, 0, 1, slots, splits, MP, rows, rows < M)
        rounded = total.to(d_z_out.dtype.element_ty)
        tl.store(d_z_out + bh * (MP * EP) + flat, rounded)
        pooled = tl.load(z + (bh * M + row) * E + e, mask=inside, other=0.0)
        # With dz as the products with v see it: what is subtracted there is the mean of those products.
        mean = tl.sum(tl.reshape(pooled * rounded.to(tl.float32), [ROWS, EP]), 1)
        if log_a is not None:
            log_a += b * stride_ab + h * stride_ah
        use = tl.where(_few_keys(log_a, stride_an, S), 0.0, 1.0)
        d_c_rows = -lam_b * g_rows if UPDATE_ROWS else g_rows * 0.0
        at = bh * iterations + iterations - 1
        if d_c is not None:
            d_c_rows += tl.load(d_c + at * M + rows, mask=rows < M, other=0.0)
        tl.store(offset + bh * MP + rows, mean * use - d_c_rows)
        tl.store(d_g + at * MP + rows, g_rows)
        tl.store(use_values + bh, use)


@triton.jit
def load_columns(columns, factors, at, MP: tl.constexpr):
    """(g − top, c, e^{K−g−c} [MP], K, top, whether Q may be formed from p) of one iteration."""
    column = columns + at * (COLUMNS * MP) + tl.arange(0, MP)
    factor = factors + at * FACTORS
    usable = tl.load(factor + 2) > 0
    return tl.load(column), tl.load(column + MP), tl.load(column + 2 * MP), tl.load(factor), tl.load(factor + 1), usable


@triton.jit
def load_gradient(d_g, d_c, at, lam_b, M: tl.constexpr, MP: tl.constexpr):
    """(dg^t, dc^t) [MP] of an iteration that is not the last."""
    j = tl.arange(0, MP)
    g = tl.load(d_g + at * MP + j)
    return g, column_gradient(g, d_c, at, lam_b, M)


@triton.jit
def column_gradient(d_g, d_c, at, lam_b, M: tl.constexpr):
    """dc^t [MP] = −λ_b dg^t, and what an output's gradient adds."""
    d = -lam_b * d_g
    if d_c is not None:
        j = tl.arange(0, d_g.shape[0])
        d += tl.load(d_c + at * M + j, mask=j < M, other=0.0)
    return d


@triton.jit
def plan_terms(
    l, live, mass, lam_a, g, c, column, middle, top, usable,
    RANGE: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, BY_TILE: tl.constexpr,
):  # fmt: skip
    """(p [BS, MP], r, LSE_j(ℓ + g) in base 2 [BS], Q [BS, MP]) of one iteration; without a row update Q alone."""
    p = l
    r = mass
    lse = mass
    q = l
    if UPDATE_ROWS:
        if RANGE == "always":
            p = tl.exp2(l + g[None, :])
            r = tl.sum(p, 1)
            lse = top + tl.log2(r)
            q = p * tl.exp2(mass - lam_a * lse + (top - middle))[:, None] * column[None, :]
        else:
            p, m, r, f = row_update(l, g, mass, lam_a)
            lse = m + tl.log2(r)
            narrow = usable & tile_narrow(l, g, live, M) if BY_TILE else usable
            if narrow:
                q = p * tl.exp2(f + m - middle)[:, None] * column[None, :]
            else:
                q = tl.exp2((l + f[:, None]) - c[None, :])
    else:
        q = tl.exp2((l + mass[:, None]) - c[None, :])
    return p, r, lse, q


@triton.jit
def value_products(
    value, rows, live, stride, d_z, first_t,
    MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨v_s, dz_j⟩ [BS, MP]; first_t: the first VDEPTH columns of dz, transposed."""
    product = dot(load_rows(value, rows, live, stride, tl.arange(0, VDEPTH), E), first_t, PRECISION)
    for start in tl.static_range(VDEPTH, EP, VDEPTH):
        v = load_rows(value, rows, live, stride, start + tl.arange(0, VDEPTH), E)
        product += dot(v, load_references_t(d_z, start, MP, EP, VDEPTH), PRECISION)
    return product


TOKENS = (
    "stride_kb stride_kh stride_kn stride_vb stride_vh stride_vn stride_ab stride_ah stride_an stride_pb stride_ph "
    "stride_pn H S stretch splits"
).split()


@triton.jit(do_not_specialize=[*TOKENS, "iteration", "iterations"])
def column_kernel(
    key, value, log_a, position, y, pi, parameters, d_z, offset, use_values, d_g, columns, factors, d_c, part_in, part_out,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, uniform, iteration, iterations,
    LAST: tl.constexpr, RANGE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, BS: tl.constexpr,
    DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dg^{t−1} of iteration t ≥ 2 (LAST: t = T) over `stretch` keys of one head."""
    split = tl.program_id(0) % splits
    bh = (tl.program_id(0) // splits).to(tl.int64)
    b, h = bh // H, bh % H
    j = tl.arange(0, MP)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    key += b * (stride_kb * STEP) + h * (stride_kh * STEP)
    value += b * (stride_vb * STEP) + h * (stride_vh * STEP)
    if log_a is not None:
        log_a += b * stride_ab + h * stride_ah
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    d_z += bh * MP * EP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    at = bh * iterations + iteration - 1
    g, c, column, middle, top, usable = load_columns(columns, factors, at, MP)
    if LAST:
        d_z_t = load_references_t(d_z, 0, MP, EP, VDEPTH)
        off, use = tl.load(offset + bh * MP + j), tl.load(use_values + bh)
    else:
        merged = sum_slots(part_in, bh, 0, 1, splits, splits, MP, j, j < MP)
        if split == 0:
            tl.store(d_g + at * MP + j, merged)
        d_column = column_gradient(merged, d_c, at, lam_b, M)
    total = tl.zeros([MP], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in range(split * stretch, end, BS):
        rows = start + tl.arange(0, BS)
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, kappa, cosine, inverse, x = token_logits(
            key, rows, live, stride_kn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION,
        )  # fmt: skip
        p, r, lse, q = plan_terms(
            l, live, mass, lam_a, g, c, column, middle, top, usable, RANGE, True, M, DOT or P > 0
        )
        if LAST:
            v_dz = value_products(value, rows, live, stride_vn * STEP, d_z, d_z_t, MP, E, EP, VDEPTH, PRECISION)
            d_f = tl.sum(q * (v_dz * use - off[None, :]), 1)
        else:
            d_f = tl.sum(q * d_column[None, :], 1)
        total -= tl.sum(p * (lam_a * d_f / r)[:, None], 0)
    tl.store(part_out + (bh * splits + split) * MP + j, total)


@triton.jit(do_not_specialize=[*TOKENS, "slots", "first_slot", "iterations", *[f"stride_d{t}{n}" for t in "kva" for n in "bhn"]])
def key_kernel(
    key, value, log_a, position, y, pi, parameters, d_z, offset, use_values, d_g, columns, factors, d_c, part_in, c,
    d_key, d_value, d_log_a, part_log_b, part_y, part_sums, part_position,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, uniform,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_dab, stride_dah, stride_dan,
    slots, first_slot, iterations,
    UPDATE_ROWS: tl.constexpr, REPEAT: tl.constexpr, RANGE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    DOT: tl.constexpr, STEP: tl.constexpr, BS: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All of dℓ over `stretch` keys of one head; DEPTH columns of dk and dŷ, and every d_blocks-th VDEPTH of dv."""
    d_blocks: tl.constexpr = DP // DEPTH
    BY_TILE: tl.constexpr = DOT or P > 0
    block = tl.program_id(0) % d_blocks
    split = tl.program_id(0) // d_blocks % splits
    bh = (tl.program_id(0) // (d_blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    j, d = tl.arange(0, MP), block * DEPTH + tl.arange(0, DEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    epsilon = tl.load(parameters + h * 8 + 6)
    factor = 1.0 / epsilon if DOT else tl.load(parameters + h * 8 + 5) / epsilon
    key += b * (stride_kb * STEP) + h * (stride_kh * STEP)
    value += b * (stride_vb * STEP) + h * (stride_vh * STEP)
    if log_a is not None:
        log_a += b * stride_ab + h * stride_ah
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    d_z += bh * MP * EP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    y_own = load_references(y, block * DEPTH, MP, DP, DEPTH)
    d_z_t = load_references_t(d_z, 0, MP, EP, VDEPTH)
    last = bh * iterations + iterations - 1
    g, c_t, column, middle, top, usable = load_columns(columns, factors, last, MP)
    off, use = tl.load(offset + bh * MP + j), tl.load(use_values + bh)
    if REPEAT:
        newest = sum_slots(part_in, bh, 0, 1, splits, splits, MP, j, j < MP)  # dg^1
    d_g_0 = tl.zeros([MP], tl.float32)
    d_y = tl.zeros([MP, DEPTH], tl.float32)
    d_pi = tl.zeros([MP, PP], tl.float32)
    d_beta, d_epsilon, d_tau = (tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32))
    d_relaxation = tl.zeros([BS], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in range(split * stretch, end, BS):
        rows = start + tl.arange(0, BS)
        inside = rows < end
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, kappa, cosine, inverse, x = token_logits(
            key, rows, live, stride_kn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION,
        )  # fmt: skip
        p, r, lse, q = plan_terms(
            l, live, mass, lam_a, g, c_t, column, middle, top, usable, RANGE, UPDATE_ROWS, M, BY_TILE
        )
        v_dz = value_products(value, rows, live, stride_vn * STEP, d_z, d_z_t, MP, E, EP, VDEPTH, PRECISION)
        if d_value is not None:
            at = d_value + b * (stride_dvb * STEP) + h * (stride_dvh * STEP) + rows.to(tl.int64)[:, None] * (stride_dvn * STEP)
            weights = q.to(d_z.dtype.element_ty)
            for chunk in tl.static_range(EP // VDEPTH):
                if chunk % d_blocks == block:
                    e = chunk * VDEPTH + tl.arange(0, VDEPTH)
                    d_v = dot(weights, load_references(d_z, chunk * VDEPTH, MP, EP, VDEPTH), PRECISION)
                    tl.store(at + e[None, :], d_v.to(weights.dtype), mask=inside[:, None] & (e < E)[None, :])
        d_l = q * (v_dz * use - off[None, :])
        d_f = tl.sum(d_l, 1)
        sent = d_f
        if UPDATE_ROWS:
            d_relaxation += d_f * lse
            row_part = p * (lam_a * d_f / r)[:, None]
            d_l -= row_part
            if iterations == 1:
                d_g_0 -= tl.sum(row_part, 0)
        if REPEAT:
            for step in range(1, iterations):
                t = iterations - step
                now = bh * iterations + t - 1
                g_now, c_now, column_now, middle_now, top_now, usable_now = load_columns(columns, factors, now, MP)
                p_now, r_now, lse_now, term = plan_terms(
                    l, live, mass, lam_a, g_now, c_now, column_now, middle_now, top_now, usable_now, RANGE, True, M, BY_TILE
                )
                d_g_now = tl.where(t == 1, newest, tl.load(d_g + now * MP + j))
                term *= column_gradient(d_g_now, d_c, now, lam_b, M)[None, :]
                d_f_now = tl.sum(term, 1)
                sent += d_f_now
                d_relaxation += d_f_now * lse_now
                row_term = p_now * (lam_a * d_f_now / r_now)[:, None]
                d_l += term - row_term
                if t == 1:
                    d_g_0 -= tl.sum(row_term, 0)
        if UPDATE_ROWS and M == 1:  # R = 1, and every Q term is its own row sum: exactly 0 where λ_a = 1
            d_l = tl.where((j < M)[None, :], ((1.0 - lam_a) * sent)[:, None], 0.0)
        if d_log_a is not None:
            at = d_log_a + b * stride_dab + h * stride_dah + rows.to(tl.int64) * stride_dan
            if block == 0:
                tl.store(at, sent, mask=inside)
        if d_blocks > 1:
            x = load_rows(key, rows, live, stride_kn * STEP, d, D)
        operand, x_hat, d_x = token_gradient(d_l, kappa, cosine, inverse, x, y_own, factor, DOT, PRECISION)
        if d_key is not None:
            at = d_key + b * (stride_dkb * STEP) + h * (stride_dkh * STEP) + rows.to(tl.int64)[:, None] * (stride_dkn * STEP)
            tl.store(at + d[None, :], d_x.to(x.dtype), mask=inside[:, None] & (d < D)[None, :])
        if part_y is not None:
            d_y += dot(tl.trans(operand), x_hat, PRECISION)
            beta_rows, epsilon_rows = kernel_sums(d_l, kappa, cosine, DOT)
            d_beta += beta_rows
            d_epsilon += epsilon_rows
            if P > 0:
                tau_rows, pi_sums = position_sums(d_l, position, rows, live, stride_pn, pi, M, P, PP)
                d_tau += tau_rows
                d_pi += pi_sums
    slot = bh * slots + first_slot + split
    d_lambda_b = 0.0
    if block == 0:
        if split == 0:
            if UPDATE_ROWS:  # dg^t of every other t, and ⟨dg^t, c^t⟩, once per head
                for t in range(1, iterations + 1):
                    now = bh * iterations + t - 1
                    d_g_now = tl.load(d_g + now * MP + j)
                    if REPEAT:
                        d_g_now = tl.where(t == 1, newest, d_g_now)
                    c_now = finite_or_zero(tl.load(c + now * M + j, mask=j < M, other=0.0))
                    d_lambda_b += tl.sum(d_g_now * c_now)
                    d_g_0 += tl.where(t < iterations, d_g_now, 0.0)
        tl.store(part_log_b + slot * MP + j, d_g_0)
    if part_y is not None:
        tl.store(part_y + (slot * MP + j)[:, None] * DP + d[None, :], d_y)
        if block == 0:
            store_sums(
                part_sums, slot, tl.sum(d_beta), tl.sum(d_epsilon), tl.sum(d_relaxation) * LN2, d_lambda_b, tl.sum(d_tau)
            )
            if P > 0:
                tl.store(part_position + (slot * MP + j)[:, None] * PP + tl.arange(0, PP)[None, :], d_pi)


STATE = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 splits, 256] tile is 32 numbers a thread


class Cotangents(NamedTuple):
    """What arrives at the transport: from the queries part_z and the slots of dg^T, or (pooling) dz and dc."""

    part_z: Tensor | None  # [BH, splits, MP, EP]
    splits: int
    d_z: Tensor | None  # [B, H, M, E] float32
    d_c: Tensor | None  # [B, H, max(T, 1), M]


class KeyGradients(NamedTuple):
    """Where the rows' gradients go, None where not needed."""

    key: Tensor | None
    value: Tensor | None
    log_a: Tensor | None


def merged_state(
    x: Operands, opt: Options, prepared: Prepared, state: tuple[Tensor, Tensor], given: Cotangents, parts: Partials
) -> State:
    """dz in the values' dtype, its offsets, dg^T and the columns of every iteration."""
    z, c = state
    (b, h, iterations, m), e, (_, mp, _) = c.shape, z.shape[-1], prepared.y.shape
    ep, new = padded(e), x.references.new_empty
    out = State(
        new((b * h, mp, ep), dtype=x.value.dtype),
        new((b * h, mp)),
        new((b * h,)),
        new((b * h, iterations, mp)),
        new((b * h, iterations, COLUMNS.value, mp)),
        new((b * h, iterations, FACTORS.value)),
    )
    d_z, d_c = (None if t is None else t.contiguous() for t in given[2:])
    rows = max(1, STATE.depth // ep)
    tensors = (given.part_z, parts.log_b, d_z, d_c, z, c, prepared.log_b, x.log_a, prepared.parameters, *out)
    counts = (*strides(x.log_a), h, x.key.shape[2], given.splits, parts.log_b.shape[1], iterations)
    constants = {
        "RANGE": range_known(x, opt), "UPDATE_ROWS": opt.num_iters > 0, "M": m, "MP": mp, "E": e, "EP": ep, "ROWS": rows,
    }  # fmt: skip
    launch(state_kernel, b * h * (mp // rows + iterations), (*tensors, *counts), constants, STATE)
    return out


def transport_backward(
    x: Operands, opt: Options, prepared: Prepared, state: tuple[Tensor, Tensor], given: Cotangents,
    split: Split, out: KeyGradients, parts: Partials,
) -> None:  # fmt: skip
    """All passes over the keys: `out`, and the slots of `parts` after those of the queries."""
    merged = merged_state(x, opt, prepared, state, given, parts)
    key, value = unit_rows(x.key), unit_rows(x.value)
    position = None if x.key_position is None else unit_rows(x.key_position)
    (b, h, s, d), (m, e) = key.shape, state[0].shape[-2:]
    _, mp, dp = prepared.y.shape
    ep, iterations = padded(e), state[1].shape[2]
    device = device_of(key)
    cut = tile("gradient", device.family, max(mp, dp, ep), key.element_size())
    step = stride_step(key, value, out.key, out.value)
    uniform = -math.log2(s) if s else 0.0
    spans = (*strides(key, step), *strides(value, step), *strides(x.log_a), *strides(position), h, s, *split, uniform)
    d_c = None if given.d_c is None else given.d_c.contiguous()
    tokens = (key, value, x.log_a, position, prepared.y, prepared.position, prepared.parameters, *merged, d_c)
    p = 0 if position is None else position.shape[-1]
    constants = {
        "RANGE": range_known(x, opt), "M": m, "MP": mp, "D": d, "DP": dp, "E": e, "EP": ep, "P": p,
        "DOT": opt.kernel == "dot", "STEP": step, "BS": cut.rows, "DEPTH": min(cut.depth, dp),
        "VDEPTH": min(cut.depth, ep), "PRECISION": device.precision,
    }  # fmt: skip
    sums = [x.references.new_empty((b * h, split.count, mp)) for _ in range(min(2, iterations - 1))]
    for t in range(iterations, 1, -1):
        args = (*tokens, sums[0], sums[-1], *spans, t, iterations)
        launch(column_kernel, b * h * split.count, args, constants | {"LAST": t == iterations}, cut)
        sums.reverse()
    outputs = (sums[0] if sums else None, state[1], *out, *parts)
    spans = (*spans, *strides(out.key, step), *strides(out.value, step), *strides(out.log_a))
    counts = (parts.log_b.shape[1], given.splits, iterations)
    constants |= {"UPDATE_ROWS": opt.num_iters > 0, "REPEAT": iterations > 1, "PP": power_of_two(p)}
    programs = b * h * split.count * (dp // constants["DEPTH"])
    launch(key_kernel, programs, (*tokens, *outputs, *spans, *counts), constants, cut)
