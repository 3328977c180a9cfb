"""The rule of transformers: whatever goes through its attention interface."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from ..transport import SetTransport
from .heads import of_interface
from .report import Refusal
from .weights import like

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
BLOCKS = "block_indices"
MASKED_OTHERWISE = ("_supports_sdpa", "_supports_flash_attn")


def asks_the_interface(module: nn.Module) -> bool:
    """Whether module computes attention by the implementation that its configuration names."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names and "transformers.modeling_utils" in sys.modules


def from_transformers(old: nn.Module, own: dict[str, Any]) -> None:
    """Its projections call the attention that its config names, which becomes SeT attention."""
    from ..transformers.attention import ADDITIVE, NAME

    if BLOCKS in inspect.unwrap(type(old).forward).__code__.co_varnames:
        raise Refusal(
            f"it hands its attention {BLOCKS}, blocks of keys for each query, which SeT attention does not read"
        )
    heads, width = of_interface(old)
    if own.get("value_map") == "rkhs" and getattr(old, "v_head_dim", width) != width:
        raise Refusal(f'value_map="rkhs" wants values as wide as keys, {width}, got {old.v_head_dim}')
    old.set_transport = SetTransport(heads, width, like(old), own).train(old.training)
    old.config._attn_implementation = ADDITIVE if _adds_to_masks(type(old)) else NAME  # type: ignore[union-attr]


def _adds_to_masks(kind: type[nn.Module]) -> bool:
    """Whether the models that kind is of know masks of numbers alone: no class beside it takes sdpa's, of bool, or
    flash attention's, which are no matrices."""
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    beside = vars(sys.modules[kind.__module__]).values()
    models = [c for c in beside if isinstance(c, type) and issubclass(c, base) and c is not base]
    return bool(models) and not any(getattr(c, name, False) for c in models for name in MASKED_OTHERWISE)
