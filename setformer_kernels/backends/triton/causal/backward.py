"""Backward of the causal scan, T ≤ 1: queries in their chunk, a scan from the end, keys in their chunk.

    P_ij = ⟨do_i, z_ij⟩,   dS_ij = W_ij (P_ij − Σ_j W_ij P_ij),   d log C_ij = −λ_b dS_ij − W_ij P_ij   (T = 0: λ_b = 0)
    dω_sj = Σ_{i≥s} e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij),   dv_s = Σ_j Σ_{i≥s} e^{ω_sj}/C_ij W_ij do_i
    df̂_s = Σ_j dω_sj,   dℓ_sj = dω_sj − λ_a R_sj df̂_s,   R = softmax_j(ℓ + log b)
    d log b_j = Σ_i dS_ij − λ_a Σ_s R_sj df̂_s

Queries of later chunks enter as two sums in units of C at the end of the key's chunk, where no factor exceeds 1:

    G_j = Σ_i W_ij do_i C_j/C_ij,   η_j = Σ_i d log C_ij C_j/C_ij
    dω_sj += e^{ω_sj}/C_j (⟨G_j, v_s⟩ + η_j),   dv_s += Σ_j e^{ω_sj}/C_j G_j
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.gradients import REFERENCE_RELAXATION_SUM, store_sum
from ..device.head import head_parameters
from ..device.logits import load_references_t, load_rows, token_logits
from ..device.primitives import INF, LN2, dot, finite_or_zero, rounded
from ..device.softmax import read_gradient
from ..host.launch import device_of, kernel, launch
from ..host.rows import TOKENS, strides, token_gradients
from ..host.tiles import padded, tile
from ..parameters.gradients import Partials, new_partials, parameter_gradients, wants_parameters
from ..parameters.prepare import Prepared, prepare
from .chunk import (
    at_head,
    chunk_keys,
    key_gradient,
    load_state,
    lower,
    place,
    pooled_products,
    product,
    query_weights,
    tile_at,
)
from .forward import chunk_arguments, with_unit_rows
from .state import Arguments, Part, new_passed, parts, scan, scan_back
from .tokens import fold, tokens_backward


@triton.jit
def pair_products(
    d_o, value, rows, asked, live, alone, stride_on, stride_vn,
    E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨do_i, v_s⟩ [BC, BC] lower triangular; 0 for the queries that are alone with the first key."""
    d = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    for first in tl.static_range(0, EP, VDEPTH):
        columns = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on, columns, E)
        d += dot(do, tl.trans(load_rows(value, rows, live, stride_vn, columns, E)), PRECISION)
    return tl.where(alone[:, None], 0.0, lower(d))


@triton.jit
def mean_products(
    d_o, means, at, rows, asked, stride_on, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, VDEPTH: tl.constexpr,
    PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """⟨do_i, z⁰_j⟩ [BC, MP]."""
    p = tl.zeros([rows.shape[0], MP], tl.float32)
    for first in tl.static_range(0, EP, VDEPTH):
        do = load_rows(d_o, rows, asked, stride_on, first + tl.arange(0, VDEPTH), E)
        z = rounded(load_state(means, at, first, MP, EP, VDEPTH), do.dtype)
        p += product(do, tl.trans(z), PRECISION, ACROSS)
    return p


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


@kernel
def causal_queries_backward_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, log_c, means, d_o,
    weights, d_sums, d_logits, later_o, later_c, part_sums,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, first_chunk, threshold, keep_scale, uniform,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BC: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk's W (weights), d log C (d_sums), dS (d_logits), its part of dλ_b, and its terms of G and η (later)."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, head, chunk = place(chunks, first_head, first_chunk)
    b, h = head // H, head % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    query = at_head(query, b, h, stride_qb * STEP, stride_qh * STEP)
    query_position = at_head(query_position, b, h, stride_sb, stride_sh)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    d_o = at_head(d_o, b, h, stride_ob * STEP, stride_oh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    j = tl.arange(0, MP)
    before, masses = tl.load(log_c + at * MP + j), tl.load(log_b + h * MP + j)
    rows, count = chunk * BC + tl.arange(0, BC), tl.minimum(L - chunk * BC, BC)
    asked = rows < L
    live, omega, ref, narrow, sums = chunk_keys(
        key, log_a, key_position, pi, y, y_t, masses, before, rows, count, L, stride_kn * STEP, stride_an, stride_pn,
        beta, scale, lam_a, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    alone = first_key(live, before, DROPOUT)
    d = pair_products(
        d_o, value, rows, asked, live, alone, stride_on * STEP, stride_vn * STEP, E, EP, VDEPTH, PRECISION
    )
    p = mean_products(d_o, means, at, rows, asked, stride_on * STEP, MP, E, EP, VDEPTH, PRECISION, ACROSS)
    p = pooled_products(d, p, omega, ref, before, sums, narrow, count, FACTOR, PRECISION, ACROSS)
    l, kappa, cosine, inverse, first_columns = token_logits(
        query, rows, asked, stride_qn * STEP, query_position, stride_sn, pi, y, y_t, beta, scale, tau,
        M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    w = query_weights(l, masses, sums, lam_b, UPDATE_ROWS)
    w, d_s = read_gradient(w, p, seed, head.to(tl.int64), L, rows, threshold, keep_scale, M, DROPOUT)
    d_c = -w * p - lam_b * d_s if UPDATE_ROWS else -w * p
    tl.store(tile_at(weights, at, BC, MP), w)
    tl.store(tile_at(d_sums, at, BC, MP), d_c)
    tl.store(tile_at(d_logits, at, BC, MP), d_s)
    fade = tl.exp2(before[None, :] - finite_or_zero(sums))
    tl.store(later_c + at * MP + j, tl.sum(d_c * fade, 0))
    faded = tl.trans(rounded(w * fade, token))
    for first in tl.static_range(0, EP, VDEPTH):
        e = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on * STEP, e, E)
        tl.store(later_o + (at * MP + j)[:, None] * EP + e[None, :], dot(faded, do, PRECISION))
    if part_sums is not None:
        d_lam = tl.sum(d_s * finite_or_zero(sums)) * LN2 if UPDATE_ROWS else 0.0
        store_sum(part_sums, at, REFERENCE_RELAXATION_SUM, d_lam)


@kernel
def causal_keys_backward_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, log_c, log_end, d_o,
    weights, d_sums, d_logits, later_o, later_c, d_value,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, first_chunk, threshold, keep_scale, uniform,
    stride_db, stride_dh, stride_dn,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BC: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk's dω (d_logits) and dv."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, head, chunk = place(chunks, first_head, first_chunk)
    head = head.to(tl.int64)  # divided in 32 bits, 24 more bytes of registers spill (sm_80, float32, D 128)
    b, h = head // H, head % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    d_o = at_head(d_o, b, h, stride_ob * STEP, stride_oh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    j = tl.arange(0, MP)
    before, masses = tl.load(log_c + at * MP + j), tl.load(log_b + h * MP + j)
    rows, count = chunk * BC + tl.arange(0, BC), tl.minimum(L - chunk * BC, BC)
    asked = rows < L
    live, omega, ref, narrow, sums = chunk_keys(
        key, log_a, key_position, pi, y, y_t, masses, before, rows, count, L, stride_kn * STEP, stride_an, stride_pn,
        beta, scale, lam_a, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    alone = first_key(live, before, DROPOUT)
    d = pair_products(
        d_o, value, rows, asked, live, alone, stride_on * STEP, stride_vn * STEP, E, EP, VDEPTH, PRECISION
    )
    a, d_omega = key_gradient(
        tl.load(tile_at(weights, at, BC, MP)), tl.load(tile_at(d_sums, at, BC, MP)), d, omega, ref, sums, narrow, count,
        FACTOR, PRECISION, ACROSS,
    )  # fmt: skip
    end = tl.load(log_end + at * MP + j)
    carried = tl.exp2(omega - finite_or_zero(end)[None, :])
    from_later = tl.zeros_like(omega) + tl.load(later_c + at * MP + j)[None, :]
    to_values, carried_operand = tl.trans(rounded(a, token)), rounded(carried, token)
    for first in tl.static_range(0, EP, VDEPTH):
        e = first + tl.arange(0, VDEPTH)
        do = load_rows(d_o, rows, asked, stride_on * STEP, e, E)
        v = load_rows(value, rows, live, stride_vn * STEP, e, E)
        later = rounded(load_state(later_o, at, first, MP, EP, VDEPTH), token)
        from_later += product(v, tl.trans(later), PRECISION, ACROSS)
        if d_value is not None:
            out = at_head(d_value, b, h, stride_db, stride_dh)
            out += rows.to(tl.int64)[:, None] * stride_dn + e[None, :]
            dv = dot(to_values, do, PRECISION) + dot(carried_operand, later, PRECISION)
            tl.store(out, rounded(dv, token), mask=asked[:, None] & (e < E)[None, :])
    tl.store(tile_at(d_logits, at, BC, MP), d_omega + carried * from_later)


class Call(NamedTuple):
    """What all parts of one call share."""

    x: Operands
    prepared: Prepared
    arguments: Arguments
    d_o: Tensor  # [B, H, L, E]
    out: dict[str, Tensor | None]  # gradients of tokens and log a, None where not needed
    whole: Partials  # [BH, 1, ..]


def causal_backward(x: Operands, opt: Options, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed, from d_o [B, H, L, E]."""
    out = token_gradients(x, dict(zip(Operands._fields, needs, strict=True)))
    x = with_unit_rows(x)
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    prepared = prepare(x, opt)
    whole = new_partials(x, prepared, 1, needs)
    device = device_of(x.key)
    _, mp, dp = prepared.y.shape
    ep = padded(x.value.shape[-1])
    cut = tile("chunk_backward", device.family, max(mp, dp, ep), x.key.element_size())
    arguments = chunk_arguments(x, prepared, opt, cut, d_o)
    rows = {n: out[n].rows if n in out else None for n in (*TOKENS, "log_a")}
    call = Call(x, prepared, arguments, d_o, rows, whole)
    numbers = mp * (max(dp, ep) + ep + 3 * cut.rows + arguments.constants["PP"] + 6)
    for stretches in parts(x, cut.rows, numbers, device.multiprocessors):
        _heads_backward(call, stretches, wants_parameters(x, needs))
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(x, opt, prepared, whole, needs)
    return Operands._make(found.get(name) for name in Operands._fields)


def _heads_backward(call: Call, stretches: list[Part], wanted: bool) -> None:
    """Some heads: forward for what comes before each stretch, then from the last stretch to the first."""
    passed = new_passed(stretches[0], call.arguments, call.whole.log_b)
    passed_back = passed[1].new_empty(passed[1][:, 0].shape), passed[0].new_empty(passed[0][:, 0].shape)
    for part in stretches[:-1]:
        scan(part, call.arguments, passed, _room(call, part)[0])
    for part in reversed(stretches):
        slots = _part_backward(call, part, passed, passed_back)
        if wanted:
            fold(part, slots, call.whole, call.arguments.constants)
        del slots  # before the next part allocates its own


def _room(call: Call, part: Part) -> tuple[Tensor, Tensor]:
    """One piece of memory as means z [heads, chunks, MP, EP] and, once these are read, as slots of dŷ [.., MP, DP]."""
    constants, slots = call.arguments.constants, part.heads * part.chunks
    mp, dp, ep = (constants[n] for n in ("MP", "DP", "EP"))
    room = call.whole.log_b.new_empty(slots * mp * max(dp, ep))
    means, y = (room[: slots * mp * n].view(part.heads, part.chunks, mp, n) for n in (ep, dp))
    return means, y


def _slots(whole: Partials, part: Part, y: Tensor) -> Partials:
    """A slot for each chunk of a part, of the sums that `whole` has."""
    shape, others = (part.heads, part.chunks), replaced(whole, y=None)._asdict()
    found = {n: t.new_empty((*shape, *t.shape[2:])) for n, t in others.items() if t is not None}
    return replaced(whole, **(found if whole.y is None else found | {"y": y}))


def _part_backward(
    call: Call, part: Part, passed: tuple[Tensor, Tensor], passed_back: tuple[Tensor, Tensor]
) -> Partials:
    """All launches of a part: writes the tokens' gradients, and the slots of its chunks that it returns."""
    x, prepared, arguments, d_o, out, whole = call
    means, y = _room(call, part)
    states = scan(part, arguments, passed, means)
    slots, new = _slots(whole, part, y), means.new_empty
    later = new(means.shape), new(means.shape[:3])
    weights, d_sums, d_logits = (new((part.heads, part.chunks, arguments.cut.rows, means.shape[2])) for _ in range(3))
    programs, counts, constants = part.heads * part.chunks, arguments.counts(part), arguments.constants
    tiles = (d_o, weights, d_sums, d_logits, *later)
    args = (*arguments.tensors, states.log_c, means, *tiles, slots.sums, *counts)
    launch(causal_queries_backward_kernel, programs, args, constants, arguments.cut)
    tokens_backward(x, prepared, part, "query", d_logits, out, slots, arguments)
    scan_back(part, states, later, passed_back)
    args = (*arguments.tensors, states.log_c, states.log_end, *tiles, out["value"], *counts, *strides(out["value"]))
    launch(causal_keys_backward_kernel, programs, args, constants, arguments.cut)
    tokens_backward(x, prepared, part, "key", d_logits, out, slots, arguments)
    return slots
