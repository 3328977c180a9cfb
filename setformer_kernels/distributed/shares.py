"""A rank's own keys, as transport over all ranks asks for them: by kernels, or by PyTorch's own operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, reference
from ..ops.memory import OF_OPERANDS, read_problem
from ..ops.memory import read as read_memory
from ..ops.operands import as_heads, attention_problem, logits
from ..problem import HYPER, Operands, Options, replaced
from ..reference.attention import hyper, reference_mass, token_logits, widen
from .merging import merged, set_merge
from .passes import set_pass
from .ranks import Communicator

Pass = tuple[Tensor, Tensor]  # z [B, H, M, E or 0], c [B, H, M]


class Share(ABC):
    """Passes over the keys of one rank from g [B, H, M], and what merges them; all differentiable.

    ids: as `merging.whole` has them, of a share of a pack."""

    ids: tuple[int, ...] = ()

    @abstractmethod
    def column(self, g: Tensor) -> Pass:
        """c alone."""

    @abstractmethod
    def pool(self, g: Tensor) -> Pass: ...

    @abstractmethod
    def merge(self, z: Tensor, c: Tensor) -> Pass:
        """z and c of the keys of all ranks."""


class Native(Share):
    """By the ops."""

    def __init__(self, x: Operands, opt: Options, offset: float, ranks: Communicator) -> None:
        x = replaced(x, query=None, query_position=None, log_b=None, seed=None)
        if opt.num_iters == 0:  # f = log a is that of an iteration that relaxes it altogether
            x, opt = replaced(x, key_relaxation=None), _with_number(opt, "key_relaxation", 0.0)
        self.opt = opt._replace(num_iters=1, dropout_p=0.0)
        self.batch, self.offset, self.ranks = x.key.shape[:2], offset, ranks.name
        # A pass takes all (b, h) as heads: put into that form once, not at each pass.
        self.x = x if x.key.shape[0] == 1 else as_heads(x)

    def _pass(self, x: Operands, g: Tensor, pools: bool) -> Pass:
        z, c, _ = set_pass(*x, g.reshape(x.key.shape[0], -1, g.shape[-1]), *self.opt, self.offset, pools)
        return z.view(*self.batch, *z.shape[2:]), c.view(g.shape)

    def column(self, g: Tensor) -> Pass:
        return self._pass(replaced(self.x, value=self.x.value.detach()[..., :1]), g, False)

    def pool(self, g: Tensor) -> Pass:
        return self._pass(self.x, g, True)

    def merge(self, z: Tensor, c: Tensor) -> Pass:
        return set_merge(z, c, self.ranks, self.ids, self.opt.backend)


class Plain(Share):
    """By the reference, differentiable to any order."""

    def __init__(self, x: Operands, opt: Options, offset: float, ranks: Communicator) -> None:
        x = widen(x)
        self.value, self.ranks, self.iterates = x.value, ranks, opt.num_iters > 0
        self.l = token_logits(x, opt, x.key, x.key_position)
        given = self.l.new_zeros(self.l.shape[:-1]) if x.log_a is None else x.log_a
        self.log_a, self.lam_a = given - offset, hyper(x, opt, "key_relaxation").squeeze(-1)

    def _column(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ + f [B, H, S, M], and c."""
        f = self.log_a
        if self.iterates:
            f = reference.potential(f, self.lam_a, reference.lse(self.l + g.unsqueeze(-2), -1))
        total = self.l + f.unsqueeze(-1)
        return total, reference.lse(total, -2)

    def column(self, g: Tensor) -> Pass:
        _, c = self._column(g)
        return c.new_empty((*c.shape, 0)), c

    def pool(self, g: Tensor) -> Pass:
        total, c = self._column(g)
        w = (total - torch.where(c > -torch.inf, c, 0.0).unsqueeze(-2)).exp()
        return w.mT @ self.value, c

    def merge(self, z: Tensor, c: Tensor) -> Pass:
        return merged(z, c, self.ranks, self.ids)


def _with_number(opt: Options, name: str, value: float) -> Options:
    at = HYPER.index(name)
    return opt._replace(scalars=(*opt.scalars[:at], value, *opt.scalars[at + 1 :]))


class Several(Share):
    """Keys of several segments of a pack, each a share with a batch of one."""

    def __init__(self, parts: list[Share], ids: tuple[int, ...]) -> None:
        self.parts, self.ids = parts, ids
        parts[0].ids = ids

    def _each(self, passes: list[Pass]) -> Pass:
        z, c = zip(*passes, strict=True)
        return torch.cat(z), torch.cat(c)

    def column(self, g: Tensor) -> Pass:
        return self._each([part.column(g[i : i + 1]) for i, part in enumerate(self.parts)])

    def pool(self, g: Tensor) -> Pass:
        return self._each([part.pool(g[i : i + 1]) for i, part in enumerate(self.parts)])

    def merge(self, z: Tensor, c: Tensor) -> Pass:
        return self.parts[0].merge(z, c)


def share_of(x: Operands, opt: Options, offset: float, ranks: Communicator) -> Share:
    """The keys of a checked call, on the backend that its options and static facts choose."""
    problem = attention_problem("transport", x, opt)
    plain = dispatch.choose(problem, opt.backend, logits(x)) == dispatch.REFERENCE
    return (Plain if plain else Native)(x, opt, offset, ranks)


def transport(x: Operands, opt: Options, share: Share, batch: int) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E] and, but for a constant of each head, g [B, H, M] of all keys, the same bits on every rank:
    max(T, 1) collectives, of M numbers a head each and M(E + 1) the last."""
    h = x.key.shape[1]
    log_b, lam_b = reference_mass(x), hyper(x, opt, "reference_relaxation").squeeze(-1)
    g = log_b.expand(batch, h, -1)
    for _ in range(opt.num_iters - 1):
        c = _centred(share.merge(*share.column(g))[1])
        g = log_b - lam_b * torch.where(c > -torch.inf, c, 0.0)
    z, c = share.merge(*share.pool(g))
    return z, reference.potential(log_b, lam_b if opt.num_iters else 0 * lam_b, _centred(c))


def _centred(c: Tensor) -> Tensor:
    """c [B, H, M] less a constant of each head, which nothing but g itself shows: every iteration would add the log of
    all masses to it."""
    top = c.detach().amax(-1, keepdim=True)
    return c - torch.where(top > -torch.inf, top, 0.0)


def read(x: Operands, opt: Options, z: Tensor, g: Tensor, counters: Tensor | None) -> Tensor:
    """o [B, H, L, E] of queries [B, H, L, D]; their places among the random numbers [B, H, L, M] where some drop."""
    assert x.query is not None
    given: dict[str, Any] = {name: getattr(x, name) for name in OF_OPERANDS if name != "query"}
    of = read_problem(x.query, z, given)
    if counters is None:
        return read_memory(of, opt, z, g)
    return reference.read(of, opt, z, g, counters)
