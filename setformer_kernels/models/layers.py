"""Parts that the vision and the text models share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..nn import SeTAttention, SeTPooling
from ..nn.kmeans import TooFewTokensError
from ..nn.writing import Reset
from ..tracing import Leaf
from .transport import SetTransport

STD = 0.02  # of linear and embedding weights at the start, as in BERT and ViT


class Recomputing(nn.Module):
    """Of blocks that can be recomputed in the backward pass."""

    recompute = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: memory of one block's activations instead of all blocks'."""
        self.recompute = enable

    def run(self, block: nn.Module, *args: Any) -> Any:
        """block(*args), recomputed in the backward pass after `set_grad_checkpointing`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class DropPath(Leaf):
    """Stochastic depth: in training a sample's branch x [B, ...] is zero with probability `rate`, else x/(1 − rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        rate = checks.probability("rate", rate)
        if rate == 1.0:
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
    where: dict[str, Any] = (
        {} if position_scale is None else {"position_dim": position_dim, "position_scale": position_scale}
    )
    return SeTAttention(width, num_heads, batch_first=True, **where, **options)


@torch.no_grad()
def normal_rows(weight: Tensor, std: float, zero_row: int | None) -> None:
    """Normal weights; those of `zero_row` (the padding's) zero."""
    nn.init.normal_(weight, std=std)
    if zero_row is not None:
        weight[zero_row] = 0.0


def own_start(module: nn.Module, std: float = STD) -> Reset | None:
    """Makes a layer's `reset_parameters` draw linear and embedding weights normal, convolutions by fan-out, and biases
    zero; None for other layers."""
    padding_idx = getattr(module, "padding_idx", None)  # also of a linear layer whose weight is an embedding's
    rows = partial(normal_rows, std=std, zero_row=padding_idx)
    if isinstance(module, nn.Embedding):
        return Reset(module, {"weight": rows})
    if isinstance(module, nn.Linear):
        return Reset(module, {"weight": rows, "bias": nn.init.zeros_})
    if isinstance(module, nn.Conv2d):
        return Reset(module, {"weight": partial(nn.init.kaiming_normal_, mode="fan_out"), "bias": nn.init.zeros_})
    return None


def initialize_weights(module: nn.Module) -> None:
    """For `nn.Module.apply`: draws a layer by its `own_start`."""
    if (start := own_start(module)) is not None:
        start()


def initialize_references(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Places the references of every SeT layer on the k-means centres of its tokens, layer after layer, in one forward
    pass `model(*args, **kwargs)` on sample data (no labels needed); a layer sees its predecessors' new references."""
    with _placing(model, _place):
        model(*args, **kwargs)


def initialize_references_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """As `initialize_references`, except that a layer with fewer tokens than references stays as it is: the names of
    such layers."""
    names, left = {module: name for name, module in model.named_modules()}, []

    def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            _place(module, args, kwargs)
        except TooFewTokensError:
            left.append(names[module])

    with _placing(model, place):
        model(*args, **kwargs)
    return left


@contextmanager
def _placing(model: nn.Module, place: Callable[..., None]) -> Iterator[None]:
    """Within it, `place` is a forward pre-hook of every SeT layer, in eval mode and without gradients."""
    layers = [module for module in model.modules() if isinstance(module, (SeTAttention, SeTPooling, SetTransport))]
    handles = [layer.register_forward_pre_hook(place, with_kwargs=True) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: a layer places its references on the tokens that it is about to be called with."""
    call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    options = {name: call[name] for name in ("key_padding_mask", "key_position") if call.get(name) is not None}
    if isinstance(module, SeTPooling):
        module.initialize_references(call["x"], **options)
    elif isinstance(module, SeTAttention):
        module.initialize_references(call["key"], value=call["value"], **options)
    elif isinstance(module, SetTransport) and call["v"] is not None:  # weights are of a call that came before
        k, v = (t if t.dim() == 4 else t[None] for t in (call["k"], call["v"]))  # a pack is one row of tokens
        module.initialize_references(k, v, call.get("key_mask"))
