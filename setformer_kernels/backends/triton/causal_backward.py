"""Backward of the causal scan, T ≤ 1: queries in their chunk, sums of what they leave scanned from the end, keys in their chunk.

    P_ij = ⟨do_i, z_ij⟩,  dS_ij = W_ij (P_ij − Σ_j W_ij P_ij),  d log C_ij = −λ_b dS_ij − W_ij P_ij   (T = 0: the second term)
    dω_sj = Σ_{i≥s} e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij),   dv_s = Σ_j Σ_{i≥s} e^{ω_sj}/C_ij W_ij do_i
    df̂_s = Σ_j dω_sj,   dℓ_sj = dω_sj − λ_a R_sj df̂_s,   R = softmax_j(ℓ + log b),   d log b_j = Σ_i dS_ij − λ_a Σ_s R_sj df̂_s

Queries of later chunks enter through two sums in units of C at the end of the key's chunk, where every factor is at most 1:

    G_j = Σ_i W_ij do_i C_j/C_ij,   η_j = Σ_i d log C_ij C_j/C_ij:   dω_sj += e^{ω_sj}/C_j (⟨G_j, v_s⟩ + η_j),  dv_s += Σ_j e^{ω_sj}/C_j G_j
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, Options, empty_in_order
from .causal import COUNTS, chunk_arguments, with_unit_rows
from .causal_chunk import (
    at_head,
    chunk_plan,
    key_gradient,
    load_state,
    lower,
    pooled_products,
    product,
    query_weights,
)
from .causal_state import SCAN, Part, parts, states
from .config import Tile, padded, tile
from .gradients import (
    Partials,
    kernel_sums,
    new_partials,
    parameter_gradients,
    position_sums,
    power_of_two,
    store_sums,
    sum_slots,
    token_gradient,
    wants_parameters,
)
from .launch import device_of, launch
from .logits import head_parameters, key_mass, load_references, load_references_t, load_rows, token_logits
from .plan import row_update
from .prepare import prepare, strides
from .primitives import INF, LN2, dot, finite_or_zero
from .read_backward import read_gradient


@triton.jit
def incoming_products(
    d_o, value, means, at, rows, asked, live, alone, stride_on, stride_vn,
    MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """(⟨do_i, v_s⟩ [BC, BC] lower triangular, ⟨do_i, z⁰_j⟩ [BC, MP])."""
    BC: tl.constexpr = rows.shape[0]
    d = tl.zeros([BC, BC], tl.float32)
    from_means = tl.zeros([BC, MP], tl.float32)
    for first in tl.static_range(0, EP, VDEPTH):
        columns = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on, columns, E)
        v = load_rows(value, rows, live, stride_vn, columns, E)
        z = load_state(means, at, first, MP, EP, VDEPTH).to(do.dtype)
        d += dot(do, tl.trans(v), PRECISION)
        from_means += product(do, tl.trans(z), PRECISION, ACROSS)
    return tl.where(alone[:, None], 0.0, lower(d)), from_means


@triton.jit
def first_key(live, before, DROPOUT: tl.constexpr):
    """Which queries [BC] see one key, the first: z_ij = v for all j, and so dS and their part of dω vanish exactly.

    Leaving ⟨do_i, v_s⟩ out leaves its rounding errors out.  Dropout weighs the j differently.
    """
    if DROPOUT:
        return live != live
    else:
        seen = tl.cumsum(live.to(tl.int32), 0)
        return tl.where(tl.max(before, 0) == -INF, seen, 0) == 1


@triton.jit
def store_gradient(
    x, dl, kappa, cosine, inverse, rows, asked, live, stride_n, d_x, stride_d, y, part_y, factor, ADD: tl.constexpr,
    MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one chunk's tokens and its part of dŷ [MP, DP], added to what stands there where ADD."""
    j = tl.arange(0, MP)
    for first in tl.static_range(0, DP, DEPTH):
        columns = first + tl.arange(0, DEPTH)
        tokens = load_rows(x, rows, live, stride_n, columns, D)
        operand, unit, gradient = token_gradient(
            dl, kappa, cosine, inverse, tokens, load_references(y, first, MP, DP, DEPTH), factor, DP == DEPTH, DOT, PRECISION
        )
        if d_x is not None:
            inside = asked[:, None] & (columns < D)[None, :]
            out = d_x + rows.to(tl.int64)[:, None] * stride_d + columns[None, :]
            tl.store(out, gradient.to(tokens.dtype), mask=inside)
        if part_y is not None:
            slot = part_y + j[:, None] * DP + columns[None, :]
            d_y = dot(tl.trans(operand), unit, PRECISION)
            if ADD:
                d_y += tl.load(slot)
            tl.store(slot, d_y)


QUERY_STRIDES = ("stride_xb", "stride_xh", "stride_xn")


@triton.jit(do_not_specialize=[*COUNTS, *QUERY_STRIDES])
def query_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, log_c, means, d_o,
    later_o, later_c, d_query, part_log_b, part_y, part_sums, part_position,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, all_heads, threshold, keep_scale, uniform,
    stride_xb, stride_xh, stride_xn,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr,
    DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """One chunk's dq, its queries' parts of the parameters, and what they leave for earlier keys: later_o, later_c."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    at = bh * chunks + chunk
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    epsilon = tl.load(parameters + h * 8 + 6)
    factor = 1.0 / epsilon if DOT else tl.load(parameters + h * 8 + 5) / epsilon
    query = at_head(query, b, h, stride_qb * STEP, stride_qh * STEP)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    d_o = at_head(d_o, b, h, stride_ob * STEP, stride_oh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    query_position = at_head(query_position, b, h, stride_sb, stride_sh)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    j = tl.arange(0, MP)
    before = tl.load(log_c + at * MP + j)
    masses = tl.load(log_b + h * MP + j)
    rows, count = chunk * BC + tl.arange(0, BC), tl.minimum(L - chunk * BC, BC)
    asked, live, of_queries, of_keys, omega, ref, narrow, sums = chunk_plan(
        query, key, log_a, query_position, key_position, pi, y, y_t,
        masses, before, rows, count, L, stride_qn * STEP, stride_kn * STEP, stride_an, stride_sn, stride_pn,
        beta, scale, lam_a, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    d, from_means = incoming_products(
        d_o, value, means, at, rows, asked, live, first_key(live, before, DROPOUT), stride_on * STEP, stride_vn * STEP,
        MP, E, EP, VDEPTH, PRECISION, ACROSS,
    )  # fmt: skip
    p = pooled_products(d, from_means, omega, ref, before, sums, narrow, count, FACTOR, PRECISION, ACROSS)
    w = query_weights(of_queries[0], masses, sums, lam_b, UPDATE_ROWS)
    head = b * all_heads + h + first_head
    kept, d_s = read_gradient(w, p, seed, head, L, rows, threshold, keep_scale, M, DROPOUT)
    d_sums = -kept * p
    if UPDATE_ROWS:
        d_sums -= lam_b * d_s
    fade = tl.exp2(before[None, :] - finite_or_zero(sums))
    tl.store(later_c + at * MP + j, tl.sum(d_sums * fade, 0))
    weights = tl.trans((kept * fade).to(token))
    for first in tl.static_range(0, EP, VDEPTH):
        e = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on * STEP, e, E)
        tl.store(later_o + (at * MP + j)[:, None] * EP + e[None, :], dot(weights, do, PRECISION))
    l, kappa, cosine, inverse, first_columns = of_queries
    d_query = at_head(d_query, b, h, stride_xb, stride_xh)
    if part_y is not None:
        part_y += at * MP * DP
    store_gradient(
        query, d_s, kappa, cosine, inverse, rows, asked, asked, stride_qn * STEP, d_query, stride_xn, y, part_y, factor,
        False, MP, D, DP, DEPTH, DOT, PRECISION,
    )  # fmt: skip
    tl.store(part_log_b + at * MP + j, tl.sum(d_s, 0))
    d_tau = 0.0
    if P > 0:
        squares, places = position_sums(d_s, query_position, rows, asked, stride_sn, pi, M, P, PP)
        d_tau += tl.sum(squares)
        if part_position is not None:
            tl.store(part_position + (at * MP + j)[:, None] * PP + tl.arange(0, PP)[None, :], places)
    if part_sums is not None:
        d_beta, d_epsilon = kernel_sums(d_s, kappa, cosine, DOT)
        d_lam = tl.sum(d_s * finite_or_zero(sums)) * LN2 if UPDATE_ROWS else 0.0
        store_sums(part_sums, at, tl.sum(d_beta), tl.sum(d_epsilon), 0.0, d_lam, d_tau)


KEY_STRIDES = tuple(f"stride_{t}{n}" for t in ("dk", "dv", "da") for n in "bhn")


@triton.jit(do_not_specialize=[*COUNTS, *KEY_STRIDES])
def key_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, log_c, means, d_o,
    later_o, later_c, d_key, d_value, d_log_a, part_log_b, part_y, part_sums, part_position,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, all_heads, threshold, keep_scale, uniform,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_dab, stride_dah, stride_dan,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr,
    DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """One chunk's dk, dv and d log a; its keys' parts of the parameters are added to those of its queries."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    at = bh * chunks + chunk
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    epsilon = tl.load(parameters + h * 8 + 6)
    factor = 1.0 / epsilon if DOT else tl.load(parameters + h * 8 + 5) / epsilon
    query = at_head(query, b, h, stride_qb * STEP, stride_qh * STEP)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    d_o = at_head(d_o, b, h, stride_ob * STEP, stride_oh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    query_position = at_head(query_position, b, h, stride_sb, stride_sh)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    j = tl.arange(0, MP)
    before = tl.load(log_c + at * MP + j)
    masses = tl.load(log_b + h * MP + j)
    rows, count = chunk * BC + tl.arange(0, BC), tl.minimum(L - chunk * BC, BC)
    asked, live, of_queries, of_keys, omega, ref, narrow, sums = chunk_plan(
        query, key, log_a, query_position, key_position, pi, y, y_t,
        masses, before, rows, count, L, stride_qn * STEP, stride_kn * STEP, stride_an, stride_sn, stride_pn,
        beta, scale, lam_a, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    d, from_means = incoming_products(
        d_o, value, means, at, rows, asked, live, first_key(live, before, DROPOUT), stride_on * STEP, stride_vn * STEP,
        MP, E, EP, VDEPTH, PRECISION, ACROSS,
    )  # fmt: skip
    p = pooled_products(d, from_means, omega, ref, before, sums, narrow, count, FACTOR, PRECISION, ACROSS)
    w = query_weights(of_queries[0], masses, sums, lam_b, UPDATE_ROWS)
    head = b * all_heads + h + first_head
    kept, d_s = read_gradient(w, p, seed, head, L, rows, threshold, keep_scale, M, DROPOUT)
    d_sums = -kept * p
    if UPDATE_ROWS:
        d_sums -= lam_b * d_s
    a, d_omega = key_gradient(kept, d_sums, d, omega, ref, sums, narrow, count, FACTOR, PRECISION, ACROSS)
    end = tl.load(log_c + (at + 1) * MP + j, mask=j < tl.where(chunk + 1 < chunks, MP, 0), other=INF)
    carried = tl.exp2(omega - finite_or_zero(end)[None, :])  # no later chunk: 0
    from_later = tl.zeros_like(omega) + tl.load(later_c + at * MP + j)[None, :]
    to_values, carried_operand = tl.trans(a.to(token)), carried.to(token)
    for first in tl.static_range(0, EP, VDEPTH):
        e = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on * STEP, e, E)
        v = load_rows(value, rows, live, stride_vn * STEP, e, E)
        later = load_state(later_o, at, first, MP, EP, VDEPTH).to(token)
        from_later += product(v, tl.trans(later), PRECISION, ACROSS)
        if d_value is not None:
            out = at_head(d_value, b, h, stride_dvb, stride_dvh) + rows.to(tl.int64)[:, None] * stride_dvn + e[None, :]
            dv = dot(to_values, do, PRECISION) + dot(carried_operand, later, PRECISION)
            tl.store(out, dv.to(token), mask=asked[:, None] & (e < E)[None, :])
    d_omega += carried * from_later
    d_f = tl.sum(d_omega, 1)
    if d_log_a is not None:
        out = at_head(d_log_a, b, h, stride_dab, stride_dah) + rows.to(tl.int64) * stride_dan
        tl.store(out, d_f, mask=asked)
    l, kappa, cosine, inverse, first_columns = token_logits(
        key, rows, live, stride_kn * STEP, key_position, stride_pn, pi, y, y_t, beta, scale, tau,
        M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    d_lam = 0.0
    if UPDATE_ROWS:
        numerators, top, total, f = row_update(l, masses, d_f * 0.0, lam_a)
        from_rows = numerators * (lam_a * d_f / total)[:, None]
        d_omega -= from_rows
        d_lam += tl.sum(d_f * (top + tl.log2(total))) * LN2
        tl.store(part_log_b + at * MP + j, tl.load(part_log_b + at * MP + j) - tl.sum(from_rows, 0))
    d_key = at_head(d_key, b, h, stride_dkb, stride_dkh)
    if part_y is not None:
        part_y += at * MP * DP
    store_gradient(
        key, d_omega, kappa, cosine, inverse, rows, asked, live, stride_kn * STEP, d_key, stride_dkn, y, part_y, factor,
        True, MP, D, DP, DEPTH, DOT, PRECISION,
    )  # fmt: skip
    d_tau = 0.0
    if P > 0:
        squares, places = position_sums(d_omega, key_position, rows, live, stride_pn, pi, M, P, PP)
        d_tau += tl.sum(squares)
        if part_position is not None:
            out = part_position + (at * MP + j)[:, None] * PP + tl.arange(0, PP)[None, :]
            tl.store(out, tl.load(out) + places)
    if part_sums is not None:
        d_beta, d_epsilon = kernel_sums(d_omega, kappa, cosine, DOT)
        old = part_sums + at * 8
        d_beta, d_epsilon = tl.sum(d_beta) + tl.load(old), tl.sum(d_epsilon) + tl.load(old + 1)
        d_lam_b, d_tau = tl.load(old + 3), d_tau + tl.load(old + 4)
        store_sums(part_sums, at, d_beta, d_epsilon, d_lam, d_lam_b, d_tau)


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


@triton.jit
def _fold(parts, out, bh, to, chunks, size, index):
    """The sum of a head's slots [chunks, size] at `index` into its one slot of the whole call."""
    if parts is not None:
        inside = index < size
        tl.store(out + to * size + index, sum_slots(parts, bh, 0, 1, chunks, chunks, size, index, inside), mask=inside)


@triton.jit(do_not_specialize=["H", "chunks", "first_head", "all_heads"])
def fold_kernel(
    part_log_b, part_y, part_sums, part_position, log_b, y, sums, position, H, chunks, first_head, all_heads,
    MP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one head's parts of dŷ, or in its last programs of everything else, summed over chunks."""
    blocks: tl.constexpr = MP * DP // BLOCK + MP * PP // BLOCK + 1
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    to = bh // H * all_heads + bh % H + first_head
    index = tl.arange(0, BLOCK)
    if block < MP * DP // BLOCK:
        _fold(part_y, y, bh, to, chunks, MP * DP, block * BLOCK + index)
    else:
        block -= MP * DP // BLOCK
        _fold(part_position, position, bh, to, chunks, MP * PP, block * BLOCK + index)
        if block == 0:
            _fold(part_log_b, log_b, bh, to, chunks, MP, index)
            _fold(part_sums, sums, bh, to, chunks, 8, index)


FOLD = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 slots, 256] tile is 32 numbers a thread


def causal_backward(x: Operands, opt: Options, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed, from d_o [B, H, L, E]."""
    given, need = x, dict(zip(Operands._fields, needs, strict=True))
    x = with_unit_rows(x)
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    prepared = prepare(x, opt)
    out = {n: empty_in_order(t, t.shape) if need[n] and (t := getattr(given, n)) is not None else None for n in TOKENS}
    whole = new_partials(x, prepared, 1, needs)
    device = device_of(x.key)
    _, mp, dp = prepared.y.shape
    ep = padded(x.value.shape[-1])
    cut = tile("chunk_backward", device.family, max(mp, dp, ep), x.key.element_size())
    chunks = math.ceil(x.key.shape[2] / cut.rows)
    for part in parts(x, prepared, chunks, mp * (2 * ep + dp + 8), device.multiprocessors):
        _part_backward(part, opt, d_o[part.batch, part.heads], part_of(out, part), whole, needs, cut)
    parameters = parameter_gradients(x, opt, prepared, whole, needs)
    return Operands(**{n: None for n in Operands._fields} | out | parameters)


TOKENS = ("query", "key", "value", "log_a")


def part_of(out: dict[str, Tensor | None], part: Part) -> dict[str, Tensor | None]:
    """The views of token gradients that belong to a part."""
    return {n: None if t is None else t[part.batch, part.heads] for n, t in out.items()}


def _part_backward(
    part: Part, opt: Options, d_o: Tensor, out: dict[str, Tensor | None], whole: Partials, needs: Sequence[bool], cut: Tile
) -> None:
    """All launches of some heads: writes `out` and their slots of `whole`."""
    log_c, means = states(part.x, opt, part.prepared, cut.rows)
    heads, chunks, mp, ep = means.shape
    slots = new_partials(part.x, part.prepared, chunks, needs)
    later_o, later_c = means.new_empty(means.shape), log_c.new_empty(log_c.shape)
    tensors, counts, constants = chunk_arguments(part, opt, cut, d_o)
    constants |= {"PP": power_of_two(constants["P"])}
    tensors = (*tensors, log_c, means, d_o, later_o, later_c)
    args = (*tensors, out["query"], *slots, *counts, *strides(out["query"]))
    launch(query_kernel, heads * chunks, args, constants, cut)
    block = min(SCAN.depth, mp * ep)
    scan = {"MP": mp, "EP": ep, "BLOCK": block, "STAGES": SCAN.stages}
    launch(scan_back_kernel, heads * (mp * ep // block + 1), (log_c, later_o, later_c, chunks), scan, SCAN)
    spans = [s for name in TOKENS[1:] for s in strides(out[name])]
    args = (*tensors, *(out[name] for name in TOKENS[1:]), *slots, *counts, *spans)
    launch(key_kernel, heads * chunks, args, constants, cut)
    if wants_parameters(part.x, needs):
        _, mp, dp = part.prepared.y.shape
        fold = {"MP": mp, "DP": dp, "PP": constants["PP"], "BLOCK": FOLD.depth}
        blocks = mp * dp // FOLD.depth + mp * fold["PP"] // FOLD.depth + 1
        sizes = (part.x.key.shape[1], chunks, part.first_head, part.all_heads)
        launch(fold_kernel, heads * blocks, (*slots, *whole, *sizes), fold, FOLD)
