"""Where the tokens of each rank stand in the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .ranks import Communicator


@dataclass(frozen=True)
class Places:
    """The layout, this rank, and how many tokens each rank holds, where that is known."""

    layout: str
    rank: int
    lengths: tuple[int, ...] | None

    def check(self, name: str, length: int) -> None:
        """ValueError for a shard of another length than the context has, or that has no halves."""
        if self.lengths is not None and length != self.lengths[self.rank]:
            raise ValueError(
                f"{name} must have the {self.lengths[self.rank]} tokens that lengths of the cp_context has for "
                f"rank {self.rank}, got {length}"
            )
        if self.layout == "zigzag" and length % 2:
            raise ValueError(f"{name} must have an even number of tokens, two parts of layout='zigzag', got {length}")

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """The rows of each piece of this rank's shard, first .. last − 1."""
        return [(0, length)] if self.layout == "contiguous" else [(0, length // 2), (length // 2, length)]

    def all_lengths(self, length: int, device: torch.device, ranks: Communicator) -> tuple[int, ...]:
        """How many tokens each rank holds, where this one holds `length`: asked for where it is not known."""
        if self.lengths is not None:
            return self.lengths
        return tuple(ranks.gather(torch.tensor(length, device=device)).tolist())

    def rows(self, length: int, device: torch.device, ranks: Communicator) -> tuple[Tensor, int]:
        """The index of each of this rank's tokens in the sequence [length], and how many tokens there are."""
        lengths = self.all_lengths(length, device, ranks)
        if self.layout == "contiguous":
            return sum(lengths[: self.rank]) + torch.arange(length, device=device), sum(lengths)
        first, second = starts(lengths)[self.rank]
        half = torch.arange(length // 2, device=device)
        return torch.cat((first + half, second + half)), sum(lengths)


def spans(lengths: tuple[int, ...], layout: str) -> list[list[tuple[int, int]]]:
    """Of each rank, the tokens of the sequence that each of its pieces has, first .. last − 1."""
    if layout == "contiguous":
        ends = list(accumulate(lengths))
        return [[(end - n, end)] for end, n in zip(ends, lengths, strict=True)]
    return [[(at, at + n // 2) for at in both] for both, n in zip(starts(lengths), lengths, strict=True)]


def starts(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Of zigzag parts r and 2R − 1 − r of each rank r, the index of the first token."""
    halves = [n // 2 for n in lengths]
    begin = list(accumulate([*halves, *reversed(halves)], initial=0))
    return [(begin[r], begin[2 * len(lengths) - 1 - r]) for r in range(len(lengths))]


def counters(rows: Tensor, total: int, heads: tuple[int, int, int], m: int) -> Tensor:
    """n = ((b·H + h)·L + i)·M + j of rows i [l] of L = total: [B, Hk, G·l, M], H = Hk·G."""
    b, h, groups = heads
    head = torch.arange(b * h * groups, device=rows.device).view(b, h, groups, 1)
    at = (head * total + rows).flatten(2)
    return at.unsqueeze(-1) * m + torch.arange(m, device=rows.device)
