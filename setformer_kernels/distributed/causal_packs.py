"""Causal packs over ranks: every segment goes on from what the pieces before it have of it, and leaves a state.

What is sent for the scans is one state of a piece, however many segments there are; states that are wanted are those
of all segments, on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..packed import causal_pack
from ..problem import Operands, Options, Stream, replaced
from .causal import attended, cut, form_of, own_sums, prefixes_of
from .packs import Part, Piece, between, counters, pieces_of, seeded
from .places import Places
from .prefixes import gathered
from .ranks import Communicator


def causal(
    x: Operands, opt: Options, stream: Stream, cu: tuple[int, ...], places: Places, ranks: Communicator, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """o [1, H, T, E] of this rank's rows, where queries see the keys before them, and the states [N, Hk, M, 2E + 3]
    after the last keys, where `wanted`.

    stream: this rank's gates [1, Hk, T], and the states before the first keys of all segments."""
    pieces = pieces_of(cu, places)
    mine = pieces[ranks.rank]
    prefixes = _prefixes(x, opt, stream, cu, pieces, ranks)
    outputs: list[Tensor] = []
    ended: list[Tensor] = []
    for at, piece in enumerate(mine):
        before = prefixes[:, :, at] if _continues(cu, piece) else _first(stream, piece.head, prefixes[:, :, at])
        o, state = _scanned(x, opt, stream, cu, piece, piece.head, before, wanted)
        outputs.append(o)
        if state is not None and piece.head.segment in _ends(cu, piece):
            ended.append(state)
        if piece.whole.first < piece.whole.last:
            o, states = _of_whole(x, opt, stream, cu, piece, wanted)
            outputs.append(o)
            ended.append(states)
        before = _first(stream, piece.tail, torch.zeros_like(before))
        outputs.append(_scanned(x, opt, stream, cu, piece, piece.tail, before, False)[0])
    o = torch.cat(outputs, 2)
    if not wanted:
        return o, None
    # every rank takes part in the backward pass, also one on which none ends
    empty = torch.zeros_like(prefixes[0, :, 0]) + o[..., :0].sum().to(prefixes.dtype)
    return o, _all_states(empty, stream, ended, cu, pieces, ranks)


def _prefixes(
    x: Operands, opt: Options, stream: Stream, cu: tuple[int, ...], pieces: list[list[Piece]], ranks: Communicator
) -> Tensor:
    """What the segments that this rank's pieces go on with have before them, [1, Hk, pieces, M, 2E + 3]."""
    gates, initial = stream
    offset, sums, plain = math.log(max(cu[-1], 1)), [], False
    for piece in pieces[ranks.rank]:
        left = _left(cu, piece)
        part = replaced(cut(x, left.first, left.last), query=None, query_position=None)
        own, plain = own_sums(part, opt, _rows(gates, left), offset, ranks)
        sums.append(own)
    everybody = _in_order(pieces)
    form = form_of(x, len(sums), gates, offset)._replace(
        firsts=tuple(piece.head.segment if _continues(cu, piece) else -1 for piece in everybody),
        lasts=tuple(_left(cu, piece).segment for piece in everybody),
    )
    return prefixes_of(torch.cat(sums, -1), plain, initial, form, opt, ranks, False)[0]


def _in_order(pieces: list[list[Piece]]) -> list[Piece]:
    """The pieces of all ranks as the pack has them."""
    return [of_rank[0] for of_rank in pieces] + [of_rank[1] for of_rank in reversed(pieces) if len(of_rank) > 1]


def _left(cu: tuple[int, ...], piece: Piece) -> Part:
    """What a piece has of a segment that goes on after it; nothing where none does."""
    end = piece.at + piece.tail.last - piece.head.first
    if piece.tail.segment >= 0:
        return piece.tail
    if piece.head.segment >= 0 and cu[piece.head.segment + 1] > end:
        return piece.head
    return Part(-1, piece.head.first, piece.head.first)


def _continues(cu: tuple[int, ...], piece: Piece) -> bool:
    """Whether a piece begins inside a segment."""
    return piece.head.segment >= 0 and cu[piece.head.segment] < piece.at


def _ends(cu: tuple[int, ...], piece: Piece) -> list[int]:
    """The segments with tokens whose last one a piece has."""
    end = piece.at + piece.tail.last - piece.head.first
    return [n for n in range(len(cu) - 1) if cu[n] < cu[n + 1] and piece.at < cu[n + 1] <= end]


def _rows(gates: Tensor | None, part: Part) -> Tensor | None:
    return None if gates is None else gates[:, :, part.first : part.last]


def _first(stream: Stream, part: Part, nothing: Tensor) -> Tensor:
    """The state [1, Hk, M, 2E + 3] that the segment of a part begins with."""
    if stream.initial_state is None or part.segment < 0:
        return nothing
    return stream.initial_state[part.segment : part.segment + 1] + 0 * nothing


def _scanned(
    x: Operands, opt: Options, stream: Stream, cu: tuple[int, ...], piece: Piece, part: Part, before: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o [1, H, l, E] of a part that goes on from a state, and the state after it where that is wanted."""
    own = seeded(cut(x, part.first, part.last), cu, part)
    numbers = counters(own, opt, cu, part, piece)
    return attended(own, opt, Stream(_rows(stream.log_decay, part), before), numbers, wanted)


def _of_whole(
    x: Operands, opt: Options, stream: Stream, cu: tuple[int, ...], piece: Piece, wanted: bool
) -> tuple[Tensor, Tensor]:
    """o of the segments that a piece does not share, and the states after them where these are wanted."""
    own, local = between(x, cu, piece)
    initial = stream.initial_state
    if initial is not None:
        end = piece.at + piece.whole.last - piece.head.first
        begin = piece.at + piece.whole.first - piece.head.first
        initial = initial[[n for n in _ends(cu, piece) if begin <= cu[n] and cu[n + 1] <= end]]
    return causal_pack(own, opt, local, local, Stream(_rows(stream.log_decay, piece.whole), initial), wanted)


def _all_states(
    empty: Tensor, stream: Stream, ended: list[Tensor], cu: tuple[int, ...], pieces: list[list[Piece]],
    ranks: Communicator,
) -> Tensor:  # fmt: skip
    """The states after all segments [N, Hk, M, 2E + 3], of which a rank has those that end on it; empty: of no key."""
    numbers = [[n for piece in of_rank for n in _ends(cu, piece)] for of_rank in pieces]
    most = max(map(len, numbers))
    nothing = empty.expand(most - len(numbers[ranks.rank]), *empty.shape)
    every = gathered(torch.cat((*ended, nothing)), ranks).flatten(0, 1)
    first = stream.initial_state
    first = empty.detach().expand(len(cu) - 1, *empty.shape) if first is None else first
    places = {n: rank * most + i for rank, of_rank in enumerate(numbers) for i, n in enumerate(of_rank)}
    rows = [places.get(n, len(every) + n) for n in range(len(cu) - 1)]  # of no tokens: what was before
    return torch.cat((every, first))[rows]
