"""The rule of `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...nn import SeTAttention
from ...nn.projections import PROJECTIONS
from ...nn.writing import recomputed
from .report import Refusal
from .weights import like


def from_multihead(old: nn.Module, own: dict[str, Any]) -> None:
    assert isinstance(old, nn.MultiheadAttention)
    if type(old) is not nn.MultiheadAttention:
        raise Refusal(f"{type(old).__name__} is a subclass of nn.MultiheadAttention, whose forward may be another")
    if missing := [name for name in (*PROJECTIONS, "out_proj") if not hasattr(old, name)]:
        raise Refusal(f"it has no {missing[0]}")
    _refuse_unused_out_proj(old.out_proj)
    empty = like(old)
    new = SeTAttention(
        old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, old.bias_k is not None,
        old.add_zero_attn, old.kdim, old.vdim, old.batch_first, empty.device, empty.dtype, **own,
    ).train(old.training)  # fmt: skip
    had = {*old._parameters, *old._buffers, *old._modules, *vars(old)}
    old._parameters.update({name: x for name, x in new._parameters.items() if name not in had})
    old._modules.update({name: x for name, x in new._modules.items() if name not in had})
    vars(old).update({name: x for name, x in vars(new).items() if name not in had})
    old.__class__ = SeTAttention


def _refuse_unused_out_proj(linear: nn.Module) -> None:
    """nn.MultiheadAttention reads weight and bias of its out_proj and never calls it, so what is in its forward has had
    no effect; SeT attention calls it."""
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise Refusal(f"its out_proj is a {kind} whose forward was never called: merge or remove what it adds first")
    for name in ("weight", "bias"):
        computed = recomputed(linear, name)
        if computed is not None and not torch.allclose(computed, getattr(linear, name), atol=1e-6):
            raise Refusal(f"its out_proj was used without the normalisation of its {name}: remove that first")
