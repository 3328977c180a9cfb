"""The op of one pass of transport over a rank's own keys.

    set_pass     Operands (no query, no log b), g [B, H, M], Options -> z [B, H, M, E], c [B, H, M], c of masses that
                 sum to 1 here

Masses are taken as they are, unnormalised, and a key without one has 1: e^−offset of each.  Ranks do not know the sum
of all masses, and nothing that attention returns does (a factor of all masses shifts every c_j alike).  `pools` False:
c alone, and z [B, H, M, 0].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import stages
from ..ops.operands import N_OPERANDS, OPERANDS, OPTIONS, POSITIONS, flops
from ..ops.registration import TOKEN, Spec, register
from ..problem import Operands, Options, compute_dtype, replaced

FIRST_OPTION = N_OPERANDS + 1


def _split(args: Sequence[Any]) -> tuple[Operands, Options, Tensor, float, bool]:
    *options, offset, pools = args[FIRST_OPTION:]
    return Operands(*args[:N_OPERANDS]), Options(*options), args[N_OPERANDS], offset, pools


def _local(x: Operands, offset: float) -> tuple[Operands, Tensor | float]:
    """With masses that sum to 1, and how much larger c is of those that were given."""
    if x.log_a is None:
        return x, math.log(x.key.shape[2]) - offset
    total = x.log_a.logsumexp(-1, keepdim=True)  # [B, H, 1]
    total = torch.where(total > -math.inf, total, 0.0)
    return replaced(x, log_a=x.log_a - total), total - offset


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, opt, g, offset, pools = _split(args)
    x, shift = _local(x, offset)
    if pools:
        z, own = stages.pool_pass(x, opt, g)
    else:
        own = stages.column_pass(x, opt, g)
        z = own.new_empty((*own.shape, 0))
    return z, own + shift, own


def _run_backward(d_z: Tensor, d_c: Tensor, z: Tensor, own: Tensor, *args: Any) -> list[Tensor | None]:
    (x, opt, g, offset, pools), needs = _split(args[:-1]), args[-1][:N_OPERANDS]
    x, _ = _local(x, offset)
    if pools:
        grads, d_g = stages.pool_backward(x, opt, g, z, own, d_z, d_c, needs)
    else:
        grads, d_g = stages.column_backward(x, opt, g, own, d_c, needs)
    return [*grads, d_g]


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, g, _, pools = _split(args)
    dtype = compute_dtype(x.key.dtype)
    z = g.new_empty((*g.shape, x.value.shape[-1] if pools else 0), dtype=dtype)
    return z, g.new_empty(g.shape, dtype=dtype), g.new_empty(g.shape, dtype=dtype)


set_pass = register(
    Spec(
        name="set_pass",
        tensors=OPERANDS | {"g": (TOKEN, False)},
        constants=f"{OPTIONS}, float offset, bool pools",
        outputs={"z": TOKEN, "c": TOKEN, "own": TOKEN},
        differentiable=("z", "c"),
        saved=("z", "own"),
        no_grad=("query", *POSITIONS, "seed"),
        run=_run,
        run_backward=_run_backward,
        fake=_fake,
        decomposition=None,
    )
)

# As pooling's, whose backward has one argument less before the op's own.
register_flop_formula(torch.ops.setformer_kernels.set_pass)(flops(1, 1, 0))
register_flop_formula(torch.ops.setformer_kernels.set_pass_backward)(flops(3, 2, 4))
