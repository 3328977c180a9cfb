"""The op that tells every piece of a sequence the tokens just before it, by one all-gather each way.

    set_halo     own [B, C, pieces · W], before [B, C, W] -> [B, C, pieces (+ 1), W]

What a convolution over the last tokens needs where they lie on other ranks: each piece gives its last W tokens, and
gets the W before its first, however few tokens the pieces between have.  `before` is what was before the first token
of all, the same on every rank, with a gradient that is each rank's part; the last of the outputs, where it is wanted,
is what the next piece of the sequence goes on from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.registration import TOKEN, Spec, register
from .places import Places, spans
from .prefixes import places_of
from .ranks import Communicator, of_name


class Tails(NamedTuple):
    """What pieces give: the last `width` tokens, of which `counts` are there, in the sequence's order of pieces."""

    width: int
    pieces: int  # of a rank: 2 in "zigzag"
    counts: tuple[int, ...]

    def before(self, target: int) -> list[int]:
        """Which W of the slots of `before` and of all pieces, one after another, stand before a piece; P: after all."""
        there = list(range(self.width))
        for piece, count in enumerate(self.counts[:target]):
            end = (piece + 2) * self.width
            there = [*there, *range(end - count, end)][-self.width :]
        return there

    def targets(self, rank: int, size: int, wanted: bool) -> list[int]:
        return [*places_of(rank, size, self.pieces), *[len(self.counts)] * wanted]


def tails_of(places: Places, lengths: tuple[int, ...], width: int) -> Tails:
    """Of shards of so many tokens."""
    pieces = spans(lengths, places.layout)
    order = [of_rank[0] for of_rank in pieces] + [of_rank[1] for of_rank in reversed(pieces) if len(of_rank) > 1]
    return Tails(width, len(pieces[0]), tuple(min(last - first, width) for first, last in order))


def tail(piece: Tensor, width: int) -> Tensor:
    """The last W tokens of [B, C, l], behind zeros where there are fewer."""
    length = piece.shape[-1]
    return piece[..., length - width :] if length >= width else F.pad(piece, (width - length, 0))


def _read(everybody: Tensor, before: Tensor, tails: Tails, targets: Sequence[int]) -> Tensor:
    """What stands before each target, [B, C, targets, W], of gathered tails [R, B, C, pieces · W]."""
    by_piece = everybody.unflatten(-1, (tails.pieces, tails.width)).movedim(-2, 0)
    order = [by_piece[0], *[piece.flip(0) for piece in by_piece[1:]]]
    slots = torch.cat((before.unsqueeze(0), *order)).movedim(0, 2).flatten(2)
    at = torch.tensor([slot for target in targets for slot in tails.before(target)], device=slots.device)
    return slots[..., at].unflatten(-1, (len(targets), tails.width))


def _returned(arriving: Tensor, targets: Sequence[int], tails: Tails, first: int) -> Tensor:
    """What arrives [targets, B, C, W] at the W slots from `first` on, added up: [B, C, W]."""
    total = torch.zeros_like(arriving[0])
    for target, d in zip(targets, arriving, strict=True):
        slots = tails.before(target)
        here = [i for i, slot in enumerate(slots) if first <= slot < first + tails.width]
        if here:  # W slots in a row, as `before` takes the last of each piece
            begin = slots[here[0]] - first
            total[..., begin : begin + len(here)] += d[..., here[0] : here[-1] + 1]
    return total


def _form(args: Sequence[Any]) -> tuple[Tails, bool, Communicator]:
    width, pieces, counts, wanted, ranks, _ = args
    return Tails(width, pieces, tuple(counts)), wanted, of_name(ranks)


def _run(own: Tensor, before: Tensor, *args: Any) -> Tensor:
    tails, wanted, ranks = _form(args)
    return _read(ranks.gather(own), before, tails, tails.targets(ranks.rank, ranks.size, wanted))


def _run_backward(d_halo: Tensor, own: Tensor, before: Tensor, *args: Any) -> list[Tensor]:
    tails, wanted, ranks = _form(args[:-1])
    mine = tails.targets(ranks.rank, ranks.size, wanted)
    arriving = ranks.gather(d_halo).movedim(3, 1).flatten(0, 1)  # [R · targets, B, C, W]
    targets = [target for rank in range(ranks.size) for target in tails.targets(rank, ranks.size, wanted)]
    pieces = mine[: tails.pieces]
    d_own = torch.cat([_returned(arriving, targets, tails, (piece + 1) * tails.width) for piece in pieces], -1)
    return [d_own, _returned(d_halo.movedim(2, 0), mine, tails, 0)]


def _fake(own: Tensor, before: Tensor, *args: Any) -> Tensor:
    tails, wanted, _ = _form(args)
    return own.new_empty((*own.shape[:2], tails.pieces + wanted, tails.width))


set_halo = register(
    Spec(
        name="set_halo",
        tensors={"own": (TOKEN, False), "before": (TOKEN, False)},
        constants="int width, int pieces, int[] counts, bool wanted, str ranks, str backend",
        outputs={"halo": TOKEN},
        differentiable=("halo",),
        saved=(),
        no_grad=(),
        run=_run,
        run_backward=_run_backward,
        fake=_fake,
        decomposition=None,
    )
)
