"""Ranks without processes: threads of which one runs at a time, up to its next collective, in the group's order.

What a test or a benchmark of ranks needs on one machine: no start-up, no sockets, the same order of events in every
run, random numbers of each rank's own (of the CPU), and everything that was sent counted.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .ranks import WORDS, Communicator

_numbers = itertools.count()


class Ranks:
    """n ranks in one process.

    Attributes:
        sent: bytes that a rank gave into each collective so far, agreements left out.
        agreements: how often ranks compared settings.
    """

    def __init__(self, n: int) -> None:
        n = checks.integer("n", n, 1)
        name = f"simulated{next(_numbers)}"
        self.size = n
        self.sent: list[int] = []
        self.agreements = 0
        self.members = [Rank(self, name, rank, n) for rank in range(n)]
        self._changed = threading.Condition()
        self._turn = 0
        self._ended: dict[int, BaseException | None] = {}
        self._given: list[dict[int, Tensor]] = []
        self._calls = [0] * n
        self._random = [torch.get_rng_state()] * n

    def run(self, function: Callable[[Rank], Any], raising: bool = True) -> list[Any]:
        """What `function` returned on every rank; where it raised, its exception, unless the first is to be raised."""
        found: list[Any] = [None] * self.size
        self._turn, self._ended, self._given, self._calls = 0, {}, [], [0] * self.size
        self._random = [torch.get_rng_state()] * self.size

        def live(rank: int) -> None:
            error: BaseException | None = None
            self._await(rank)
            try:
                with torch.autograd.set_multithreading_enabled(False):  # a backward stays in its rank's thread
                    found[rank] = function(self.members[rank])
            except BaseException as raised:
                error = found[rank] = raised
            self._ended[rank] = error
            self._pass_on(rank)

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [error for error in self._ended.values() if error is not None]
        if errors and raising:
            raise errors[0]
        return found

    def _await(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank)
        torch.set_rng_state(self._random[rank])

    def _pass_on(self, rank: int) -> None:
        """The turn of the next rank that still runs."""
        self._random[rank] = torch.get_rng_state()
        later = [(rank + i) % self.size for i in range(1, self.size + 1)]
        with self._changed:
            self._turn = next((r for r in later if r not in self._ended), -1)
            self._changed.notify_all()

    def collect(self, rank: int, t: Tensor) -> list[Tensor]:
        """What every rank gives into its next collective, once all have; RuntimeError if one ended instead."""
        at, self._calls[rank] = self._calls[rank], self._calls[rank] + 1
        if at == len(self._given):
            self._given.append({})
            self._count(t)
        given = self._given[at]
        given[rank] = t.detach()
        self._pass_on(rank)
        self._await(rank)
        if len(given) < self.size:
            gone = next(r for r in range(self.size) if r not in given)
            raise RuntimeError(f"rank {gone} ended while rank {rank} waits for it")
        if at > 0:
            self._given[at - 1] = {}  # every rank has read it: they are all here
        return [given[r] for r in range(self.size)]

    def _count(self, t: Tensor) -> None:
        if t.dtype == torch.uint8 and t.numel() == WORDS:
            self.agreements += 1
        else:
            self.sent.append(t.numel() * t.element_size())


class Rank(Communicator):
    """One of `Ranks`: the `group` of its `build_cp_context`."""

    def __init__(self, ranks: Ranks, name: str, rank: int, size: int) -> None:
        super().__init__(name, rank, size)
        self.ranks = ranks

    def _gathered(self, flat: Tensor) -> Tensor:
        parts = self.ranks.collect(self.rank, flat)
        if any(part.shape != flat.shape or part.dtype != flat.dtype for part in parts):
            raise RuntimeError(f"ranks give {[(list(part.shape), part.dtype) for part in parts]} into one collective")
        return torch.cat(parts)

    def _words(self) -> torch.device:
        return torch.device("cpu")
