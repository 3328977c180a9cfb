"""Keys onto references to convergence: a pass at given potentials, and iterations that stop head by head.

A pass forms c, D and A = PᵀR of `device/linearised.py` from logits that it makes of the keys.  An iteration is two
launches: the column sums of a stretch of the keys, as `transport.py` has them, and what merges them to g and sees how
far that moved.  Whether a head still runs is read on the device: programs of one that does not read no key.

Defined by `reference.converged.system.passed` and `reference.transport.sinkhorn`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_of, head_parameters
from ..device.linearised import add_rows, empty_parts, finish_linearised, gram_width, store_linearised, without_rows
from ..device.logits import token_logits
from ..device.places import farthest, places_of
from ..device.plan import potentials_narrow
from ..device.primitives import INF, LN2, LOG2E, again, distance, merged_log_sum, potential
from ..device.rows import key_mass, rows_of
from ..host.groups import cut_of, rule_of, sizes_of
from ..host.launch import device_of, kernel, launch, split_tokens
from ..host.rows import log2_uniform, stride_step, strided, unit_rows
from ..host.tiles import Tile, tile
from ..parameters.prepare import prepare
from .transport import Sums, range_of_keys, walk_keys, warps_across


@kernel
def linearised_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    references, running, g, s, f, parts,  # References, [BH] int32 or None, [BH, M], [BH, S] twice, Parts
    H, S, stretch, splits, uniform,
    DOT: tl.constexpr, WIDTH: tl.constexpr, sizes, cut,
):  # fmt: skip
    """`stretch` keys of one head, and WIDTH columns of its A."""
    MP: tl.constexpr = sizes.MP
    blocks: tl.constexpr = MP // WIDTH
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    bh = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    b, h, j = bh // H, bh % H, tl.arange(0, MP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    dual = tl.load(g + bh * sizes.M + j, mask=j < sizes.M, other=-INF) * LOG2E
    start, end = split * stretch, tl.minimum(S, (split + 1) * stretch)
    if running is not None:
        end = tl.where(tl.load(running + bh) != 0, end, start)
    sums = without_rows(MP, WIDTH)
    for first in range(start, end, cut.ROWS):
        rows = first + tl.arange(0, cut.ROWS)
        live, mass = key_mass(masses, rows, end, uniform)
        l, kappa, cosine, inverse, first_columns = token_logits(keys, rows, live, places, head, DOT, sizes, cut)
        own_s, own_f, sums = add_rows(sums, l, dual, mass, head.lam_a, block, 1.0, WIDTH, cut.PRECISION)
        if block == 0:
            tl.store(s + bh * S + rows, own_s * LN2, mask=rows < end)
            tl.store(f + bh * S + rows, own_f * LN2, mask=rows < end)
    # The program anew: held through the loop, it spills (Triton 3.6).
    place = again(tl.program_id(0))
    store_linearised(parts, (place // blocks).to(tl.int64), place % blocks, sums, MP, WIDTH)


def linearised(x: Operands, opt: Options, g: Tensor, running: Tensor | None) -> tuple[Tensor, ...]:
    """s and f [BH, S], c and D [BH, M], A [BH, M, M] from g [BH, M]; nothing of heads that do not run [BH]."""
    prepared, sizes = prepare(x, opt), sizes_of(x)
    key, position = unit_rows(x.key), unit_rows(x.key_position)
    (b, h, n), device, width = key.shape[:3], device_of(key), gram_width(sizes.MP)
    t = tile("linearised", device.family, max(sizes.MP, sizes.DP), key.element_size())
    split = split_tokens(n, t, b * h * sizes.MP // width, device.multiprocessors)
    step = stride_step(key)
    s, f, parts = g.new_empty((b * h, n)), g.new_empty((b * h, n)), empty_parts(g, sizes.MP, split)
    flags = None if running is None else running.reshape(-1).to(torch.int32)
    rows = (*strided(key, step), *strided(x.log_a), *strided(position))
    args = (*rows, prepared, flags, g.contiguous(), s, f, parts, h, n, *split, log2_uniform(n))
    constants: dict[str, Any] = {"DOT": opt.kernel == "dot", "WIDTH": width, "sizes": sizes.compiled}
    constants["cut"] = cut_of(t, sizes, device, step, t.across).compiled
    launch(linearised_kernel, b * h * split.programs * sizes.MP // width, args, constants, t)
    return s, f, *finish_linearised(parts, sizes.M, 1.0)


@kernel
def columns_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    references, running, g, sums,  # References, [BH] int32, [BH, M], Sums
    H, S, stretch, splits, uniform,
    rule, sizes, cut,
):  # fmt: skip
    """The column sums of one iteration over `stretch` keys of one head."""
    MP: tl.constexpr = sizes.MP
    split = tl.program_id(0) % splits
    bh = (tl.program_id(0) // splits).to(tl.int64)
    b, h, j = bh // H, bh % H, tl.arange(0, MP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    dual = tl.load(g + bh * sizes.M + j, mask=j < sizes.M, other=-INF) * LOG2E
    start, end = split * stretch, tl.minimum(S, (split + 1) * stretch)
    reached = tl.max(dual, 0) > -INF  # but where there is no key at all
    dual = tl.where(reached, dual, 0.0)
    end = tl.where((tl.load(running + bh) != 0) & reached, end, start)
    narrow, e = False, tl.arange(0, 16)  # of values nothing is asked
    if rule.RANGE == "device":
        far = head.tau * farthest(places, start, end, sizes) if sizes.P > 0 else 0.0
        narrow = potentials_narrow(dual, head.beta, head.scale, sizes.M, far)
    if narrow:
        peak, total, none = walk_keys(
            keys, keys, masses, places, head, dual, e, start, end, uniform, True, True, False, rule.DOT, sizes, cut
        )
    else:
        peak, total, none = walk_keys(
            keys, keys, masses, places, head, dual, e, start, end, uniform, False, True, False, rule.DOT, sizes, cut
        )
    out = (bh * splits + split) * MP + j
    tl.store(sums.peak + out, peak)
    tl.store(sums.total + out, total)


@kernel
def columns_finish_kernel(
    references, sums,  # References, Sums
    g, running, iters,  # [BH, M], [BH] int32, [BH] int64
    H, splits, step, tol,
    sizes,
):  # fmt: skip
    """g after an iteration, of a head that still runs, and whether it goes on: g moved by more than tol."""
    MP: tl.constexpr = sizes.MP
    bh = tl.program_id(0).to(tl.int64)
    h, j = bh % H, tl.arange(0, MP)
    parts = bh * splits * MP
    log_total = merged_log_sum(sums.peak + parts, sums.total + parts, splits, MP)
    beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h)
    log_b = tl.load(references.log_b + h * MP + j)
    old = tl.load(g + bh * sizes.M + j, mask=j < sizes.M, other=-INF)
    new = potential(log_b, lam_b, log_total) * LN2
    now = tl.load(running + bh) != 0
    tl.store(g + bh * sizes.M + j, new, mask=now & (j < sizes.M))
    tl.store(iters + bh, step.to(tl.int64), mask=now)
    moved = tl.max(tl.where(j < sizes.M, distance(new, old), 0.0), 0)
    tl.store(running + bh, (moved > tol).to(tl.int32), mask=now)


COLUMNS_FINISH = Tile(rows=16, depth=0, warps=4, stages=1)


def iterated(x: Operands, opt: Options, g: Tensor, tol: float | None) -> tuple[Tensor, Tensor]:
    """g [BH, M] after at most T iterations from g, and how many each head has run [BH]."""
    prepared, sizes = prepare(x, opt), sizes_of(x)
    key, position = unit_rows(x.key), unit_rows(x.key_position)
    (b, h, n), device = key.shape[:3], device_of(key)
    known = range_of_keys(x, opt)
    known = "device" if known == "always" else known  # any potentials may be given
    across = warps_across(sizes.MP, known, key.element_size())
    t = tile("across", device.family, max(sizes.MP, sizes.DP), key.element_size())
    split, step = split_tokens(n, t, b * h, device.multiprocessors), stride_step(key)
    g, new = g.clone(memory_format=torch.contiguous_format), g.new_empty
    sums = Sums(*(new((b * h, split.programs, sizes.MP)) for _ in range(2)))
    running, iters = (torch.ones(b * h, dtype=kind, device=key.device) for kind in (torch.int32, torch.int64))
    rows, limit = (*strided(key, step), *strided(x.log_a), *strided(position), prepared), -1.0 if tol is None else tol
    constants: dict[str, Any] = {"sizes": sizes.compiled}
    more = {"rule": rule_of(opt, known).compiled, "cut": cut_of(t, sizes, device, step, across).compiled}
    for iteration in range(1, opt.num_iters + 1):
        args = (*rows, running, g, sums, h, n, *split, log2_uniform(n))
        launch(columns_kernel, b * h * split.programs, args, constants | more, t)
        args = (prepared, sums, g, running, iters, h, split.programs, iteration, limit)
        launch(columns_finish_kernel, b * h, args, constants, COLUMNS_FINISH)
    return g, iters
