"""Queries read the pooled values: one pass, o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g^T_j) z_j.

Defined by `reference.transport.read_weights`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.plan import range_known
from ..device.primitives import INF, LOG2E, dot, finite_or_zero, rounded
from ..device.rows import rows_of, segment_of, store_rows
from ..device.softmax import below_top, dropout_constants, kept_weights, numerators
from ..host.groups import Dropout, Segments, cut_of, rule_of, sizes_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strided, unit_rows
from ..host.tiles import tile
from ..parameters.prepare import References


class Pooled(NamedTuple):
    """What queries read."""

    z: Tensor  # [B, H, M, E] float32
    g: Tensor | None  # [B, H, M] g^T; or None, and it follows from
    c: Tensor | None  # [B, H, max(T, 1), M]


@triton.jit
def given_potential(g, bh, sizes):
    """(g^T [MP], −∞ where padded, all 0 where no key takes part; whether one does)."""
    j = tl.arange(0, sizes.MP)
    found = tl.load(g + bh * sizes.M + j, mask=j < sizes.M, other=-INF) * LOG2E
    seen = tl.max(found, 0) > -INF
    return tl.where(seen, found, 0.0), seen


@triton.jit
def dual_potential(head, pooled, bh, iterations, UPDATE_ROWS: tl.constexpr, sizes):
    """g^T [MP], −∞ where padded: as given, or log b − λ_b c^T (T = 0: log b), where c counts as 0 without a key."""
    if pooled.g is not None:
        g, seen = given_potential(pooled.g, bh, sizes)
    else:
        j = tl.arange(0, sizes.MP)
        g = tl.load(head.log_b + j)
        if UPDATE_ROWS:
            c = pooled.c + (bh * iterations + iterations - 1) * sizes.M
            g -= head.lam_b * finite_or_zero(tl.load(c + j, mask=j < sizes.M, other=0.0)) * LOG2E
    return g


@triton.jit
def store_zeros(output, start, end, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr, cut):
    """Rows start..end of a head in which no key takes part."""
    zeros = tl.zeros([cut.ROWS, DEPTH], tl.float32)
    for first in range(start, end, cut.ROWS):
        rows = first + tl.arange(0, cut.ROWS)
        for column in range(0, PADDED, DEPTH):
            store_rows(output, rows, rows < end, column + tl.arange(0, DEPTH), WIDTH, zeros)


@triton.jit
def load_pooled(z, bh, start, sizes, DEPTH: tl.constexpr):
    """Columns start.. of z of one head: [MP, DEPTH] in float32."""
    j, e = tl.arange(0, sizes.MP), start + tl.arange(0, DEPTH)
    inside = (j < sizes.M)[:, None] & (e < sizes.E)[None, :]
    return tl.load(z + (bh * sizes.M + j)[:, None] * sizes.E + e[None, :], mask=inside, other=0.0)


@kernel
def read_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    output, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the queries
    references, queries_at, pooled, dropout,  # References, Segments, Pooled, Dropout
    H, L, stretch, splits, threshold,
    rule, sizes, cut,
):  # fmt: skip
    """`stretch` queries of one head."""
    bh = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = bh // H, bh % H
    stream, counter = dropout, bh
    if queries_at.first is not None:  # a segment of a packed batch has a seed of its own
        if dropout.seed is not None:
            stream, counter = Dropout(dropout.seed + b, dropout.keep_scale), h
    b, L = segment_of(queries_at, b, L)
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
    outputs = rows_of(output, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    g, seen = given_potential(pooled.g, bh, sizes)
    z_first = rounded(load_pooled(pooled.z, bh, 0, sizes, cut.VDEPTH), output.dtype.element_ty)
    shift = below_top(g, head.scale)
    columns = tl.arange(0, cut.VDEPTH)
    end = tl.minimum(L, (split + 1) * stretch)
    if not seen:
        store_zeros(outputs, split * stretch, end, sizes.E, cut.VDEPTH, sizes.EP, cut)
        end = split * stretch
    for start in range(split * stretch, end, cut.ROWS):
        rows = start + tl.arange(0, cut.ROWS)
        live = rows < end
        l, kappa, cosine, inverse, first_columns = token_logits(queries, rows, live, places, head, rule.DOT, sizes, cut)
        w = numerators(l, kappa, g, shift, head.scale, rule.RANGE)
        w, normaliser = kept_weights(w, stream, counter, L, rows, threshold, sizes)
        w = rounded(w, z_first.dtype)
        if sizes.EP == cut.VDEPTH:
            o = dot(w, z_first, cut.PRECISION) * normaliser[:, None]
            store_rows(outputs, rows, live, columns, sizes.E, o)
        else:
            for first in range(0, sizes.EP, cut.VDEPTH):
                z = rounded(load_pooled(pooled.z, bh, first, sizes, cut.VDEPTH), z_first.dtype)
                o = dot(w, z, cut.PRECISION) * normaliser[:, None]
                store_rows(outputs, rows, live, first + columns, sizes.E, o)


def seeds_of(x: Operands, queries_at: Segments | None) -> Tensor | None:
    """The seed; of a packed batch [N], that of every segment."""
    if x.seed is None or queries_at is None or queries_at.first is None:
        return x.seed
    return x.seed + queries_at.first


TILES_PER_PROGRAM = 4  # spreads the loads of references and pooled values over several tiles of queries


def read_range(x: Operands, opt: Options) -> str:
    """As `range_known`, from β and ε alone: a row's largest ℓ + g lies at most the spread of ℓ below the largest g."""
    known = range_known(x if x.log_b is None else replaced(x, log_b=None), opt)
    return known if known == "always" else "tile"


def read(
    x: Operands, opt: Options, prepared: References, z: Tensor, g: Tensor, queries_at: Segments | None = None
) -> Tensor:
    """o [B, H, L, E] in the dtype and memory order of the queries; of a packed batch, 0 where no segment is."""
    assert x.query is not None
    query, sizes, packed = unit_rows(x.query), sizes_of(x), queries_at is not None
    (b, h), l = z.shape[:2], query.shape[2]
    output = rows_like(x.query, sizes.E)
    device = device_of(query)
    kind = "row_placed" if sizes.P else "row"
    t = tile(kind, device.family, max(sizes.MP, sizes.DP, sizes.EP), query.element_size(), sizes.MP)
    stretch = max(l, 1) if packed else t.rows * TILES_PER_PROGRAM
    splits = max(1, math.ceil(l / stretch))
    if packed:
        output.rows.zero_()
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    step = stride_step(query, output.rows)
    rows = (*strided(query, step, packed), *strided(unit_rows(x.query_position), packed=packed))
    tokens = (*rows, *strided(output.rows, step, packed))
    groups = (prepared, queries_at or Segments(), Pooled(z, g, None), Dropout(seeds_of(x, queries_at), keep_scale))
    rule = rule_of(opt, read_range(x, opt))
    constants = {"rule": rule.compiled, "sizes": sizes.compiled, "cut": cut_of(t, sizes, device, step).compiled}
    launch(read_kernel, b * h * splits, (*tokens, *groups, h, l, stretch, splits, threshold), constants, t)
    return output.delivered()
