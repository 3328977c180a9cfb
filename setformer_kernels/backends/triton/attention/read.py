"""Queries read the pooled values: one pass, o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g^T_j) z_j."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_parameters
from ..device.logits import load_references_t, token_logits
from ..device.plan import range_known
from ..device.primitives import LOG2E, dot, finite_or_zero, rounded
from ..device.softmax import dropout_constants, keep_mask
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strides, unit_rows
from ..host.tiles import padded, tile
from ..parameters.prepare import Prepared


@triton.jit
def dual_potential(log_b, c, bh, iterations, h, lam_b, M: tl.constexpr, MP: tl.constexpr, T_POSITIVE: tl.constexpr):
    """g^T = log b − λ_b c^T [MP] (T = 0: log b), −∞ where padded; c counts as 0 where no key takes part."""
    j = tl.arange(0, MP)
    g = tl.load(log_b + h * MP + j)
    if T_POSITIVE:
        last = tl.load(c + (bh * iterations + iterations - 1) * M + j, mask=j < M, other=0.0)
        g -= lam_b * finite_or_zero(last) * LOG2E
    return g


@triton.jit
def load_pooled(z, bh, start, M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, DEPTH: tl.constexpr):
    """Columns start.. of z of one head: [MP, DEPTH] in float32."""
    j, e = tl.arange(0, MP), start + tl.arange(0, DEPTH)
    inside = (j < M)[:, None] & (e < E)[None, :]
    return tl.load(z + (bh * M + j)[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def store_output(out, o, live, first, E: tl.constexpr, DEPTH: tl.constexpr):
    """Columns first.. of rows of the output."""
    e = first + tl.arange(0, DEPTH)
    tl.store(out + e[None, :], rounded(o, out.dtype.element_ty), mask=live[:, None] & (e < E)[None, :])


@kernel
def read_kernel(
    query, position, y, log_b, pi, parameters, c, z, seed, output,
    stride_qb, stride_qh, stride_qn, stride_pb, stride_ph, stride_pn, stride_ob, stride_oh, stride_on,
    H, L, stretch, splits, iterations, threshold, keep_scale,
    RANGE: tl.constexpr, T_POSITIVE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, DROPOUT: tl.constexpr, STEP: tl.constexpr,
    BL: tl.constexpr, DEPTH: tl.constexpr, VDEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`stretch` queries of one head."""
    bh = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = bh // H, bh % H
    beta, scale, lam_a, lam_b, tau = head_parameters(parameters, h)
    query += b * stride_qb * STEP + h * stride_qh * STEP
    output += b * stride_ob * STEP + h * stride_oh * STEP
    if P > 0:
        position += b * stride_pb + h * stride_ph
        pi += h * M * P
    y += h * MP * DP
    y_t = load_references_t(y, 0, MP, DP, DEPTH)
    z_first = rounded(load_pooled(z, bh, 0, M, MP, E, VDEPTH), output.dtype.element_ty)
    g = dual_potential(log_b, c, bh, iterations, h, lam_b, M, MP, T_POSITIVE)
    shift = g - scale - tl.max(g, 0)  # ℓ + g never exceeds the largest g
    end = tl.minimum(L, (split + 1) * stretch)
    for start in range(split * stretch, end, BL):
        rows = start + tl.arange(0, BL)
        live = rows < end
        l, kappa, cosine, inverse, first_columns = token_logits(
            query, rows, live, stride_qn * STEP, position, stride_pn, pi, y, y_t, beta, scale, tau,
            M, D, DP, DEPTH, P, DOT, PRECISION,
        )  # fmt: skip
        if RANGE == "always":
            w = tl.exp2(kappa * scale + shift[None, :])  # [BL, MP]
        else:
            u = l + g[None, :]
            w = tl.exp2(u - tl.max(u, 1)[:, None])
        normaliser = 1.0 / tl.sum(w, 1)
        if DROPOUT:
            keep = keep_mask(seed, bh, L, rows, M, MP, threshold)
            w = tl.where(keep, w, 0.0)
            normaliser *= keep_scale
        w = rounded(w, z_first.dtype)
        out = output + rows.to(tl.int64)[:, None] * stride_on * STEP
        if EP == VDEPTH:
            store_output(out, dot(w, z_first, PRECISION) * normaliser[:, None], live, 0, E, VDEPTH)
        else:
            for first in range(0, EP, VDEPTH):
                pooled = rounded(load_pooled(z, bh, first, M, MP, E, VDEPTH), z_first.dtype)
                store_output(out, dot(w, pooled, PRECISION) * normaliser[:, None], live, first, E, VDEPTH)


TILES_PER_PROGRAM = 4  # spreads the loads of references and pooled values over several tiles of queries


def read(x: Operands, opt: Options, prepared: Prepared, z: Tensor, c: Tensor) -> Tensor:
    """o [B, H, L, E] in the dtype and memory order of the queries."""
    assert x.query is not None
    query = unit_rows(x.query)
    position = None if x.query_position is None else unit_rows(x.query_position)
    (b, h, l, d), (m, e) = query.shape, z.shape[-2:]
    output = rows_like(x.query, e)
    device = device_of(query)
    _, mp, dp = prepared.y.shape
    ep = padded(e)
    cut = tile("row", device.family, max(mp, dp, ep), query.element_size())
    splits = max(1, math.ceil(l / (cut.rows * TILES_PER_PROGRAM)))
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    tensors = (query, position, prepared.y, prepared.log_b, prepared.position, prepared.parameters, c, z, x.seed)
    step = stride_step(query, output.rows)
    spans = (*strides(query, step), *strides(position), *strides(output.rows, step))
    counts = (h, l, cut.rows * TILES_PER_PROGRAM, splits, c.shape[2], threshold, keep_scale)
    constants = {
        "RANGE": range_known(x, opt), "T_POSITIVE": opt.num_iters > 0,
        "M": m, "MP": mp, "D": d, "DP": dp, "E": e, "EP": ep,
        "P": 0 if position is None else position.shape[-1], "DOT": opt.kernel == "dot",
        "DROPOUT": x.seed is not None, "STEP": step, "BL": cut.rows,
        "DEPTH": min(cut.depth, dp), "VDEPTH": min(cut.depth, ep), "PRECISION": device.precision,
    }  # fmt: skip
    launch(read_kernel, b * h * splits, (*tensors, output.rows, *spans, *counts), constants, cut)
    return output.delivered()
