"""The keys of a call, formed once and shared by all queries: e^{ℓ−m}, and what a key weighs before a query's mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, in_parts, rounded
from ..device.rows import key_mass, row_starts, rows_of
from ..host.launch import kernel, launch
from ..host.rows import stride_step, strided
from ..host.tiles import Tile
from .arguments import Arguments, pieces
from .masses import log_masses, mask_of
from .walks import Keys

SEEN = Tile(rows=64, depth=64, warps=4, stages=2)  # 64 × 64 masses are 32 numbers a thread


@kernel
def masked_seen_kernel(
    mask, stride_mb, stride_mh, stride_ml, stride_ms,  # [B or 1, H or 1, L, S] uint8 or log masses
    seen,  # [mask heads, S] uint8
    H, L, S, blocks,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Which of ROWS keys any query sees, of one head of the mask; H: heads of the mask in a batch element."""
    at = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    given = mask_of(mask, at // H, at % H, stride_mb, stride_mh, stride_ml, stride_ms)
    top, alike = tl.full([ROWS], -INF, tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, L, ROWS):
        rows = start + tl.arange(0, ROWS)
        top = tl.maximum(top, tl.max(log_masses(given, alike, rows, columns, L, S, CAUSAL), 0))
    tl.store(seen + at * S + columns, (top > -INF).to(tl.uint8), mask=columns < S)


@triton.jit
def key_weights(l, top, mass, live, head, UPDATE_ROWS: tl.constexpr, sizes):
    """(log2 of a key's mass with what its row maximum `top` leaves, the same for the first iteration, LSE_j(ℓ + log b)
    − top) [BS]; −∞ for keys that take no part."""
    log_b = tl.load(head.log_b + tl.arange(0, sizes.MP))
    u = l + log_b[None, :]
    most = tl.max(u, 1)
    lse = most + tl.log2(tl.sum(tl.exp2(u - most[:, None]), 1)) - top
    if UPDATE_ROWS:
        weight = tl.where(live, mass + (1.0 - head.lam_a) * top, -INF)
        first = weight - head.lam_a * lse
    else:
        weight = tl.where(live, mass + top, -INF)
        first = weight
    return weight, first, lse


@kernel
def masked_keys_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, S, D], strides in units of cut.STEP
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, S] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, S, P] or None
    seen, stride_sb, stride_sh, stride_sn,  # [B or 1, H or 1, S] uint8 or None
    references, keys,  # References, Keys
    H, S, blocks, first_head,
    rule, sizes, cut,
):  # fmt: skip
    """One tile of keys of one head."""
    at = (tl.program_id(0) // blocks).to(tl.int64)
    number = at + first_head
    b, h = number // H, number % H
    rows = tl.program_id(0) % blocks * cut.ROWS + tl.arange(0, cut.ROWS)
    tokens = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, S, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, S, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    inside = rows < S
    live, mass = key_mass(masses, rows, S, 0.0)
    if seen is not None:
        reached = rows_of(seen, b, h, stride_sb, stride_sh, stride_sn, S, 1)
        live &= tl.load(row_starts(reached, rows), mask=inside, other=0) != 0
    l, kappa, cosine, inverse, x = token_logits(tokens, rows, live, places, head, rule.DOT, sizes, cut)
    j = tl.arange(0, sizes.MP)
    real = (j < sizes.M)[None, :]
    top = tl.max(tl.where(real, l, -INF), 1)
    weight, first, lse = key_weights(l, top, mass, live, head, rule.UPDATE_ROWS, sizes)
    l = tl.where(real, l - top[:, None], -INF)
    place = (at * S + rows)[:, None] * sizes.MP + j[None, :]
    e = tl.where(live[:, None], tl.exp2(l), 0.0)
    tl.store(keys.exp + place, rounded(e, keys.exp.dtype.element_ty), mask=inside[:, None])
    if keys.rest is not None:
        high, rest = in_parts(e)
        tl.store(keys.rest + place, rest, mask=inside[:, None])
    if keys.logs is not None:
        tl.store(keys.logs + place, l, mask=inside[:, None])
    tl.store(keys.weight + at * S + rows, weight, mask=inside)
    tl.store(keys.first + at * S + rows, first, mask=inside)


def seen_keys(call: Arguments) -> Tensor | None:
    """Which keys any query sees [B or 1, H or 1, S], None where no mask has a say; the others are never read."""
    mask, (_, l, s) = call.mask, call.lengths
    if mask.tensor is None:
        return None
    seen = torch.empty((*mask.heads, s), dtype=torch.uint8, device=mask.tensor.device)
    n = pieces(s, SEEN.rows)
    args = (*mask.strided, seen, mask.heads[1], l, s, n)
    launch(
        masked_seen_kernel, mask.heads[0] * mask.heads[1] * n, args, {"CAUSAL": call.causal, "ROWS": SEEN.rows}, SEEN
    )
    return seen


def form_keys(call: Arguments, seen: Tensor | None, first_head: int, heads: int) -> Keys:
    """The keys of some heads."""
    x, sizes, (h, _, s) = call.x, call.sizes, call.lengths
    new, t = x.references.new_empty, call.tile("masked_keys")
    factor = torch.bfloat16 if x.key.element_size() == 2 else torch.float32
    keys = Keys(
        new((heads, s, sizes.MP), dtype=factor),
        new((heads, s, sizes.MP), dtype=factor) if call.far else None,
        None if call.always else new((heads, s, sizes.MP)),
        new((heads, s)),
        new((heads, s)),
    )
    constants, n = call.constants(t, x.key), pieces(s, t.rows)
    own = call.mask.heads
    strides = (0, 0, 0) if seen is None else (s * own[1] * (own[0] > 1), s * (own[1] > 1), 1)
    tokens = (*strided(x.key, stride_step(x.key)), *strided(x.log_a), *strided(x.key_position))
    args = (*tokens, seen, *strides, call.prepared, keys, h, s, n, first_head)
    launch(masked_keys_kernel, heads * n, args, constants, t)
    return keys
