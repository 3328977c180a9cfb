"""Parts that the vision and the text models share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SeTAttention, SeTPooling
from ..tracing import Leaf
from .transport import SetTransport


class DropPath(Leaf):
    """Stochastic depth: in training a sample's branch x [B, ...] is zero with probability `rate`, else x/(1 − rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"the drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0], *(1 for _ in x.shape[1:]))).bernoulli_(1.0 - self.rate)
        return x * (kept / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Mlp(nn.Sequential):
    """x [..., width] -> [..., width] through `hidden` GELU units."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, **factory: Any) -> None:
        super().__init__(
            nn.Linear(width, hidden, **factory), nn.GELU(), nn.Linear(hidden, width, **factory), nn.Dropout(dropout)
        )


def set_attention(
    width: int, num_heads: int, position_scale: float | None, position_dim: int, **options: Any
) -> SeTAttention:
    """Batch-first SeT attention; with a position_scale, linear positional encoding that starts at that τ."""
    attention = SeTAttention(
        width, num_heads, batch_first=True, position_dim=0 if position_scale is None else position_dim, **options
    )
    if attention.position_scale is not None and position_scale is not None:
        nn.init.constant_(attention.position_scale, position_scale)
    return attention


def initialize_weights(module: nn.Module, std: float = 0.02) -> None:
    """For `nn.Module.apply`: linear and embedding weights normal, convolutions by fan-out, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def initialize_references(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Places the references of every SeT layer on the k-means centres of its tokens, layer after layer, in one forward
    pass `model(*args, **kwargs)` on sample data (no labels needed); a layer sees its predecessors' new references."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _placing(model):
            model(*args, **kwargs)
    finally:
        model.train(was_training)


@contextmanager
def _placing(model: nn.Module) -> Iterator[None]:
    """Within it, each SeT layer places its references on the tokens that it is about to be called with."""
    layers = [module for module in model.modules() if isinstance(module, (SeTAttention, SeTPooling, SetTransport))]
    handles = [layer.register_forward_pre_hook(_place, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: args and kwargs are those of the call."""
    call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    options = {name: call[name] for name in ("key_padding_mask", "key_position") if call.get(name) is not None}
    if isinstance(module, SeTPooling):
        module.initialize_references(call["x"], **options)
    elif isinstance(module, SeTAttention):
        module.initialize_references(call["key"], value=call["value"], **options)
    elif isinstance(module, SetTransport):
        module.initialize_references(call["k"], call["v"], call.get("key_mask"))
