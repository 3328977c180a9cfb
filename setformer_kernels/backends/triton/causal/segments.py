"""The scan of a packed batch, whose segments' bundles are a table: each segment adds up its own, one after the other.

Chunks and bundles count from the first token of their segment, so a segment has the bits that it has alone.  Each
bundle has room for all of its chunks, and a batch for as many bundles as any segments of its tokens can have: no size
depends on the offsets, which stay on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from ..host.groups import Sizes
from ..host.launch import kernel
from ..host.packed import segments_of
from .carried import begun, store_state, with_bundle


class Pack(NamedTuple):
    """Where the chunks and bundles of a packed batch's segments lie, on the device."""

    counts: Tensor  # [bundles] int32: chunks of each
    starts: Tensor  # [N + 1] int32: the first bundle of each segment
    firsts: Tensor  # [chunks] int64: the first row of the segment that has the chunk
    lengths: Tensor  # [chunks] int32: how many rows that has; 0 where there is no such chunk
    numbers: Tensor  # [chunks] int32: which of the segment's chunks it is
    rows: Tensor  # [chunks · BC] int64: the row of each place in a chunk, −1 where there is none
    places: Tensor  # [T] int64: the place of each row, −1 where it is no segment's

    @property
    def segments(self) -> int:
        """N."""
        return self.starts.shape[0] - 1


class Ends(NamedTuple):
    """What the segments of a packed batch begin and end with, None where nobody asks."""

    final: Tensor | None  # [N, H, M, 2E + 3] written: the states after segments that have tokens
    d_final: Tensor | None = None  # [N, H, M, 2E + 3] their gradient
    left_o: Tensor | None = None  # [N, H, MP, EP] and the following written: what reaches the first chunk's beginning
    left_c: Tensor | None = None  # [N, H, MP]


def pack_of(cu: Tensor, total: int, rows: int, bundle: int) -> Pack:
    """Of offsets [N + 1] with N ≥ 1 in chunks of so many rows, of which so many are a bundle."""
    at = segments_of(cu, total)
    first_row, count = at.first, at.length
    assert first_row is not None
    assert count is not None
    tokens, n = rows * bundle, cu.shape[0] - 1
    starts = F.pad(((count + (tokens - 1)) // tokens).cumsum(0), (1, 0))
    index = torch.arange(math.ceil(total / tokens) + n, device=cu.device)
    segment = torch.searchsorted(starts[1:], index, right=True)
    there, segment = segment < n, segment.clamp_max(n - 1)
    first, length = first_row[segment], count[segment]  # [bundles]
    number = (index - starts[segment])[:, None] * bundle + torch.arange(bundle, device=cu.device)  # [bundles, bundle]
    there = there[:, None] & (number * rows < length[:, None])
    inside = number.unsqueeze(2) * rows + torch.arange(rows, device=cu.device)  # [bundles, bundle, rows]
    real = there.unsqueeze(2) & (inside < length[:, None, None])
    row = torch.where(real, first[:, None, None] + inside, -1).flatten()
    place = torch.where(row >= 0, torch.arange(row.shape[0], device=cu.device), -1)
    places = place.new_full((total + 1,), -1).scatter_(0, torch.where(row >= 0, row, total), place)  # the last: of none
    lengths = torch.where(there, length[:, None], 0)
    return Pack(
        there.sum(1).int(), starts.int(), first[:, None].expand(number.shape).flatten().contiguous(),
        lengths.flatten().int(), number.flatten().int(), row, places[:total],
    )  # fmt: skip


def ends_of(cu: Tensor, sizes: Sizes, like: Tensor, d_state: Tensor | None, d_initial: Tensor | None) -> Ends:
    """What the backward pass of N segments needs at their ends; like [H, ..] float32."""
    n, h = cu.shape[0] - 1, like.shape[0]
    final = None if d_state is None else like.new_zeros((n, h, sizes.M, 2 * sizes.E + 3))
    left = None if d_initial is None else like.new_zeros((n, h, sizes.MP, sizes.EP))
    left_c = None if left is None else left.new_zeros(left.shape[:3])
    return Ends(final, None if d_state is None else d_state.contiguous(), left, left_c)


@kernel
def causal_segments_kernel(
    bundles, pack, ends, decay, initial, passed,  # as `causal_carry_kernel`; Pack, Ends; [N, H, M, 2E + 3] or None
    first_head, first_chunk, all_chunks, chunks, stretch, stretches, H, N,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`causal_carry_kernel` of one segment, as far as its bundles are in this stretch.

    One segment at most goes on from the stretch before, and one at most into the next.
    """
    blocks: tl.constexpr = MP // COLUMNS
    at_segment = (tl.program_id(0) // blocks).to(tl.int64)
    bh, segment = at_segment // N, at_segment % N
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    before, many = first_chunk // BUNDLE, chunks // BUNDLE  # bundles
    begin, end = tl.load(pack.starts + segment), tl.load(pack.starts + segment + 1)
    first, last = tl.maximum(begin, before), tl.minimum(end, before + many)
    if first < last:
        real, follows = column < M, (tl.zeros_like(column) + begin) < before
        handed = (bh * stretches + (stretch + stretches - 1) % stretches) * M + column
        given = (segment * H + bh + first_head) * M + column
        n, n_lost, c, c_lost, k = begun(passed, handed, initial, given, follows, real, e, E)
        for bundle in tl.range(first, last, num_stages=STAGES):
            at = (bh * many + bundle - before) * MP + column
            numbers = at[:, None] * EP + e[None, :]
            a_n, a_c, a_k = tl.load(bundles.n + numbers), tl.load(bundles.c + at), tl.load(bundles.k + at)
            tl.store(bundles.n + numbers, n + n_lost)
            tl.store(bundles.before_c + at, c + c_lost)
            tl.store(bundles.before_k + at, k)
            gate = (bh + first_head) * all_chunks + bundle * BUNDLE + tl.load(pack.counts + bundle) - 1
            n, n_lost, c, c_lost, k = with_bundle(n, n_lost, c, c_lost, k, a_n, a_c, a_k, decay, gate)
        if end > before + many:
            here = (bh * stretches + stretch % stretches) * M + column
            store_state(passed, here, n, n_lost, c, c_lost, k, real, e, E)
        else:
            if ends.final is not None:
                store_state(ends.final, given, n, n_lost, c, c_lost, k, real, e, E)


@kernel
def causal_segments_backward_kernel(
    bundles, pack, ends, passed_o, passed_c,  # as `causal_carry_backward_kernel`, the latter [2, heads, MP, EP], ..
    first_head, first_chunk, heads, chunks, stretch, H, N,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`causal_carry_backward_kernel` of one segment, as far as its bundles are in this stretch."""
    blocks: tl.constexpr = MP // COLUMNS
    at_segment = (tl.program_id(0) // blocks).to(tl.int64)
    bh, segment = at_segment // N, at_segment % N
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    before, many = first_chunk // BUNDLE, chunks // BUNDLE  # bundles
    begin, end = tl.load(pack.starts + segment), tl.load(pack.starts + segment + 1)
    first, last = tl.maximum(begin, before), tl.minimum(end, before + many)
    if first < last:
        given = segment * H + bh + first_head
        real, more = column < M, (tl.zeros_like(column) + end) > before + many
        inside = (e < E)[None, :] & real[:, None]
        at = (((stretch + 1) % 2 * heads) + bh) * MP + column
        r_o = tl.load(passed_o + at[:, None] * EP + e[None, :], mask=more[:, None] & (e >= 0)[None, :], other=0.0)
        r_c = tl.load(passed_c + at, mask=more, other=0.0)
        if ends.d_final is not None:  # in units of C at the end
            at, of_state = (given * M + column) * (2 * E + 3), real & (more == 0)
            c = tl.load(ends.final + at + E, mask=of_state, other=0.0)
            c += tl.load(ends.final + at + 2 * E + 1, mask=of_state, other=0.0)
            d_n = ends.d_final + at[:, None] + e[None, :]
            r_o += tl.load(d_n, mask=inside & of_state[:, None], other=0.0) * c[:, None]
            r_c += tl.load(ends.d_final + at + E, mask=of_state, other=0.0) * c
        for step in tl.range(0, last - first, num_stages=STAGES):
            at = (bh * many + last - 1 - step - before) * MP + column
            numbers = at[:, None] * EP + e[None, :]
            b_o, b_c, p = tl.load(bundles.n + numbers), tl.load(bundles.c + at), tl.load(bundles.k + at)
            tl.store(bundles.n + numbers, r_o)
            tl.store(bundles.before_c + at, r_c)
            r_o, r_c = b_o + r_o * p[:, None], b_c + r_c * p
        if begin < before:
            at = ((stretch % 2 * heads) + bh) * MP + column
            tl.store(passed_o + at[:, None] * EP + e[None, :], r_o)
            tl.store(passed_c + at, r_c)
        else:
            if ends.left_o is not None:
                at = given * MP + column
                tl.store(ends.left_o + at[:, None] * EP + e[None, :], r_o)
                tl.store(ends.left_c + at, r_c)
