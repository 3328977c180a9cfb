"""Forward and backward of one long sequence over simulated ranks, of which one has its tokens in memory at a time.

Every rank makes its tokens anew for each pass, and gives them up while it waits for the others.  What it does between
is what `functional.set_attention` does with a context: the same ops, merged by the same functions.  Gradients of keys
are sums over all passes; so that none has to be kept while a rank waits, the backward passes run twice, at first for
what is told to the others alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setformer_kernels.distributed import Ranks, passes
from setformer_kernels.distributed.merging import added, parts_of, whole
from setformer_kernels.problem import SCALARS, Operands

OPS = torch.ops.setformer_kernels
assert passes.set_pass  # its import registers the op
BLOCK = 2**16  # rows that are drawn; further ones are these, turned
QUERY, KEY, VALUE, COTANGENT = 0, 1, 2, 3
NOTHING: dict[str, Any] = dict.fromkeys(Operands._fields)


class Plan(NamedTuple):
    tokens: int = 2**24
    ranks: int = 8
    heads: int = 1
    references: int = 64
    width: int = 64  # D and E
    iterations: int = 3

    @property
    def rows(self) -> int:
        return self.tokens // self.ranks


class Found(NamedTuple):
    """Of one rank."""

    rows_sum: float  # largest |1 − Σ_s A_is| of its queries, by values whose first column is 1
    squares: dict[str, float]  # Σ x² of o and of the gradients of its tokens
    value_sum: Tensor  # [H, E] Σ_s dv, float64
    cotangent_sum: Tensor  # [H, E] Σ_i do, float64
    references: Tensor  # [H, M, D] its part of the gradient


def summed(t: Tensor) -> Tensor:
    """[1, H, rows, E] -> [H, E], in float64 but not all at once."""
    return torch.stack([part[0].double().sum(1) for part in t.split(BLOCK, 2)]).sum(0)


class Tokens:
    """The tokens of the rank whose turn it is, made anew in the same memory whenever they are asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.block = plan, min(BLOCK, plan.rows)
        self.drawn: dict[int, Tensor] = {}
        self.memory: dict[int, Tensor] = {}

    def of(self, rank: int, kind: int) -> Tensor:
        """[1, H, rows, D], the same at every call."""
        plan, n = self.plan, self.block
        if kind not in self.drawn:
            generator = torch.Generator().manual_seed(kind)
            self.drawn[kind] = torch.randn(plan.heads, n, plan.width, generator=generator)
            self.memory[kind] = torch.empty(1, plan.heads, plan.rows, plan.width)
        found = self.memory[kind]
        for i, first in enumerate(range(0, plan.rows, n)):
            turns = (rank * math.ceil(plan.rows / n) + i) % plan.width
            part = found[0, :, first : first + n]
            drawn = self.drawn[kind][:, : part.shape[1]]
            part[..., turns:].copy_(drawn[..., : plan.width - turns])
            part[..., :turns].copy_(drawn[..., plan.width - turns :])
        if kind == VALUE:
            found[..., 0] = 1.0
        return found


class _Rank:
    """The passes of one rank over tokens that it makes for each."""

    def __init__(self, plan: Plan, group: Any, tokens: Tokens) -> None:
        self.plan, self.group, self.tokens = plan, group, tokens
        y = torch.randn(plan.heads, plan.references, plan.width, generator=torch.Generator().manual_seed(9))
        self.y, self.log_b = y, -math.log(plan.references)
        self.squares: dict[str, float] = {}
        self.d_references = torch.zeros_like(y)

    def _pass(self, pools: bool) -> tuple[list[Any], list[Any]]:
        """Tensors and constants of a pass, but for g."""
        key = self.tokens.of(self.group.rank, KEY)
        value = self.tokens.of(self.group.rank, VALUE) if pools else key[..., :1]
        x = Operands(**NOTHING | {"key": key, "value": value, "references": self.y})
        return [*x], [list(SCALARS), "rbf", 1, 0.0, "cpu", math.log(self.plan.tokens), pools]

    def forward(self, g: Tensor, pools: bool) -> tuple[Tensor, ...]:
        """z, c and own of this rank, merged z and c of all."""
        x, constants = self._pass(pools)
        z, c, own = OPS.set_pass(*x, g, *constants)
        del x
        return z, c, own, *whole(z, c, self.group)

    def backward(
        self, state: tuple[Tensor, ...], g: Tensor, total: Tensor, kept: tuple[list[Any], list[Any]] | None = None
    ) -> tuple[Tensor, ...]:
        """dk, dv, dy and dg of one pass from what arrived at the whole; dg alone unless the tokens are `kept`."""
        z, c, own, *together = state
        d_z, d_c = parts_of(total, z, c, (together[0], together[1]))
        x, constants = kept or self._pass(z.shape[-1] > 0)
        asked = ("key", "references", *(["value"] if z.shape[-1] > 0 else [])) if kept else ()
        needs = [name in asked for name in Operands._fields] + [True]
        saved = z if z.shape[-1] > 0 else z.new_empty((*z.shape[:-1], 0))
        found = OPS.set_pass_backward(d_z, d_c, saved, own, *x, g, *constants, needs)
        return found[0], found[1], found[2], found[-1]

    def _note(self, name: str, t: Tensor) -> None:
        self.squares[name] = sum(part.double().square().sum().item() for part in t.split(BLOCK, 2))

    def attend(self, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
        """dz, dg, how far rows of A are from 1, and Σ_i do."""
        query, d_o = (self.tokens.of(self.group.rank, kind) for kind in (QUERY, COTANGENT))
        rest = [self.y, None, None, None, None, None, None, list(SCALARS), "rbf", 0.0, "cpu"]
        o = OPS.set_read(query, z, g, *rest)
        self._note("output", o)
        off = (o[..., 0] - 1).abs().max().item()
        del o
        needs = [True, True, True, True, *[False] * 6]
        d_q, d_z, d_g, d_y, *_ = OPS.set_read_backward(d_o, query, z, g, *rest, needs)
        self._note("query", d_q)
        self.d_references += d_y
        return d_z, d_g, off, summed(d_o)

    def run(self) -> Found:
        """One forward and backward pass."""
        T = self.plan.iterations
        shape = (1, self.plan.heads, self.plan.references)
        potentials, states = [torch.full(shape, self.log_b)], []
        for t in range(T):
            states.append(self.forward(potentials[-1], t == T - 1))
            c = states[-1][4]
            potentials.append(self.log_b - (c - c.amax(-1, keepdim=True)))
        d_z, d_g, off, incoming = self.attend(states[-1][3], potentials[-1])
        totals = []
        for t in reversed(range(T)):
            total = added(torch.cat((d_z, -d_g.unsqueeze(-1)), -1), self.group, ())
            totals.append(total)
            if t > 0:
                *_, d_g = self.backward(states[t], potentials[t], total)
                d_z = d_z[..., :0]
        value_sum = self._gradients(states, potentials, totals[::-1])
        return Found(off, self.squares, value_sum, incoming, self.d_references)

    def _gradients(self, states: list[Any], potentials: list[Tensor], totals: list[Tensor]) -> Tensor:
        """Σ_s dv [H, E], once every pass has what arrives at it."""
        x, constants = self._pass(True)
        d_key: Tensor | None = None
        for t in reversed(range(len(states))):
            narrow = t < len(states) - 1
            of_pass = ([*x[:2], x[1][..., :1], *x[3:]], [*constants[:-1], False]) if narrow else (x, constants)
            d_k, d_v, d_y, _ = self.backward(states[t], potentials[t], totals[t], of_pass)
            self.d_references += d_y
            if narrow:
                assert d_key is not None
                d_key += d_k
            else:
                d_key, value_sum = d_k, summed(d_v)
                self._note("value", d_v)
                del d_v
        assert d_key is not None
        self._note("key", d_key)
        return value_sum


def run(plan: Plan) -> tuple[list[Found], list[int]]:
    """What every rank found, and the bytes that each gave into every collective."""
    ranks, tokens = Ranks(plan.ranks), Tokens(plan)
    return ranks.run(lambda group: _Rank(plan, group, tokens).run()), ranks.sent
