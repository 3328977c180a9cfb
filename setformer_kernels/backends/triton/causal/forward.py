"""Causal attention for T ≤ 1, linear in the length: sums of chunks of keys, a scan over chunks, queries in their chunk.

    ω_sj = ℓ_sj + f̂_s + log a_s,   f̂_s = −λ_a LSE_j(ℓ_sj + log b_j)   (T = 0: 0)
    C_ij = Σ_{s≤i} e^{ω_sj},   z_ij = Σ_{s≤i} e^{ω_sj} v_s / C_ij
    W_ij = softmax_j(ℓ(q_i, y_j) + log b_j − λ_b log C_ij)   (T = 0: without C),   o_i = Σ_j W_ij z_ij

With C⁰, z⁰ the sums and means of all keys before a chunk,

    o_i = Σ_j W_ij (C⁰_j / C_ij) z⁰_j + Σ_{s≤i in the chunk} A_is v_s,   A_is = Σ_j W_ij e^{ω_sj} / C_ij
"""

from __future__ import annotations

import math

import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.head import head_parameters
from ..device.logits import load_references_t, load_rows, token_logits
from ..device.primitives import dot, rounded
from ..device.softmax import dropout_constants, keep_mask
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strides, unit_rows
from ..host.tiles import Tile, padded, power_of_two, tile
from ..parameters.prepare import Prepared, prepare
from .chunk import at_head, chunk_keys, chunk_weights, load_state, place, query_weights
from .state import Arguments, Part, new_passed, parts, scan


@kernel
def causal_kernel(
    query, key, value, log_a, query_position, key_position, y, log_b, pi, parameters, seed, log_c, z, output,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_ab, stride_ah, stride_an, stride_sb, stride_sh, stride_sn,
    stride_pb, stride_ph, stride_pn, H, L, chunks, first_head, first_chunk, threshold, keep_scale, uniform,
    UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BC: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head; strides s and p are those of the positions of queries and keys."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, head, chunk = place(chunks, first_head, first_chunk)
    b, h = head // H, head % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    query = at_head(query, b, h, stride_qb * STEP, stride_qh * STEP)
    key = at_head(key, b, h, stride_kb * STEP, stride_kh * STEP)
    value = at_head(value, b, h, stride_vb * STEP, stride_vh * STEP)
    output = at_head(output, b, h, stride_ob * STEP, stride_oh * STEP)
    log_a = at_head(log_a, b, h, stride_ab, stride_ah)
    query_position = at_head(query_position, b, h, stride_sb, stride_sh)
    key_position = at_head(key_position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    j = tl.arange(0, MP)
    before = tl.load(log_c + at * MP + j)
    rows, count = chunk * BC + tl.arange(0, BC), tl.minimum(L - chunk * BC, BC)
    masses = tl.load(log_b + h * MP + j)
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    live, omega, ref, narrow, sums = chunk_keys(
        key, log_a, key_position, pi, y, y_t, masses, before, rows, count, L, stride_kn * STEP, stride_an, stride_pn,
        beta, scale, lam_a, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    asked = rows < L
    l, kappa, cosine, inverse, first_columns = token_logits(
        query, rows, asked, stride_qn * STEP, query_position, stride_sn, pi, y, y_t, beta, scale, tau,
        M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    w = query_weights(l, masses, sums, lam_b, UPDATE_ROWS)
    normaliser = 1.0 / tl.sum(w, 1)
    if DROPOUT:
        keep = keep_mask(seed, b.to(tl.int64) * H + h, L, rows, M, MP, threshold)
        w = tl.where(keep, w, 0.0)
        normaliser *= keep_scale
    a, carried = chunk_weights(w, omega, ref, before, sums, narrow, count, FACTOR, PRECISION)
    a, carried = rounded(a, token), rounded(carried, token)
    out = output + rows.to(tl.int64)[:, None] * (stride_on * STEP)
    for first in tl.static_range(0, EP, VDEPTH):
        columns = first + tl.arange(0, VDEPTH)
        v = load_rows(value, rows, live, stride_vn * STEP, columns, E)
        means = rounded(load_state(z, at, first, MP, EP, VDEPTH), token)
        o = (dot(carried, means, PRECISION) + dot(a, v, PRECISION)) * normaliser[:, None]
        tl.store(out + columns[None, :], rounded(o, token), mask=asked[:, None] & (columns < E)[None, :])


def causal(x: Operands, opt: Options) -> Tensor:
    """o [B, H, L, E] in the dtype and memory order of the queries, for T ≤ 1."""
    assert x.query is not None
    output = rows_like(x.query, x.value.shape[-1])
    x = with_unit_rows(x)
    prepared = prepare(x, opt)
    device = device_of(x.key)
    _, mp, dp = prepared.y.shape
    ep = padded(x.value.shape[-1])
    cut = tile("chunk", device.family, max(mp, dp, ep), x.key.element_size())
    arguments = chunk_arguments(x, prepared, opt, cut, output.rows)
    for stretches in parts(x, cut.rows, mp * (ep + 5), device.multiprocessors):
        _heads(stretches, arguments, output.rows, prepared.log_b)
    return output.delivered()


def _heads(stretches: list[Part], arguments: Arguments, output: Tensor, like: Tensor) -> None:
    """Writes the rows of some heads; what it allocates goes when it returns."""
    passed = new_passed(stretches[0], arguments, like)
    for part in stretches:
        _part(part, arguments, passed, output)


def _part(part: Part, arguments: Arguments, passed: tuple[Tensor, Tensor], output: Tensor) -> None:
    """One stretch of some heads."""
    constants = arguments.constants
    room = passed[1].new_empty((part.heads, part.chunks, constants["MP"], constants["EP"]))
    log_c, _, z = scan(part, arguments, passed, room)
    args = (*arguments.tensors, log_c, z, output, *arguments.counts(part))
    launch(causal_kernel, part.heads * part.chunks, args, constants, arguments.cut)


def with_unit_rows(x: Operands) -> Operands:
    """Token tensors with unit stride along their last dimension."""
    names = ("query", "key", "value", "query_position", "key_position")
    return replaced(x, **{name: t if (t := getattr(x, name)) is None else unit_rows(t) for name in names})


def chunk_arguments(x: Operands, prepared: Prepared, opt: Options, cut: Tile, like: Tensor) -> Arguments:
    """What the kernels on chunks share; `like` is laid out as the output."""
    assert x.query is not None
    (_, h, l, d), m, e = x.key.shape, x.references.shape[1], x.value.shape[-1]
    _, mp, dp = prepared.y.shape
    ep = padded(e)
    tokens = (x.query, x.key, x.value, x.log_a, x.query_position, x.key_position)
    tensors = (*tokens, prepared.y, prepared.log_b, prepared.position, prepared.parameters, x.seed)
    step = stride_step(x.query, x.key, x.value, like)
    spans = [s for t in (x.query, x.key, x.value, like) for s in strides(t, step)]
    spans += [s for t in (x.log_a, x.query_position, x.key_position) for s in strides(t)]
    p = 0 if x.reference_position is None else x.reference_position.shape[-1]
    constants = {
        "UPDATE_ROWS": opt.num_iters > 0, "M": m, "MP": mp, "D": d, "DP": dp, "E": e, "EP": ep,
        "P": p, "PP": power_of_two(p), "DOT": opt.kernel == "dot",
        "DROPOUT": x.seed is not None, "STEP": step, "BC": cut.rows, "DEPTH": min(cut.depth, dp),
        "VDEPTH": min(cut.depth, ep), "PRECISION": device_of(x.key).precision, "ACROSS": mp >= 16 * cut.warps,
    }  # fmt: skip
    scalars = (*dropout_constants(opt.dropout_p), -math.log2(l) if l else 0.0)
    return Arguments(tensors, (*spans, h, l), scalars, constants, cut)
