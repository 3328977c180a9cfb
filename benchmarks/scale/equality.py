"""Whether many ranks are one: the output and every gradient of a sequence on R ranks and on one, against float64.

The error budget with one rank in the place of the model: ‖R − f64‖ ≤ 2‖1 − f64‖ + 4u‖f64‖.  float64 is that of the
CPU's kernels, which are held to the reference's where that fits into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.scale.streamed import Plan
from setformer_kernels.distributed import Ranks, build_cp_context
from setformer_kernels.distributed.ranks import Communicator
from setformer_kernels.testing.budget import gradients, rounding_unit

TOKENS = ("query", "key", "value")
BLOCK = 2**16  # rows of which a difference is taken at once


def made(plan: Plan) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v and references, and what arrives at the output."""
    generator = torch.Generator().manual_seed(11)
    size = (1, plan.heads, plan.tokens, plan.width)
    tensors = {name: torch.randn(size, generator=generator) for name in TOKENS}
    tensors["references"] = torch.randn(plan.heads, plan.references, plan.width, generator=generator)
    return tensors, torch.randn(size, generator=generator)


def on_one(tensors: dict[str, Tensor], incoming: Tensor, plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of everything, in one call."""
    own = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    return gradients(lambda **x: SF.set_attention(**x, num_iters=plan.iterations, backend="cpu"), own, incoming)


def on_ranks(tensors: dict[str, Tensor], incoming: Tensor, plan: Plan) -> dict[str, Tensor]:
    """The same of as many shards as there are ranks, put together."""
    shards = [range(plan.tokens)[r * plan.tokens // plan.ranks : (r + 1) * plan.tokens // plan.ranks]
              for r in range(plan.ranks)]  # fmt: skip

    def live(group: Communicator) -> dict[str, Tensor]:
        mine, context = shards[group.rank], build_cp_context(group=group)
        rows = slice(mine.start, mine.stop)
        own = {name: (t[:, :, rows] if name in TOKENS else t).detach().requires_grad_() for name, t in tensors.items()}
        options = {"num_iters": plan.iterations, "backend": "cpu", "cp_context": context}
        return gradients(lambda **x: SF.set_attention(**x, **options), own, incoming[:, :, rows])

    found = Ranks(plan.ranks).run(live)
    whole = {name: torch.cat([one[name] for one in found], 2) for name in ("output", *TOKENS)}
    return whole | {"references": torch.stack([one["references"] for one in found]).sum(0)}


def apart(one: Tensor, other: Tensor) -> float:
    """‖one − other‖_F in float64, not all at once."""
    parts = zip(one.split(BLOCK, -2), other.split(BLOCK, -2), strict=True)
    return float(torch.stack([(a.double() - b.double()).square().sum() for a, b in parts]).sum().sqrt())


def budget_used(plan: Plan) -> dict[str, float]:
    """Of each result, how much of its error budget the ranks used: at most 1."""
    tensors, incoming = made(plan)
    exact = on_one(tensors, incoming, plan, torch.float64)
    one = on_one(tensors, incoming, plan, torch.float32)
    allowed = {
        name: 2 * apart(one[name], t) + 4 * rounding_unit(torch.float32) * float(t.norm()) for name, t in exact.items()
    }
    del one
    ranks = on_ranks(tensors, incoming, plan)
    return {name: apart(ranks[name], t) / allowed[name] for name, t in exact.items()}
