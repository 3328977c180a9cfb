"""One token of each sequence on its state, in place: a program for each head reads and writes its state once.

The key is the first row of a tile as chunks have it; the other rows are not there.  Queries are those that share it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, dot
from ..device.rows import load_rows, rows_of, store_rows
from ..host.groups import cut_of, rule_of, sizes_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strided
from ..host.tiles import padded, tile
from ..parameters.prepare import prepare
from .carried import common_units, faded, fading, floor_log2, log_of, power_of_two, taken_in
from .chunk import chunk_log_weights, query_weights
from .forward import with_unit_rows

MOST_QUERIES = 64  # of one launch, which holds a row of M numbers for each


@triton.jit
def column_at(state, column: tl.constexpr, sizes):
    """Where one number of each reference lies in a head's state [M, 2E + 3]."""
    return state + tl.arange(0, sizes.MP) * (2 * sizes.E + 3) + column


@kernel
def causal_step_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, G, D], strides in units of cut.STEP
    key, stride_kb, stride_kh, stride_kn,  # [B, H, 1, D], likewise
    value, stride_vb, stride_vh, stride_vn,  # [B, H, 1, E], likewise
    log_a, stride_ab, stride_ah,  # [B, H, 1] or None
    log_decay, stride_gb, stride_gh,  # [B, H, 1] or None
    query_position, stride_sb, stride_sh, stride_sn,  # [B, H, G, P] or None
    key_position, stride_pb, stride_ph, stride_pn,  # [B, H, 1, P] or None
    output, stride_ob, stride_oh, stride_on,  # [B, H, G, E], as the queries
    references, states, indices,  # References, [N, H, M, 2E + 3], int32 [B] or None
    G, H, N,
    GROUPED: tl.constexpr, rule, sizes, cut,
):  # fmt: skip
    """One head of one sequence."""
    number = tl.program_id(0).to(tl.int64)
    b, h = number // H, number % H
    rows, j = tl.arange(0, cut.ROWS), tl.arange(0, sizes.MP)
    asked = rows < G
    outputs = rows_of(output, b, h, stride_ob, stride_oh, stride_on, G, cut.STEP)
    index = b
    if indices is not None:
        index = tl.load(indices + b).to(tl.int64)
    mine = (index >= 0) & (index < N)
    real = (j < sizes.M) & mine
    state = states + (tl.where(mine, index, 0) * H + h) * (sizes.M * (2 * sizes.E + 3))
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, G, cut.STEP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, 1, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, 1, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_ah, 1, 1) if log_a is not None else None
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
        gates = rows_of(log_decay, b, h, stride_gb, stride_gh, stride_gh, 1, 1)
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
    total = c + c_lost
    seen, total = (total > 0) & mine, tl.where(total > 0, total, 1.0)
    if GROUPED:
        reading = tl.where(seen[None, :], w / (tl.sum(w, 1)[:, None] * total[None, :]), 0.0)
    else:
        w = tl.sum(tl.where(asked[:, None], w, 0.0), 0)
        reading = tl.where(seen, w / (tl.sum(w, 0) * total), 0.0)
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
        if GROUPED:
            o = dot(reading, n + n_lost, cut.PRECISION)
        else:
            o = tl.where(asked[:, None], tl.sum((n + n_lost) * reading[:, None], 0)[None, :], 0.0)
        store_rows(outputs, rows, asked, e, sizes.E, o)
    tl.store(column_at(state, sizes.E, sizes), c, mask=real)
    tl.store(column_at(state, 2 * sizes.E + 1, sizes), c_lost, mask=real)
    tl.store(column_at(state, 2 * sizes.E + 2, sizes), k, mask=real)


def step(x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None) -> Tensor:
    """o [B, H, G, E] of one token each; in place on `states` [N, H, M, 2E + 3], of which `rows` [B] says whose.

    All G queries read the state that the key left.
    """
    assert x.query is not None
    output = rows_like(x.query, x.value.shape[-1])
    rows, groups = None if rows is None else rows.contiguous(), x.query.shape[2]
    x = with_unit_rows(x)
    if groups <= MOST_QUERIES:
        _step(x, opt, states, log_decay, rows, output.rows)
        return output.delivered()
    query, absent = x.query, x.references.new_full(x.key.shape[:3], -torch.inf)
    assert query is not None
    for first in range(0, groups, MOST_QUERIES):
        some = (slice(None), slice(None), slice(first, first + MOST_QUERIES))
        places = None if x.query_position is None else x.query_position[some]
        part = replaced(x, query=query[some], query_position=places)
        if first > 0:  # the key and its gate came with the first
            part, log_decay = replaced(part, log_a=absent), None
        _step(part, opt, states, log_decay, rows, output.rows[some])
    return output.delivered()


def _step(
    x: Operands, opt: Options, states: Tensor, log_decay: Tensor | None, rows: Tensor | None, output: Tensor
) -> None:
    """Writes o [B, H, G, E] of G ≤ MOST_QUERIES queries."""
    assert x.query is not None
    sizes, device, groups = sizes_of(x), device_of(x.key), x.query.shape[2]
    t = tile("step", device.family, max(sizes.MP, sizes.DP, sizes.EP), x.key.element_size(), sizes.MP)
    t = t._replace(rows=padded(groups))
    step = stride_step(x.query, x.key, x.value, output)
    tokens = (x.query, x.key, x.value)
    arguments = [number for token in tokens for number in strided(token, step)]
    arguments += [*strided(x.log_a)[:3], *strided(log_decay)[:3]]  # of one row
    arguments += [*strided(x.query_position), *strided(x.key_position)]
    arguments += [*strided(output, step), prepare(x, opt), states, rows]
    b, h = x.key.shape[:2]
    constants = {
        "GROUPED": groups > 1,
        "rule": rule_of(opt).compiled,
        "sizes": sizes.compiled,
        "cut": cut_of(t, sizes, device, step).compiled,
    }
    launch(causal_step_kernel, b * h, (*arguments, groups, h, states.shape[0]), constants, t)
