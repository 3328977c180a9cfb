"""A call on one sequence, as ranks of one process answer it, each with its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from setformer_kernels.distributed import Ranks, build_cp_context
from setformer_kernels.distributed.places import starts

# Of arguments with tokens, the dimension that has them, counted from the last.
TOKENS = {"query": 2, "key": 2, "value": 2, "key_mask": 1, "query_position": 2, "key_position": 2, "log_decay": 1}
OF_QUERIES = ("query", "query_position")


def uneven(n: int, ranks: int, pieces: int = 1) -> list[int]:
    """How many of n tokens each rank holds: unlike numbers, and none on one of three or more."""
    weights = [0 if rank == 1 and ranks > 2 else 2 + rank % 3 for rank in range(ranks)]
    found = [n * w // sum(weights) // pieces * pieces for w in weights]
    found[-1] += n - sum(found)
    return found


def rows_of(lengths: Sequence[int], layout: str) -> list[Tensor]:
    """Which tokens each rank holds, on the CPU."""
    every = torch.arange(sum(lengths), device="cpu")
    if layout == "contiguous":
        return list(every.split(list(lengths)))
    firsts = starts(tuple(lengths))
    return [
        torch.cat((every[a : a + n // 2], every[b : b + n // 2])) for (a, b), n in zip(firsts, lengths, strict=True)
    ]


class Sharded:
    """`function` of whole tensors by keyword, run by `ranks` on shards, with gradients of its tensors; what it returns
    has its tokens in dimension 2, or is the same on every rank (`replicated`: the last rank's loss then counts)."""

    def __init__(
        self, function: Callable[..., Tensor], ranks: int, layout: str = "contiguous", known: bool = True,
        replicated: bool = False,
    ) -> None:  # fmt: skip
        self.function, self.layout, self.known, self.replicated = function, layout, known, replicated
        self.ranks = Ranks(ranks)

    def __call__(self, **arguments: Any) -> Tensor:
        names = [name for name, t in arguments.items() if isinstance(t, Tensor)]
        return _Over.apply(self, arguments, names, *[arguments[name] for name in names])  # type: ignore[no-any-return]

    def plan(self, arguments: dict[str, Any]) -> None:
        pieces = 2 if self.layout == "zigzag" else 1
        sizes = {name: arguments[name].shape[2] for name in ("key", "query") if name in arguments}
        lengths = {name: uneven(n, self.ranks.size, pieces) for name, n in sizes.items()}
        alike = len({tuple(found) for found in lengths.values()}) == 1
        self.lengths = lengths["key"] if self.known and alike else None
        self.rows = {n: rows_of(found, self.layout) for n, found in lengths.items()}

    def cut(self, name: str, t: Tensor, rank: int) -> Tensor:
        """This rank's part of an argument, a leaf."""
        if name in TOKENS:
            rows = self.rows["query" if name in OF_QUERIES else "key"][rank].to(t.device)
            t = t.movedim(-TOKENS[name], 0)[rows].movedim(0, -TOKENS[name])
        return t.detach()

    def forward(self, arguments: dict[str, Any], names: list[str], tensors: Sequence[Tensor]) -> Tensor:
        self.plan(arguments)
        device = torch.get_default_device()

        def live(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.device(device):
                context = build_cp_context(group=group, layout=self.layout, lengths=self.lengths)
                own = {
                    name: self.cut(name, t, group.rank).requires_grad_(t.requires_grad)
                    for name, t in zip(names, tensors, strict=True)
                }
                return self.function(**arguments | own, cp_context=context), own

        self.found = self.ranks.run(live)
        parts = [o.detach() for o, _ in self.found]
        if self.replicated:
            assert all(torch.equal(part, parts[0]) for part in parts)
            return parts[0]
        return torch.cat(parts, 2)[:, :, self.order("query")]

    def order(self, name: str) -> Tensor:
        return torch.cat(self.rows[name]).argsort()

    def backward(self, names: list[str], d_o: Tensor) -> list[Tensor | None]:
        def live(group: Any) -> dict[str, Tensor]:
            o, own = self.found[group.rank]
            leaves = {name: t for name, t in own.items() if t.requires_grad}
            if self.replicated:
                incoming = d_o if group.rank == group.size - 1 else torch.zeros_like(d_o)
            else:
                incoming = d_o[:, :, self.rows["query"][group.rank].to(d_o.device)]
            found = torch.autograd.grad(o, [*leaves.values()], incoming, allow_unused=True, materialize_grads=True)
            return dict(zip(leaves, found, strict=True))

        parts = self.ranks.run(live)
        return [self.joined(name, [part[name] for part in parts]) if name in parts[0] else None for name in names]

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """The gradient of a whole argument: tokens put together, parameters added up."""
        if name not in TOKENS:
            return torch.stack(parts).sum(0)
        dim = -TOKENS[name]
        return torch.cat(parts, dim).index_select(
            dim, self.order("query" if name in OF_QUERIES else "key").to(parts[0].device)
        )


class _Over(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Sharded, arguments: dict[str, Any], names: list[str], *tensors: Tensor) -> Tensor:
        ctx.call, ctx.names, ctx.needs = call, names, [t.requires_grad for t in tensors]
        with torch.enable_grad():
            return call.forward(arguments, names, tensors)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> Any:  # type: ignore[override]
        return (None, None, None, *ctx.call.backward(ctx.names, d_o))
