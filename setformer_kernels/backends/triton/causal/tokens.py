"""From the gradients of a chunk's logits to those of its tokens and of the parameters, and the sums over chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands
from ..device.gradients import (
    BETA_SUM,
    EPSILON_SUM,
    REFERENCE_RELAXATION_SUM,
    SUMS,
    TAU_SUM,
    kernel_sums,
    load_sum,
    position_sums,
    store_sums,
    sum_slots,
    token_gradient,
)
from ..device.head import gradient_factor, head_parameters
from ..device.logits import key_mass, load_references, load_references_t, load_rows, token_logits
from ..device.plan import row_update
from ..device.primitives import LN2, dot, rounded
from ..host.launch import kernel, launch
from ..host.rows import stride_step, strides
from ..host.tiles import Tile
from ..parameters.gradients import Partials
from ..parameters.prepare import Prepared
from .chunk import at_head, place, tile_at
from .state import Arguments, Part


@triton.jit
def store_gradient(
    x, dl, kappa, cosine, inverse, rows, asked, live, stride_n, d_x, stride_d, y, part_y, at, factor,
    ADD: tl.constexpr,
    MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one chunk's tokens and its part of dŷ [MP, DP], added to what stands there where ADD."""
    j = tl.arange(0, MP)
    for first in tl.static_range(0, DP, DEPTH):
        columns = first + tl.arange(0, DEPTH)
        tokens = load_rows(x, rows, live, stride_n, columns, D)
        operand, unit, gradient = token_gradient(
            dl, kappa, cosine, inverse, tokens, load_references(y, first, MP, DP, DEPTH), factor,
            DP == DEPTH, DOT, PRECISION,
        )  # fmt: skip
        if d_x is not None:
            inside = asked[:, None] & (columns < D)[None, :]
            out = d_x + rows.to(tl.int64)[:, None] * stride_d + columns[None, :]
            tl.store(out, rounded(gradient, tokens.dtype), mask=inside)
        if part_y is not None:
            slot = part_y + (at * MP + j)[:, None] * DP + columns[None, :]
            d_y = dot(tl.trans(operand), unit, PRECISION)
            if ADD:
                d_y += tl.load(slot)
            tl.store(slot, d_y)


@triton.jit
def store_parts(
    dl, kappa, cosine, position, rows, live, stride_n, pi, part_sums, part_position, at, d_lam_a, middle,
    ADD: tl.constexpr, M: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk's parts of the hyperparameters and of the reference positions, added to what stands there where ADD.

    All dℓ of the queries, and all of the keys, sum to 0: moving κ by its value `middle` between orthogonal vectors
    changes nothing but the weight of their rounding errors.
    """
    j = tl.arange(0, dl.shape[1])
    d_tau = 0.0
    if P > 0:
        squares, places = position_sums(dl, position, rows, live, stride_n, pi, M, P, PP)
        d_tau += tl.sum(squares)
        if part_position is not None:
            out = part_position + (at * dl.shape[1] + j)[:, None] * PP + tl.arange(0, PP)[None, :]
            if ADD:
                places += tl.load(out)
            tl.store(out, places)
    if part_sums is not None:
        beta_rows, epsilon_rows = kernel_sums(dl, kappa, cosine, DOT)
        total = tl.sum(dl)
        d_beta, d_epsilon = tl.sum(beta_rows) + middle * total, tl.sum(epsilon_rows) + (1.0 - middle) * total
        d_lam_b = load_sum(part_sums, at, REFERENCE_RELAXATION_SUM)  # of the query kernel
        if ADD:
            d_beta += load_sum(part_sums, at, BETA_SUM)
            d_epsilon += load_sum(part_sums, at, EPSILON_SUM)
            d_tau += load_sum(part_sums, at, TAU_SUM)
        store_sums(part_sums, at, d_beta, d_epsilon, d_lam_a, d_lam_b, d_tau)


@kernel
def causal_tokens_backward_kernel(
    x, log_a, position, y, log_b, pi, parameters, d_logits, d_x, d_log_a, part_log_b, part_y, part_sums, part_position,
    stride_xb, stride_xh, stride_xn, stride_ab, stride_ah, stride_an, stride_pb, stride_ph, stride_pn,
    stride_db, stride_dh, stride_dn, stride_mb, stride_mh, stride_mn, H, L, chunks, first_head, first_chunk,
    KEYS: tl.constexpr, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, DOT: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One chunk's dq from dS; of KEYS dk and d log a from dω, and their parts added to those of the queries."""
    at, head, chunk = place(chunks, first_head, first_chunk)
    b, h = head // H, head % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    position = at_head(position, b, h, stride_pb, stride_ph)
    pi = at_head(pi, b, h, 0, M * P)
    y += h * MP * DP
    j = tl.arange(0, MP)
    rows = chunk * BC + tl.arange(0, BC)
    asked = rows < L
    live, mass = key_mass(at_head(log_a, b, h, stride_ab, stride_ah), rows, L, stride_an, 0.0)
    x = at_head(x, b, h, stride_xb * STEP, stride_xh * STEP)
    l, kappa, cosine, inverse, first_columns = token_logits(
        x, rows, live, stride_xn * STEP, position, stride_pn, pi, y, load_references_t(y, 0, MP, DP, DEPTH),
        beta, scale, tau, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    dl = tl.load(tile_at(d_logits, at, BC, MP))
    middle = 0.0 if DOT else tl.exp2(-beta)
    d_lam = 0.0
    if KEYS:
        d_f = tl.sum(dl, 1)
        if d_log_a is not None:
            out = at_head(d_log_a, b, h, stride_mb, stride_mh) + rows.to(tl.int64) * stride_mn
            tl.store(out, d_f, mask=asked)
        if UPDATE_ROWS:
            numerators, top, total, f = row_update(l, tl.load(log_b + h * MP + j), d_f, lam_a)
            from_rows = numerators * (lam_a * d_f / total)[:, None]
            dl -= from_rows
            d_lam += (
                tl.sum(d_f * (top + tl.log2(total) - (middle - 1.0) * scale)) * LN2
            )  # Σ df = 0, as in `store_parts`
            tl.store(part_log_b + at * MP + j, tl.load(part_log_b + at * MP + j) - tl.sum(from_rows, 0))
    else:
        tl.store(part_log_b + at * MP + j, tl.sum(dl, 0))
    d_x = at_head(d_x, b, h, stride_db, stride_dh)
    store_gradient(
        x, dl, kappa, cosine, inverse, rows, asked, live, stride_xn * STEP, d_x, stride_dn, y, part_y, at,
        gradient_factor(parameters, h, DOT), KEYS, MP, D, DP, DEPTH, DOT, PRECISION,
    )  # fmt: skip
    store_parts(
        dl, kappa, cosine, position, rows, live, stride_pn, pi, part_sums, part_position, at, d_lam, middle,
        KEYS, M, P, PP, DOT,
    )  # fmt: skip


@triton.jit
def _fold(parts, out, bh, first_head, chunks, size, index, more):
    """The sum of a head's slots [chunks, size] at `index` into its one slot of the whole call, on what stands there.

    Stretches go from the last to the first: before the last, with no `more` after it, nothing stands there.
    """
    if parts is not None:
        inside = index < size
        out += (bh + first_head) * size + index
        before = tl.load(out, mask=index < tl.where(more > 0, size, 0), other=0.0)
        tl.store(out, before + sum_slots(parts, bh, 0, 1, chunks, chunks, size, index, inside), mask=inside)


@kernel
def causal_fold_backward_kernel(
    part_log_b, part_y, part_sums, part_position, log_b, y, sums, position, chunks, first_head, more,
    MP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one head's parts of dŷ, or in its last programs of everything else, summed over chunks."""
    blocks: tl.constexpr = MP * DP // BLOCK + MP * PP // BLOCK + 1
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    index = tl.arange(0, BLOCK)
    if block < MP * DP // BLOCK:
        _fold(part_y, y, bh, first_head, chunks, MP * DP, block * BLOCK + index, more)
    else:
        block -= MP * DP // BLOCK
        _fold(part_position, position, bh, first_head, chunks, MP * PP, block * BLOCK + index, more)
        if block == 0:
            _fold(part_log_b, log_b, bh, first_head, chunks, MP, index, more)
            _fold(part_sums, sums, bh, first_head, chunks, SUMS, index, more)


FOLD = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 slots, 256] tile is 32 numbers a thread


def tokens_backward(
    x: Operands,
    prepared: Prepared,
    part: Part,
    name: str,
    d_logits: Tensor,
    out: Mapping[str, Tensor | None],
    slots: Partials,
    arguments: Arguments,
) -> None:
    """Launches the gradients of "query" or "key" from those of their logits."""
    keys = name == "key"
    tokens, position = getattr(x, name), getattr(x, name + "_position")
    log_a, d_log_a = (x.log_a, out["log_a"]) if keys else (None, None)
    names = ("UPDATE_ROWS", "M", "MP", "D", "DP", "P", "PP", "DOT", "BC", "DEPTH", "PRECISION", "ACROSS")
    step = stride_step(tokens)
    constants = {"KEYS": keys, "STEP": step} | {n: arguments.constants[n] for n in names}
    references = (prepared.y, prepared.log_b, prepared.position, prepared.parameters)
    tensors = (tokens, log_a, position, *references, d_logits, out[name], d_log_a, *slots)
    spans = (*strides(tokens, step), *(s for t in (log_a, position, out[name], d_log_a) for s in strides(t)))
    counts = (*tokens.shape[1:3], part.chunks, part.first_head, part.first_chunk)
    launch(
        causal_tokens_backward_kernel, part.heads * part.chunks, (*tensors, *spans, *counts), constants, arguments.cut
    )


def fold(part: Part, slots: Partials, whole: Partials, constants: Mapping[str, Any]) -> None:
    """Sums the slots of a part, one per chunk, into their heads' one slot of the whole call."""
    mp, dp, pp = (constants[n] for n in ("MP", "DP", "PP"))
    programs = part.heads * (mp * dp // FOLD.depth + mp * pp // FOLD.depth + 1)
    sizes = (part.chunks, part.first_head, part.stretches - 1 - part.stretch)
    tile = {"MP": mp, "DP": dp, "PP": pp, "BLOCK": FOLD.depth}
    launch(causal_fold_backward_kernel, programs, (*slots, *whole, *sizes), tile, FOLD)
