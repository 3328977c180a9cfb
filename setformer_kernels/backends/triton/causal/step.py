"""One token of each sequence on its state, in place: a program for each head reads and writes its state once.

The token is the first row of a tile as chunks have it; the other rows are not there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF
from ..device.rows import load_rows, rows_of, store_rows
from ..host.groups import cut_of, rule_of, sizes_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strided
from ..host.tiles import MIN_BLOCK, tile
from ..parameters.prepare import prepare
from .carried import common_units, faded, fading, floor_log2, log_of, power_of_two, taken_in
from .chunk import chunk_log_weights, query_weights
from .forward import with_unit_rows


@triton.jit
def column_at(state, column: tl.constexpr, sizes):
    """Where one number of each reference lies in a head's state [M, 2E + 3]."""
    return state + tl.arange(0, sizes.MP) * (2 * sizes.E + 3) + column


@kernel
def causal_step_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, 1, D], strides in units of cut.STEP
    key, stride_kb, stride_kh, stride_kn,  # [B, H, 1, D], likewise
    value, stride_vb, stride_vh, stride_vn,  # [B, H, 1, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, 1] or None
    log_decay, stride_gb, stride_gh, stride_gn,  # [B, H, 1] or None
    query_position, stride_sb, stride_sh, stride_sn,  # [B, H, 1, P] or None
    key_position, stride_pb, stride_ph, stride_pn,  # [B, H, 1, P] or None
    output, stride_ob, stride_oh, stride_on,  # [B, H, 1, E], as the queries
    references, states, indices,  # References, [N, H, M, 2E + 3], int32 [B] or None
    H, N,
    rule, sizes, cut,
):  # fmt: skip
    """One head of one sequence."""
    number = tl.program_id(0).to(tl.int64)
    b, h = number // H, number % H
    rows, j = tl.arange(0, cut.ROWS), tl.arange(0, sizes.MP)
    asked = rows < 1
    outputs = rows_of(output, b, h, stride_ob, stride_oh, stride_on, 1, cut.STEP)
    index = b
    if indices is not None:
        index = tl.load(indices + b).to(tl.int64)
    mine = (index >= 0) & (index < N)
    real = (j < sizes.M) & mine
    state = states + (tl.where(mine, index, 0) * H + h) * (sizes.M * (2 * sizes.E + 3))
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, 1, cut.STEP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, 1, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, 1, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, 1, 1) if log_a is not None else None
    asking = (
        places_of(query_position, references, b, h, stride_sb, stride_sh, stride_sn, sizes) if sizes.P > 0 else None
    )
    places = places_of(key_position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    log_b = tl.load(head.log_b + j)
    live, omega = chunk_log_weights(keys, masses, places, head, log_b, rows, 0.0, rule, sizes, cut)
    omega = tl.max(omega, 0)
    turns, fade = 0.0, 0.0
    if log_decay is not None:
        gates = rows_of(log_decay, b, h, stride_gb, stride_gh, stride_gn, 1, 1)
        turns, fade = fading(tl.load(gates.start))
    c, c_lost, k = (
        tl.load(column_at(state, sizes.E, sizes), mask=real, other=0.0),
        tl.load(column_at(state, 2 * sizes.E + 1, sizes), mask=real, other=0.0),
        tl.load(column_at(state, 2 * sizes.E + 2, sizes), mask=real, other=0.0),
    )
    c, c_lost = faded(c, c_lost, fade)
    peak = tl.ceil(omega)
    units = common_units(k + turns, c, peak)
    added = tl.exp2(omega - tl.where(peak == -INF, 0.0, peak))
    c, c_lost = taken_in(c, c_lost, added, units.scale, units.weight)
    shift = floor_log2(c)
    unit = power_of_two(-shift)
    c, c_lost, k = c * unit, c_lost * unit, tl.where(c > 0, units.k + shift, 0.0)
    l, kappa, cosine, inverse, first_columns = token_logits(queries, rows, asked, asking, head, rule.DOT, sizes, cut)
    w = query_weights(l, log_b, log_of(k, c, c_lost)[None, :], head.lam_b, rule.UPDATE_ROWS)
    w = tl.sum(tl.where(asked[:, None], w, 0.0), 0)
    total = c + c_lost
    reading = tl.where((total > 0) & mine, w / (tl.sum(w, 0) * tl.where(total > 0, total, 1.0)), 0.0)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        at = state + j[:, None] * (2 * sizes.E + 3) + e[None, :]
        inside = real[:, None] & (e < sizes.E)[None, :]
        n, n_lost = tl.load(at, mask=inside, other=0.0), tl.load(at + sizes.E + 1, mask=inside, other=0.0)
        v = tl.sum(load_rows(values, rows, live, e, sizes.E).to(tl.float32), 0)
        n, n_lost = faded(n, n_lost, fade)
        n, n_lost = taken_in(n, n_lost, v[None, :] * added[:, None], units.scale[:, None], units.weight[:, None])
        n, n_lost = n * unit[:, None], n_lost * unit[:, None]
        tl.store(at, n, mask=inside)
        tl.store(at + sizes.E + 1, n_lost, mask=inside)
        o = tl.sum((n + n_lost) * reading[:, None], 0)
        store_rows(outputs, rows, asked, e, sizes.E, tl.where(asked[:, None], o[None, :], 0.0))
    tl.store(column_at(state, sizes.E, sizes), c, mask=real)
    tl.store(column_at(state, 2 * sizes.E + 1, sizes), c_lost, mask=real)
    tl.store(column_at(state, 2 * sizes.E + 2, sizes), k, mask=real)


def step(x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, 1, E] of one token each; in place on `states` [N, H, M, 2E + 3], of which `rows` [B] says whose."""
    assert x.query is not None
    output = rows_like(x.query, x.value.shape[-1])
    x, sizes, device = with_unit_rows(x), sizes_of(x), device_of(x.key)
    assert x.query is not None
    t = tile("chunk", device.family, max(sizes.MP, sizes.DP, sizes.EP), x.key.element_size())._replace(rows=MIN_BLOCK)
    step = stride_step(x.query, x.key, x.value, output.rows)
    tokens = (x.query, x.key, x.value)
    gates = strided(log_decay)
    arguments = [number for token in tokens for number in strided(token, step)]
    arguments += [*strided(x.log_a), *gates, *strided(x.query_position), *strided(x.key_position)]
    arguments += [*strided(output.rows, step), prepare(x, opt), states, None if rows is None else rows.contiguous()]
    b, h = x.key.shape[:2]
    constants = {
        "rule": rule_of(opt).compiled,
        "sizes": sizes.compiled,
        "cut": cut_of(t, sizes, device, step).compiled,
    }
    launch(causal_step_kernel, b * h, (*arguments, h, states.shape[0]), constants, t)
    return output.delivered()
