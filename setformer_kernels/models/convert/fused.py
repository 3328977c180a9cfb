"""The rule of timm's many attention classes: whatever computes it by one call of `F.scaled_dot_product_attention`."""

from __future__ import annotations

import dis
import importlib
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...nn.doors import FloatInPython
from ...tracing import Leaf
from ..transport import SetTransport
from .heads import number, width_by_scale
from .report import Refusal
from .weights import like

CALL = "scaled_dot_product_attention"
# Where windows stand beside the heads, [B, W, H, N, D]; elsewhere they stand behind them, [B, H, W, N, D].
WINDOWS_FIRST = {"timm.models.twins.LocallyGroupedAttn"}
# Whose keys have one head for all queries.
ONE_KEY_HEAD = {"timm.layers.attention2d.MultiQueryAttention2d"}


class Instead(TorchFunctionMode):
    """Within it, transport answers what softmax attention is asked."""

    def __init__(self, transport: SetTransport, windows_first: bool) -> None:
        super().__init__()
        self.transport, self.windows_first = transport, windows_first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.answer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Of q, k, v [B, H, N, D], [B·H, N, D] or, of windows, with a dimension W beside H.  SeT does without scale."""
        if q.dim() == 3:
            heads = self.transport.references.shape[0]
            q, k, v = (x.unflatten(0, (-1, heads)) for x in (q, k, v))
            if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape[0] > 1:
                attn_mask = attn_mask.unflatten(0, (-1, heads))
            return self.answer(q, k, v, attn_mask, dropout_p, is_causal).flatten(0, 1)
        if attn_mask is not None and attn_mask.dim() == 3:  # of heads, where SeT's are of batch elements
            attn_mask = attn_mask[None]
        if q.dim() == 4:
            return self.transport(q, k, v, None, attn_mask, is_causal, dropout_p)
        window = 1 if self.windows_first else 2
        folded = [x.movedim(window, 1).flatten(0, 1) for x in (q, k, v)]
        o = self.transport(*folded, None, attn_mask, is_causal, dropout_p)
        return o.unflatten(0, (q.shape[0], q.shape[window])).movedim(1, window)


class SeTFused(Leaf, FloatInPython):
    """In front of a class of timm: its forward runs as it is, but for the one call of softmax attention in it.

    One node of torch.fx: what answers that call looks at the number of dimensions.
    """

    set_transport: SetTransport
    windows_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class of timm takes and gives."""
        with Instead(self.set_transport, self.windows_first):
            return super().forward(*args, **kwargs)


def calls(kind: type[nn.Module]) -> int:
    """How many calls of softmax attention the forward of a class is written with; 0 of what is not timm's."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or not kind.__module__.startswith("timm.") or CALL not in code.co_names:
        return 0
    return sum(step.argval == CALL for step in dis.get_instructions(code))


def from_fused(old: nn.Module, own: dict[str, Any]) -> None:
    kind: Any = type(old)
    if calls(kind) > 1:
        raise Refusal("it computes attention more than once, which one set of references cannot stand for")
    heads = 1 if f"{kind.__module__}.{kind.__name__}" in ONE_KEY_HEAD else number(old)
    old.set_transport = SetTransport(heads, width_by_scale(old), like(old), own).train(old.training)
    if hasattr(old, "fused_attn"):  # else its own products, where timm was told so when it was built
        old.fused_attn = True  # type: ignore[assignment]
    old.__class__ = _class_of(kind)


@cache
def _class_of(kind: Any) -> type[nn.Module]:
    """SeT attention in the place of kind's; `__getattr__` finds it again for pickle."""
    name = f"{kind.__module__}.{kind.__name__}"
    members = {
        "__module__": __name__, "__qualname__": name.replace(".", "__"), "__doc__": f"timm's `{kind.__name__}` on SeT.",
        "windows_first": name in WINDOWS_FIRST,
    }  # fmt: skip
    return type(f"SeT{kind.__name__}", (SeTFused, kind), members)


def __getattr__(name: str) -> Any:
    module, _, kind = name.replace("__", ".").rpartition(".")
    if not module.startswith("timm."):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(getattr(importlib.import_module(module), kind))
