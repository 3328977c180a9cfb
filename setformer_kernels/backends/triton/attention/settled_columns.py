"""The plan's columns brought to sums of 1, in the backward pass of float32 tokens with positions.

Far from every reference a token's logits are thousands, and with relaxed marginals so is c: rounded, it is off by up to
2^−13, and Σ_s Q^t_sj = 1 by as much; z is pooled along a plan that other operations may have rounded otherwise.  What
so remains of sums over the keys that are 0, as Σ_s W^k_sj (⟨v_s, dz_j⟩ − ⟨dz_j, z_j⟩), squared distances multiply.  One
more pass over the keys takes the sums from the plan that the others will see.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ....problem import Operands
from ..device.gradients import sum_slots
from ..device.head import head_of, head_parameters, load_references_t
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.rows import key_mass, rows_of, segment_of, uniform_mass
from ..host.groups import Cut, Rule, sizes_of
from ..host.launch import Split, kernel, launch
from ..host.tiles import Tile
from ..parameters.prepare import References
from .plan_backward import COLUMNS, State, column_gradient, key_value_products, load_columns, plan_terms

SUMS = tl.constexpr(2)  # vectors [MP] of an iteration: Σ_s Q^t_sj, and of the last Σ_s W^k_sj ⟨v_s, dz_j⟩
MERGE = Tile(rows=16, depth=0, warps=4, stages=1)


@kernel
def transport_settle_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, S, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P]
    references, state,  # References, State
    parts,  # [BH, iterations, splits, SUMS, MP]
    H, S, stretch, splits, iterations,
    rule, sizes, cut,
):  # fmt: skip
    """Parts of one iteration's sums over `stretch` keys of one head."""
    MP: tl.constexpr = sizes.MP
    split = tl.program_id(0) % splits
    at = (tl.program_id(0) // splits).to(tl.int64)
    bh, last = at // iterations, at % iterations == iterations - 1
    b, h = bh // H, bh % H
    uniform = uniform_mass(state, b, state.uniform)
    b, S = segment_of(state, b, S)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes)
    head, column = head_of(references, h, sizes, cut), load_columns(state, at, sizes)
    d_z = state.d_z + bh * MP * sizes.EP
    d_z_t = load_references_t(d_z, 0, MP, sizes.EP, cut.VDEPTH)
    sent, pooled = tl.zeros([MP], tl.float32), tl.zeros([MP], tl.float32)
    end = tl.minimum(S, (split + 1) * stretch)
    for start in tl.range(split * stretch, end, cut.ROWS, disable_licm=rule.DOT):
        rows = start + tl.arange(0, cut.ROWS)
        live, mass = key_mass(masses, rows, end, uniform)
        l, kappa, cosine, inverse, x = token_logits(keys, rows, live, places, head, rule.DOT, sizes, cut)
        p, r, lse, first = plan_terms(kappa, l, mass, head, column, rule, sizes)
        sent += tl.sum(first, 0)
        if last:
            v_dz = key_value_products(values, rows, live, d_z, d_z_t, sizes, cut)
            pooled += tl.sum(first * v_dz, 0)
    out = parts + (at * splits + split) * (SUMS * MP) + tl.arange(0, MP)
    tl.store(out, sent)
    tl.store(out + MP, pooled)


@kernel
def transport_settled_backward_kernel(
    references, state,  # References, State
    parts,  # as above
    H, splits, iterations,
    rule, sizes,
):  # fmt: skip
    """The second factors of one iteration's Q, and the offsets of the last, from the sums of all splits."""
    MP: tl.constexpr = sizes.MP
    j = tl.arange(0, MP)
    at = tl.program_id(0).to(tl.int64)
    bh = at // iterations
    sent = sum_slots(parts, at, 0, 1, splits, splits, SUMS * MP, j, j < MP)
    left = tl.where(sent > 0, 1.0 / tl.where(sent > 0, sent, 1.0), 1.0)
    second = state.columns + at * (COLUMNS * MP) + 2 * MP + j
    tl.store(second, tl.load(second) * left)
    if at % iterations == iterations - 1:
        beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, bh % H)
        d_g = tl.load(state.d_g + at * MP + j)
        d_c = column_gradient(d_g if rule.UPDATE_ROWS else d_g * 0.0, state, at, lam_b, sizes)
        pooled = sum_slots(parts, at, 0, 1, splits, splits, SUMS * MP, j + MP, j < MP)
        tl.store(state.offset + bh * MP + j, pooled * left * tl.load(state.use_values + bh) - d_c)


def settle_columns(
    x: Operands, prepared: References, merged: State, tokens: tuple[Any, ...], split: Split, rule: Rule, cut: Cut,
    t: Tile,
) -> None:  # fmt: skip
    """Brings the columns of `merged` to sums of 1, with the offsets that then are their means."""
    sizes, (heads, iterations, _) = sizes_of(x), merged.d_g.shape
    parts: Tensor = x.references.new_empty((heads, iterations, split.programs, SUMS.value, sizes.MP))
    h, s = x.key.shape[1:3]
    constants = {"rule": rule.compiled, "sizes": sizes.compiled}
    args = (*tokens, prepared, merged, parts, h, s, *split, iterations)
    programs = heads * iterations * split.programs
    launch(transport_settle_backward_kernel, programs, args, constants | {"cut": cut.compiled}, t)
    args = (prepared, merged, parts, h, split.programs, iterations)
    launch(transport_settled_backward_kernel, heads * iterations, args, constants, MERGE)
