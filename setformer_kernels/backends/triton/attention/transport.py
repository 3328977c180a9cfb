"""Keys onto references: one pass over the keys per Sinkhorn iteration, the last pooling the values as well.

    u = ℓ + g^{t−1},  m_s = max_j u_sj,  p = e^{u − m},  f_s = log a_s − λ_a (m_s + log Σ_j p_sj),
    c^t_j = LSE_s(ℓ_sj + f_s);  last:  z_j = Σ_s e^{ℓ_sj + f_s − c_j} v_s

The M references fit a tile, so the row update is local.  A program walks a stretch of the keys of one head and leaves
partial column sums (peak, total) [M], and at the last pass the pooled values in units of e^peak [M, E]; the next pass
merges the partial sums as it begins, `transport_finish_kernel` those of the last.  Sums run in a fixed order.

Defined by `reference.transport.sinkhorn` and `reference.transport.pool_weights`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_of, head_parameters
from ..device.logits import token_logits
from ..device.places import farthest, places_of
from ..device.plan import log_domain_weights, narrow_weights, potentials_narrow, range_known
from ..device.primitives import (
    INF,
    LN2,
    again,
    column_sum,
    dot,
    finite_or_zero,
    leading,
    log_sum,
    merged_log_sum,
    rounded,
)
from ..device.rows import key_mass, load_rows, rows_of, segment_of, uniform_mass
from ..host.groups import Segments, Sizes, cut_of, rule_of, sizes_of
from ..host.launch import Split, device_of, kernel, launch, split_tokens
from ..host.rows import log2_uniform, stride_step, strided, unit_rows
from ..host.tiles import Tile, tile
from ..parameters.prepare import References

BATCH = Segments()  # no packed one


class Sums(NamedTuple):
    """What the programs of a pass leave of Σ_s e^{ℓ+f}: total·2^peak, both [BH, splits, MP]."""

    peak: Tensor
    total: Tensor


@triton.jit
def walk_keys(
    keys, values, masses, places, head, g, e, start, end, uniform,
    NARROW: tl.constexpr, UPDATE_ROWS: tl.constexpr, POOL: tl.constexpr, DOT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """(peak, total [MP], sums [MP, VDEPTH]) of keys start..end: Σ e^{ℓ+f} = total·e^peak, Σ e^{ℓ+f} v = sums·e^peak."""
    MP: tl.constexpr = sizes.MP
    top = tl.max(g, 0)
    shift = g - top if UPDATE_ROWS else tl.zeros_like(g)
    peak = tl.full([MP], -INF, tl.float32)
    total = tl.zeros([MP], tl.float32)
    sums = tl.zeros([MP, e.shape[0]], tl.float32)
    # Where nothing is rescaled, sums over tokens can wait until after the loop: as long as registers last.
    DEFER: tl.constexpr = NARROW and MP <= 64
    tile = tl.zeros([cut.ROWS, MP], tl.float32) if DEFER else total
    # Beside sums of many references what is invariant in the loop stays there: held through it, it spills.
    for first in tl.range(start, end, cut.ROWS, disable_licm=POOL and MP > 64):
        rows = first + tl.arange(0, cut.ROWS)
        live, mass = key_mass(masses, rows, end, uniform)
        l, kappa, cosine, inverse, first_columns = token_logits(keys, rows, live, places, head, DOT, sizes, cut)
        if NARROW:
            # Without positions ℓ is κ/ε − 1/ε: one multiply-add with the shift.
            exponent = l + shift[None, :] if sizes.P > 0 else kappa * head.scale + (shift - head.scale)[None, :]
            weights = narrow_weights(exponent, mass, head.lam_a, UPDATE_ROWS)  # [BS, MP]
        else:
            weights, here = log_domain_weights(l, g, mass, head.lam_a, UPDATE_ROWS)
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
            v = load_rows(values, rows, live, e, sizes.E)
            high = leading(weights, v.dtype)
            if v.dtype != tl.float32:  # the backward subtracts ⟨dz, z⟩ from ⟨dz, v⟩: z needs all of its weights
                sums += dot(tl.trans(rounded(weights - high, v.dtype)), v, cut.PRECISION)
            sums += dot(tl.trans(rounded(high, v.dtype)), v, cut.PRECISION)
    if NARROW:
        total = column_sum(tile) if DEFER else total
        peak = tl.zeros_like(g)
        if UPDATE_ROWS:
            peak = tl.where(g > -INF, (1.0 - head.lam_a) * top - finite_or_zero(g), -INF)
    return peak, total, sums


@kernel
def transport_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    references, keys_at, before, after,  # References, Segments; Sums of iteration − 1, of this one
    pooled, c,  # [BH, splits, MP, EP], [B, H, iterations, M]
    H, S, stretch, splits, splits_before, iteration, iterations, uniform,
    FIRST: tl.constexpr, LAST: tl.constexpr, rule, sizes, cut,
):  # fmt: skip
    """Iteration t ≥ 1 (not UPDATE_ROWS: the one column sum of T = 0) over `stretch` keys of one head.

    The last iteration also pools; its programs each take VDEPTH columns of the values.
    """
    MP: tl.constexpr = sizes.MP
    v_blocks: tl.constexpr = sizes.EP // cut.VDEPTH if LAST else 1
    block = tl.program_id(0) % v_blocks
    split = tl.program_id(0) // v_blocks % splits
    bh = (tl.program_id(0) // (v_blocks * splits)).to(tl.int64)
    b, h = bh // H, bh % H
    uniform = uniform_mass(keys_at, b, uniform)
    b, S = segment_of(keys_at, b, S)
    j, e = tl.arange(0, MP), block * cut.VDEPTH + tl.arange(0, cut.VDEPTH)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    g = tl.load(head.log_b + j)  # [MP]
    if not FIRST:
        parts = bh * splits_before * MP
        old = merged_log_sum(before.peak + parts, before.total + parts, splits_before, MP)
        g -= head.lam_b * finite_or_zero(old)
        if (split == 0) & (block == 0):
            tl.store(c + (bh * iterations + iteration - 2) * sizes.M + j, old * LN2, mask=j < sizes.M)
    start, end = split * stretch, tl.minimum(S, (split + 1) * stretch)
    if rule.RANGE == "always":
        narrow = True
    elif rule.RANGE == "device":
        distance = head.tau * farthest(places, start, end, sizes) if sizes.P > 0 else 0.0
        narrow = potentials_narrow(g, head.beta, head.scale, sizes.M, distance)
    else:
        narrow = False
    if narrow:
        peak, total, sums = walk_keys(
            keys, values, masses, places, head, g, e, start, end, uniform,
            True, rule.UPDATE_ROWS, LAST, rule.DOT, sizes, cut,
        )  # fmt: skip
    else:
        peak, total, sums = walk_keys(
            keys, values, masses, places, head, g, e, start, end, uniform,
            False, rule.UPDATE_ROWS, LAST, rule.DOT, sizes, cut,
        )  # fmt: skip
    # Which program this is, anew: held through the walk, it spills (products as κ, Triton 3.9).
    place = again(tl.program_id(0))
    out = (place // v_blocks).to(tl.int64) * MP + j
    if place % v_blocks == 0:
        tl.store(after.peak + out, peak)
        tl.store(after.total + out, total)
    if LAST:
        tl.store(pooled + out[:, None] * sizes.EP + e[None, :], sums)


@kernel
def transport_finish_kernel(
    references, sums,  # References; Sums of the last pass
    pooled, c, g, z,  # [BH, splits, MP, EP], [B, H, iterations, M], [B, H, M], [B, H, M, E]
    H, splits, iterations,
    UPDATE_ROWS: tl.constexpr, sizes, ROWS: tl.constexpr,
):  # fmt: skip
    """The partial sums of the last pass, merged: c, g and z of ROWS references of a head."""
    M: tl.constexpr = sizes.M
    MP: tl.constexpr = sizes.MP
    bh = (tl.program_id(0) // (MP // ROWS)).to(tl.int64)
    row, e = tl.program_id(0) % (MP // ROWS) * ROWS + tl.arange(0, ROWS), tl.arange(0, sizes.EP)
    peak = tl.full([ROWS], -INF, tl.float32)
    for start in range(0, splits, 16):
        split = (start + tl.arange(0, 16))[:, None]
        part = tl.load(sums.peak + (bh * splits + split) * MP + row[None, :], mask=split < splits, other=-INF)
        peak = tl.maximum(peak, tl.max(part, 0))
    safe = finite_or_zero(peak)
    total = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, sizes.EP], tl.float32)
    # A few splits at a time: as many as a thread has loads under way.
    for start in range(0, splits, 8):
        split = (start + tl.arange(0, 8))[:, None]
        at, some = (bh * splits + split) * MP + row[None, :], split < splits
        weight = tl.exp2(tl.load(sums.peak + at, mask=some, other=-INF) - safe[None, :])  # [8, ROWS]
        total += tl.sum(tl.load(sums.total + at, mask=some, other=0.0) * weight, 0)
        part = tl.load(pooled + at[:, :, None] * sizes.EP + e[None, None, :], mask=some[:, :, None], other=0.0)
        value += tl.sum(part * weight[:, :, None], 0)
    last = log_sum(peak, total)
    tl.store(c + (bh * iterations + iterations - 1) * M + row, last * LN2, mask=row < M)
    h = bh % H
    dual = tl.load(references.log_b + h * MP + row)
    if UPDATE_ROWS:
        beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h)
        dual -= lam_b * finite_or_zero(last)
    tl.store(g + bh * M + row, tl.where(last > -INF, dual * LN2, -INF), mask=row < M)
    mean = tl.where((total > 0)[:, None], value / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    inside = (row < M)[:, None] & (e < sizes.E)[None, :]
    tl.store(z + (bh * M + row)[:, None] * sizes.E + e[None, :], mean, mask=inside)


FINISH = Tile(rows=2, depth=64, warps=2, stages=1)  # many programs: each waits for its splits, a few at a time


def transport(
    x: Operands, opt: Options, prepared: References, keys_at: Segments = BATCH
) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, E], g [B, H, M] and c [B, H, max(T, 1), M] of the keys and values; of a packed batch, B counts
    segments."""
    (b, h), sizes = x.key.shape[:2], sizes_of(x)
    b = b if keys_at.first is None else keys_at.first.shape[0]
    iterations, new = max(opt.num_iters, 1), x.references.new_empty
    z, g, c = new((b, h, sizes.M, sizes.E)), new((b, h, sizes.M)), new((b, h, iterations, sizes.M))
    split, sums, pooled = column_sums(x, opt, prepared, sizes, c, keys_at)
    constants = {"UPDATE_ROWS": opt.num_iters > 0, "sizes": sizes.compiled, "ROWS": FINISH.rows}
    args = (prepared, sums, pooled, c, g, z, h, split.programs, iterations)
    launch(transport_finish_kernel, b * h * sizes.MP // FINISH.rows, args, constants, FINISH)
    return z, g, c


def range_of_keys(x: Operands, opt: Options) -> str:
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


def column_sums(
    x: Operands, opt: Options, prepared: References, sizes: Sizes, c: Tensor, keys_at: Segments = BATCH
) -> tuple[Split, Sums, Tensor]:
    """Writes c^1..c^{T−1}; the last iteration's sums, and the pooled values in their units [BH, splits, MP, EP]."""
    key, value, position = unit_rows(x.key), unit_rows(x.value), unit_rows(x.key_position)
    (b, h), s, packed = c.shape[:2], key.shape[2], keys_at.first is not None
    device, known = device_of(key), range_of_keys(x, opt)
    across = warps_across(sizes.MP, known, key.element_size())
    kinds = ("column", "pooling") if known == "always" and not across else ("across", "across")
    widest = max(sizes.MP, sizes.DP, sizes.EP)
    t, pooling = (tile(kind, device.family, widest, key.element_size(), sizes.MP) for kind in kinds)
    whole = Split(max(s, 1), 1)  # segments of a packed batch are not split
    splits = [whole if packed else split_tokens(s, own, b * h, device.multiprocessors) for own in (t, pooling)]
    new = x.references.new_empty
    shape = (b * h, max(split.programs for split in splits), sizes.MP)
    before, after = Sums(new(shape), new(shape)), Sums(new(shape), new(shape))
    pooled = new((b * h, splits[1].programs, sizes.MP, sizes.EP))
    step = stride_step(key, value)
    cuts = [cut_of(own, sizes, device, step, across) for own in (t, pooling)]
    rows = (*strided(key, step, packed), *strided(value, step, packed))
    tokens = (*rows, *strided(x.log_a, packed=packed), *strided(position, packed=packed), prepared, keys_at)
    constants: dict[str, Any] = {"rule": rule_of(opt, known).compiled, "sizes": sizes.compiled}
    iterations, uniform = c.shape[2], log2_uniform(s)
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        blocks = sizes.EP // cuts[last].VDEPTH if last else 1
        counts = (h, s, *splits[last], splits[0].programs, iteration, iterations)
        args = (*tokens, before, after, pooled, c, *counts, uniform)
        variant = constants | {"FIRST": iteration == 1, "LAST": last, "cut": cuts[last].compiled}
        launch(transport_kernel, b * h * splits[last].programs * blocks, args, variant, pooling if last else t)
        before, after = after, before
    return splits[1], before, pooled
