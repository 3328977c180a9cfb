"""Backward of the transport, exact for the T iterations that ran: from dz and dg^T to dk, dv and the parameters' parts.

    W^k = Q^T,  dc^t = −λ_b dg^t
    t = T:  C_sj = W^k_sj (⟨v_s, dz_j⟩ − ⟨dz_j, z_j⟩ + dc^T_j)      t < T:  C_sj = Q^t_sj dc^t_j
    df^t_s = Σ_j C_sj,   dℓ += C − λ_a R^t df^t,   dg^{t−1}_j = −λ_a Σ_s R^t_sj df^t_s,   dv_s = Σ_j W^k_sj dz_j

`transport_columns_backward_kernel` is one pass over the keys per t = T..2, for dg^{t−1} alone;
`transport_keys_backward_kernel` then sums all terms of dℓ in a last one, with dg^0, and takes them to dk and the
parameters as `device.gradients` says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.gradients import (
    across,
    gradient_tile,
    kernel_sums,
    position_sums,
    store_sums,
    sum_slots,
    token_gradient,
    tokens_by,
)
from ..device.head import gradient_factor, head_parameters
from ..device.logits import key_mass, load_references, load_references_t, load_rows, token_logits
from ..device.plan import range_known
from ..device.primitives import LN2, dot, finite_or_zero, rounded
from ..host.launch import Split, device_of, kernel, launch
from ..host.rows import stride_step, strides, unit_rows
from ..host.tiles import padded, power_of_two
from ..parameters.gradients import Partials
from ..parameters.prepare import Prepared
from .plan_backward import Cotangents, column_gradient, load_columns, merged_state, plan_terms, pooling_weights


@triton.jit
def key_value_products(
    value, rows, live, stride, d_z, first_t,
    MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """⟨v_s, dz_j⟩ [BS, MP]; first_t: the first VDEPTH columns of dz, transposed."""
    v = load_rows(value, rows, live, stride, tl.arange(0, VDEPTH), E)
    product = tokens_by(v, first_t, PRECISION, ACROSS)
    if EP > VDEPTH:
        for start in range(VDEPTH, EP, VDEPTH):
            v = load_rows(value, rows, live, stride, start + tl.arange(0, VDEPTH), E)
            product += tokens_by(v, load_references_t(d_z, start, MP, EP, VDEPTH), PRECISION, ACROSS)
    return product


@triton.jit
def store_values(
    out, weights, d_z, start, inside,
    MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Columns start.. of dv_s = Σ_j W^k_sj dz_j."""
    e = start + tl.arange(0, VDEPTH)
    d_z_chunk = load_references(d_z, start, MP, EP, VDEPTH)
    d_v = tokens_by(rounded(weights, d_z_chunk.dtype), d_z_chunk, PRECISION, ACROSS)
    tl.store(out + e[None, :], rounded(d_v, d_z_chunk.dtype), mask=inside[:, None] & (e < E)[None, :])


@kernel
def transport_columns_backward_kernel(
    key, value, log_a, position, y, pi, parameters,
    d_z, offset, use_values, d_g, columns, factors, d_c, part_in, part_out,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, uniform, iteration, iterations,
    LAST: tl.constexpr, RANGE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, BS: tl.constexpr,
    DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
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
    g, c, second, top, narrow = load_columns(columns, factors, at, MP)
    if LAST:
        d_z_t = load_references_t(d_z, 0, MP, EP, VDEPTH)
        off, use = tl.load(offset + bh * MP + j), tl.load(use_values + bh)
    else:
        merged = sum_slots(part_in, bh, 0, 1, splits, splits, MP, j, j < MP)
        if split == 0:
            tl.store(d_g + at * MP + j, merged)
        second *= column_gradient(merged, d_c, at, lam_b, M)
    total = tl.zeros([MP], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in range(split * stretch, end, BS):
        rows = start + tl.arange(0, BS)
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, kappa, cosine, inverse, x = token_logits(
            key, rows, live, stride_kn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
        )  # fmt: skip
        p, r, lse, first = plan_terms(kappa, scale, l, mass, lam_a, g, c, top, narrow, RANGE, True, P)
        if LAST:
            weights = pooling_weights(first, second, live, use)
            v_dz = key_value_products(
                value, rows, live, stride_vn * STEP, d_z, d_z_t, MP, E, EP, VDEPTH, PRECISION, ACROSS
            )
            d_f = tl.sum(weights * (v_dz * use - off[None, :]), 1)
        else:
            d_f = tl.sum(first * second[None, :], 1)
        total -= tl.sum(p * (lam_a * d_f / r)[:, None], 0)
    tl.store(part_out + (bh * splits + split) * MP + j, total)


@triton.jit
def earlier_terms(
    d_l, sent, relaxed, d_g_0, center, kappa, scale, l, mass, lam_a, lam_b, newest, d_g, d_c, columns, factors, bh,
    iterations, RANGE: tl.constexpr, M: tl.constexpr, P: tl.constexpr, LOG_B: tl.constexpr,
):  # fmt: skip
    """Adds the terms of t = T−1..1 to dℓ [BS, MP], Σ df^t, Σ df^t (LSE_j(ℓ + g^{t−1}) − center) [BS] and dg^0 [MP]."""
    MP: tl.constexpr = newest.shape[0]
    j = tl.arange(0, MP)
    for step in range(1, iterations):
        t = iterations - step
        at = bh * iterations + t - 1
        g, c, second, top, narrow = load_columns(columns, factors, at, MP)
        p, r, lse, first = plan_terms(kappa, scale, l, mass, lam_a, g, c, top, narrow, RANGE, True, P)
        d_g_t = tl.where(t == 1, newest, tl.load(d_g + at * MP + j))
        term = first * (second * column_gradient(d_g_t, d_c, at, lam_b, M))[None, :]
        d_f = tl.sum(term, 1)
        sent += d_f
        relaxed += d_f * (lse - center)
        row_term = p * (lam_a * d_f / r)[:, None]
        d_l += term - row_term
        if LOG_B:  # noqa: SIM102  (known when compiled; the inner one is not)
            if t == 1:
                d_g_0 -= tl.sum(row_term, 0)
    return d_l, sent, relaxed, d_g_0


@triton.jit
def _totals(d_g, newest, c, bh, iterations, REPEAT: tl.constexpr, M: tl.constexpr):
    """(Σ_{0<t<T} dg^t [MP], Σ_{t>0} ⟨dg^t, c^t⟩)."""
    MP: tl.constexpr = newest.shape[0]
    j = tl.arange(0, MP)
    total = tl.zeros([MP], tl.float32)
    products = tl.zeros([MP], tl.float32)
    for t in range(1, iterations + 1):
        at = bh * iterations + t - 1
        d_g_t = tl.load(d_g + at * MP + j)
        if REPEAT:
            d_g_t = tl.where(t == 1, newest, d_g_t)
        products += d_g_t * finite_or_zero(tl.load(c + at * M + j, mask=j < M, other=0.0))
        total += tl.where(t < iterations, d_g_t, 0.0)
    return total, tl.sum(products)


@kernel
def transport_keys_backward_kernel(
    key, value, log_a, position, y, pi, parameters, d_z, offset, use_values, d_g, columns, factors, d_c, part_in, c,
    d_key, d_value, d_log_a, part_log_b, part_y, part_sums, part_position,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ab, stride_ah, stride_an,
    stride_pb, stride_ph, stride_pn, H, S, stretch, splits, uniform,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_dab, stride_dah, stride_dan,
    slots, first_slot, iterations,
    UPDATE_ROWS: tl.constexpr, REPEAT: tl.constexpr, LOG_B: tl.constexpr, PLACES: tl.constexpr, RANGE: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, BS: tl.constexpr, DEPTH: tl.constexpr,
    VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """All of dℓ over `stretch` keys of one head; DEPTH columns of dk and dŷ, and every d_blocks-th VDEPTH of dv."""
    d_blocks: tl.constexpr = DP // DEPTH
    block = tl.program_id(0) % d_blocks
    split = tl.program_id(0) // d_blocks % splits
    bh = (tl.program_id(0) // (d_blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    j, d = tl.arange(0, MP), block * DEPTH + tl.arange(0, DEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    factor = gradient_factor(parameters, h, DOT)
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
    use = tl.load(use_values + bh)
    newest = tl.zeros([MP], tl.float32)
    if REPEAT:
        newest = sum_slots(part_in, bh, 0, 1, splits, splits, MP, j, j < MP)  # dg^1
    d_g_0 = tl.zeros([MP], tl.float32)
    d_y = tl.zeros([MP, DEPTH], tl.float32)
    d_pi = tl.zeros([MP, PP], tl.float32)
    d_beta, d_epsilon, d_tau = (tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32), tl.zeros([BS], tl.float32))
    relaxed = tl.zeros([BS], tl.float32)
    # Σ_s df^t_s = 0, as rows of dS sum to 0 (unless c has a gradient): only the spread of LSE_j(ℓ + g) counts.
    center = 0.0 * scale
    if d_c is None:
        center = -scale if DOT else scale * (tl.exp2(-beta) - 1.0)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in range(split * stretch, end, BS):
        rows = start + tl.arange(0, BS)
        inside = rows < end
        live, mass = key_mass(log_a, rows, end, stride_an, uniform)
        l, kappa, cosine, inverse, x = token_logits(
            key, rows, live, stride_kn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
        )  # fmt: skip
        # Columns are read in the loop: a thread cannot hold its share of them beside the tiles.
        g, c_last, second, top, narrow = load_columns(columns, factors, bh * iterations + iterations - 1, MP)
        p, r, lse, first = plan_terms(kappa, scale, l, mass, lam_a, g, c_last, top, narrow, RANGE, UPDATE_ROWS, P)
        weights = pooling_weights(first, second, live, use)
        if d_value is not None:
            out = d_value + b * (stride_dvb * STEP) + h * (stride_dvh * STEP)
            out += rows.to(tl.int64)[:, None] * (stride_dvn * STEP)
            if EP == VDEPTH:
                if block == 0:
                    store_values(out, weights, d_z, 0, inside, MP, E, EP, VDEPTH, PRECISION, ACROSS)
            else:
                for chunk in range(block, EP // VDEPTH, d_blocks):
                    store_values(out, weights, d_z, chunk * VDEPTH, inside, MP, E, EP, VDEPTH, PRECISION, ACROSS)
        v_dz = key_value_products(value, rows, live, stride_vn * STEP, d_z, d_z_t, MP, E, EP, VDEPTH, PRECISION, ACROSS)
        d_l = weights * (v_dz * use - tl.load(offset + bh * MP + j)[None, :])
        sent = tl.sum(d_l, 1)
        if UPDATE_ROWS:
            relaxed += sent * (lse - center)
            row_term = p * (lam_a * sent / r)[:, None]
            d_l -= row_term
            if LOG_B and not REPEAT:
                d_g_0 -= tl.sum(row_term, 0)
        if REPEAT:
            d_l, sent, relaxed, d_g_0 = earlier_terms(
                d_l, sent, relaxed, d_g_0, center, kappa, scale, l, mass, lam_a, lam_b, newest, d_g, d_c,
                columns,
                factors, bh, iterations,
                RANGE, M, P, LOG_B,
            )  # fmt: skip
        if UPDATE_ROWS and M == 1:  # R = 1, and every Q term is its own row sum: exactly 0 where λ_a = 1
            d_l = tl.where((j < M)[None, :], ((1.0 - lam_a) * sent)[:, None], 0.0)
        if d_log_a is not None:  # noqa: SIM102
            if block == 0:
                out_a = d_log_a + b * stride_dab + h * stride_dah + rows.to(tl.int64) * stride_dan
                tl.store(out_a, sent, mask=inside)
        if d_blocks > 1:
            x = load_rows(key, rows, live, stride_kn * STEP, d, D)
        operand, x_hat, d_x = token_gradient(
            d_l, kappa, cosine, inverse, x, y_own, factor, d_blocks == 1, DOT, PRECISION, ACROSS
        )
        if d_key is not None:
            out_k = d_key + b * (stride_dkb * STEP) + h * (stride_dkh * STEP)
            out_k += rows.to(tl.int64)[:, None] * (stride_dkn * STEP) + d[None, :]
            tl.store(out_k, rounded(d_x, x.dtype), mask=inside[:, None] & (d < D)[None, :])
        if part_y is not None:
            d_y += dot(tl.trans(operand), x_hat, PRECISION)
        if part_sums is not None:
            beta_rows, epsilon_rows = kernel_sums(d_l, kappa, cosine, DOT)
            d_beta += beta_rows
            d_epsilon += epsilon_rows
        if PLACES:
            tau_rows, pi_sums = position_sums(d_l, position, rows, live, stride_pn, pi, M, P, PP)
            d_tau += tau_rows
            d_pi += pi_sums
    slot = bh * slots + first_slot + split
    if part_y is not None:
        tl.store(part_y + (slot * MP + j)[:, None] * DP + d[None, :], d_y)
    if block == 0:
        if part_position is not None:
            tl.store(part_position + (slot * MP + j)[:, None] * PP + tl.arange(0, PP)[None, :], d_pi)
        d_lambda_b = 0.0
        if UPDATE_ROWS:  # noqa: SIM102
            if split == 0:  # what a head counts once
                others, d_lambda_b = _totals(d_g, newest, c, bh, iterations, REPEAT, M)
                d_g_0 += others
        if LOG_B:
            tl.store(part_log_b + slot * MP + j, d_g_0)
        if part_sums is not None:
            store_sums(
                part_sums, slot, tl.sum(d_beta), tl.sum(d_epsilon), tl.sum(relaxed) * LN2, d_lambda_b, tl.sum(d_tau)
            )


class KeyGradients(NamedTuple):
    """Where the rows' gradients go, None where not needed."""

    key: Tensor | None
    value: Tensor | None
    log_a: Tensor | None


def transport_backward(
    x: Operands, opt: Options, prepared: Prepared, state: tuple[Tensor, Tensor], given: Cotangents,
    split: Split, out: KeyGradients, parts: Partials, log_b: bool,
) -> None:  # fmt: skip
    """All passes over the keys: `out`, and the slots of `parts` after those of the queries (log_b: that one too)."""
    merged = merged_state(x, opt, prepared, state, given, parts)
    key, value = unit_rows(x.key), unit_rows(x.value)
    position = None if x.key_position is None else unit_rows(x.key_position)
    (b, h, s, d), (m, e) = key.shape, state[0].shape[-2:]
    _, mp, dp = prepared.y.shape
    ep, iterations = padded(e), state[1].shape[2]
    device = device_of(key)
    cut = gradient_tile(x, opt)
    step = stride_step(key, value, out.key, out.value)
    uniform = -math.log2(s) if s else 0.0
    spans = (*strides(key, step), *strides(value, step), *strides(x.log_a), *strides(position), h, s, *split, uniform)
    tokens = (key, value, x.log_a, position, prepared.y, prepared.position, prepared.parameters, *merged, given.d_c)
    p = 0 if position is None else position.shape[-1]
    depth = min(cut.depth, dp)
    constants = {
        "RANGE": range_known(x, opt), "M": m, "MP": mp, "D": d, "DP": dp, "E": e, "EP": ep, "P": p,
        "DOT": opt.kernel == "dot", "STEP": step, "BS": cut.rows, "DEPTH": depth,
        "VDEPTH": min(cut.depth, ep), "PRECISION": device.precision, "ACROSS": across(device, key),
    }  # fmt: skip
    sums = [x.references.new_empty((b * h, split.programs, mp)) for _ in range(min(2, iterations - 1))]
    for t in range(iterations, 1, -1):
        args = (*tokens, sums[0], sums[-1], *spans, t, iterations)
        launch(
            transport_columns_backward_kernel, b * h * split.programs, args, constants | {"LAST": t == iterations}, cut
        )
        sums.reverse()
    outputs = (sums[0] if sums else None, state[1], *out, *parts)
    spans = (*spans, *strides(out.key, step), *strides(out.value, step), *strides(out.log_a))
    counts = (parts.log_b.shape[1], given.splits, iterations)
    constants |= {
        "UPDATE_ROWS": opt.num_iters > 0, "REPEAT": iterations > 1, "LOG_B": log_b, "PP": power_of_two(p),
        "PLACES": p > 0 and any(t is not None for t in parts[2:]),
    }  # fmt: skip
    launch(
        transport_keys_backward_kernel,
        b * h * split.programs * (dp // depth),
        (*tokens, *outputs, *spans, *counts),
        constants,
        cut,
    )
