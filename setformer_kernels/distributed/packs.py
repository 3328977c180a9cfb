"""Packed batches over ranks: segments that lie on one rank are its own, those that others share take passes over all.

A piece of the pack has at most two segments that it shares, its first and its last.  Passes over them are merged with
those of the same segment alone, so that what is sent does not depend on how many segments there are.  Scans of packs:
`causal_packs`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from ..grouping import folded, unfolded
from ..packed import attended
from ..problem import Operands, Options, replaced, with_an_absent_key
from .causal import cut
from .places import Places, spans
from .places import counters as counted
from .ranks import Communicator
from .shares import Several, read, share_of, transport


class Part(NamedTuple):
    """Rows of a rank's shard that are of one segment, number −1 if none, or of whole segments."""

    segment: int
    first: int
    last: int


class Piece(NamedTuple):
    """A piece of the pack: what it shares with others, and the segments between, which are whole."""

    head: Part
    whole: Part
    tail: Part
    at: int  # of its first row, in the pack


def piece_of(cu: tuple[int, ...], begin: int, end: int, row: int) -> Piece:
    """The piece begin .. end − 1 of a pack with offsets cu, which is from `row` on in the rank's shard."""
    none = Part(-1, row, row)
    if begin == end:
        return Piece(none, none, none, begin)
    first, last = bisect_right(cu, begin) - 1, bisect_right(cu, end - 1) - 1
    shared = [n for n in dict.fromkeys((first, last)) if cu[n] < begin or cu[n + 1] > end]
    head, tail, low, high = none, none, begin, end
    if first in shared:
        low = min(end, cu[first + 1])
        head = Part(first, row, row + low - begin)
    if last in shared and last != first:
        high = max(begin, cu[last])
        tail = Part(last, row + high - begin, row + end - begin)
    else:
        tail = Part(-1, row + end - begin, row + end - begin)
    return Piece(head, Part(-1, row + low - begin, row + high - begin), tail, begin)


def pieces_of(cu: tuple[int, ...], places: Places) -> list[list[Piece]]:
    """The pieces of each rank."""
    assert places.lengths is not None
    found = []
    for pieces in spans(places.lengths, places.layout):
        row, own = 0, []
        for begin, end in pieces:
            own.append(piece_of(cu, begin, end, row))
            row += end - begin
        found.append(own)
    return found


def attention(
    x: Operands, opt: Options, cu: tuple[int, ...], places: Places, ranks: Communicator
) -> Tensor:  # fmt: skip
    """o [1, H, T, E] of this rank's rows."""
    everybody = pieces_of(cu, places)
    mine = everybody[ranks.rank]
    shared = [part for piece in mine for part in (piece.head, piece.tail)]
    ids = tuple(part.segment for pieces in everybody for piece in pieces for part in (piece.head, piece.tail))
    parts = [cut(x, part.first, part.last) for part in shared]
    shares = [share_of(_keys(part, x), opt, _log_length(cu, at), ranks) for part, at in zip(parts, shared, strict=True)]
    z, g = transport(x, opt, Several(shares, ids), len(shares))
    found = []
    for i, part in enumerate(parts):
        numbers = counters(part, opt, cu, shared[i], mine[i // 2])
        found.append(_read(seeded(part, cu, shared[i]), opt, z[i : i + 1], g[i : i + 1], numbers))
    outputs = []
    for i, piece in enumerate(mine):
        inside = [_whole(x, opt, cu, piece)] if piece.whole.first < piece.whole.last else []
        outputs += [found[2 * i], *inside, found[2 * i + 1]]
    return torch.cat(outputs, 2)


def _keys(part: Operands, x: Operands) -> Operands:
    """The keys of a part; one without mass where there are none."""
    part = replaced(part, query=None, query_position=None)
    return with_an_absent_key(part) if part.key.shape[2] == 0 else part


def _log_length(cu: tuple[int, ...], part: Part) -> float:
    return 0.0 if part.segment < 0 else math.log(cu[part.segment + 1] - cu[part.segment])


def seeded(x: Operands, cu: tuple[int, ...], part: Part) -> Operands:
    """With the random numbers of the part's segment."""
    return x if x.seed is None or part.segment < 0 else replaced(x, seed=x.seed + cu[part.segment])


def _read(part: Operands, opt: Options, z: Tensor, g: Tensor, numbers: Tensor | None) -> Tensor:
    """o [1, H, l, E] of a part's queries."""
    assert part.query is not None
    if part.query.shape[1] == part.key.shape[1]:
        return read(part, opt, z, g, numbers)
    return unfolded(read(folded(part), opt, z, g, numbers), part.query)


def _whole(x: Operands, opt: Options, cu: tuple[int, ...], piece: Piece) -> Tensor:
    """o of the segments that a piece does not share."""
    own, local = between(x, cu, piece)
    return attended(own, opt, local, local, own.key.shape[2])


def between(x: Operands, cu: tuple[int, ...], piece: Piece) -> tuple[Operands, Tensor]:
    """The segments that a piece does not share, and their offsets; random numbers are those of rows in the pack."""
    rows = piece.whole
    at = piece.at + rows.first - piece.head.first
    end = at + rows.last - rows.first
    offsets = sorted({n - at for n in cu if at <= n <= end})
    own = cut(x, rows.first, rows.last)
    own = replaced(own, seed=None if x.seed is None else x.seed + at)
    return own, torch.tensor(offsets, device=x.key.device)


def counters(part: Operands, opt: Options, cu: tuple[int, ...], at: Part, piece: Piece) -> Tensor | None:
    """Where the weights of a part's queries stand among the random numbers of its segment."""
    if opt.dropout_p == 0.0:
        return None
    assert part.query is not None
    _, h, length, _ = part.query.shape
    first = piece.at + at.first - piece.head.first - cu[at.segment] if at.segment >= 0 else 0
    total = cu[at.segment + 1] - cu[at.segment] if at.segment >= 0 else 0
    rows = first + torch.arange(length, device=part.query.device)
    heads = (1, part.key.shape[1], h // part.key.shape[1])
    return counted(rows, total, heads, part.references.shape[1])
