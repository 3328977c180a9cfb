"""Shares of transport that become the whole: c = LSE_r c_r, z = Σ_r e^{c_r − c} z_r, by one all-gather each way.

Every rank merges the same numbers in the same order, so that z and c are the same bits everywhere.  What is
differentiated is the sum of all ranks' losses: gradients of z and c, which all ranks use, are added up over them;
those of parameters stay partial, each rank's own, until they are added up too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.registration import TOKEN, Spec, register
from ..reference import lse
from .ranks import Communicator, of_name


def _share(own: Tensor, c: Tensor) -> Tensor:
    """e^{c_r − c}, 0 where the rank has no key; c broadcasts."""
    here = own > -math.inf
    return torch.where(here, (torch.where(here, own, 0.0) - torch.where(c > -math.inf, c, 0.0)).exp(), 0.0)


def _together(own: Tensor, ranks: Communicator, ids: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """What merges with what: [n, B, H, M, E + 1] of the own [B, ..] of all ranks, and which of the n count for each of
    the B, [n, B, 1, 1]; None where all do.

    ids: of a pack, rank by rank, which segment each of B is a part of; −1 of none."""
    parts = ranks.gather(own)
    if not ids:
        return parts, None
    every = torch.tensor(ids, device=own.device)
    mine = every.view(ranks.size, -1)[ranks.rank]
    members = (every.unsqueeze(-1) == mine) & (mine >= 0)
    return parts.flatten(0, 1).unsqueeze(1).expand(-1, mine.shape[0], *own.shape[1:]), members[:, :, None, None]


def whole(z: Tensor, c: Tensor, ranks: Communicator, ids: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E] and c [B, H, M] of all ranks' keys from this one's; E may be 0."""
    parts, members = _together(torch.cat((z, c.unsqueeze(-1)), -1), ranks, ids)
    z, c = parts[..., :-1], parts[..., -1]
    if members is not None:
        c = torch.where(members, c, -math.inf)
    together = lse(c, 0)
    return (_share(c, together).unsqueeze(-1) * z).sum(0), together


def added(d: Tensor, ranks: Communicator, ids: Sequence[int]) -> Tensor:
    """What arrives [B, H, M, E + 1] at the whole of which each of B is a part, added up over the ranks."""
    parts, members = _together(d, ranks, ids)
    return parts.sum(0) if members is None else torch.where(members.unsqueeze(-1), parts, 0.0).sum(0)


def parts_of(
    total: Tensor, z: Tensor, c: Tensor, together: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of a rank's z and c from those of the whole [.., E + 1], added up over the ranks."""
    d_z, d_c = total[..., :-1], total[..., -1]
    share = _share(c, together[1])
    return share.unsqueeze(-1) * d_z, share * (d_c + (d_z * (z - together[0])).sum(-1))


class _Added(torch.autograd.Function):
    """The sum over the ranks, on every rank: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Communicator, ids: Sequence[int]) -> Tensor:
        ctx.of = ranks, ids
        return added(t, ranks, ids)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None, None]:
        return _Added.apply(d_sum, *ctx.of), None, None


class _Merged(torch.autograd.Function):
    """`whole`, differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, c: Tensor, ranks: Communicator, ids: Sequence[int]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        together = whole(z, c, ranks, ids)
        ctx.of = ranks, ids
        ctx.save_for_backward(z, c, *together)
        return together

    @staticmethod
    def backward(ctx: Any, d_z: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, c, *together = ctx.saved_tensors
        total = _Added.apply(torch.cat((d_z, d_c.unsqueeze(-1)), -1), *ctx.of)
        return *parts_of(total, z, c, tuple(together)), None, None


def merged(z: Tensor, c: Tensor, ranks: Communicator, ids: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """`whole` as PyTorch's own operations."""
    return _Merged.apply(z, c, ranks, ids)


def _run_backward(
    d_z: Tensor, d_c: Tensor, all_z: Tensor, all_c: Tensor, z: Tensor, c: Tensor, ranks: str, ids: Sequence[int],
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = added(torch.cat((d_z, d_c.unsqueeze(-1)), -1), of_name(ranks), ids)
    return parts_of(total, z, c, (all_z, all_c))


set_merge = register(
    Spec(
        name="set_merge",
        tensors={"z": (TOKEN, False), "c": (TOKEN, False)},
        constants="str ranks, int[] ids, str backend",
        outputs={"all_z": TOKEN, "all_c": TOKEN},
        differentiable=("all_z", "all_c"),
        saved=("all_z", "all_c"),
        no_grad=(),
        run=lambda z, c, ranks, ids, backend: whole(z, c, of_name(ranks), ids),
        run_backward=_run_backward,
        fake=lambda z, c, ranks, ids, backend: (z.new_empty(z.shape), c.new_empty(c.shape)),
        decomposition=None,
    )
)
