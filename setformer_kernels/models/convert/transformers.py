"""The rule of transformers: whatever goes through its attention interface."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from ..transport import SetTransport
from .report import Refusal
from .weights import like

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# By what transformers' modules, or else their configurations, call the number of heads of queries, the width of a key,
# and that of all heads.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads", "heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_kv")
WIDTH = ("all_head_size", "dim_out", "inner_dim", "internal_dim", "embed_dim", "hidden_size", "d_model", "dim")
# Keys of content and of position, one after the other: as many times wider than the head dim that the module names.
WIDER = {"ConditionalDetrDecoderCrossAttention": 2}
BLOCKS = "block_indices"


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
    heads, width = key_heads(old)
    if own.get("value_map") == "rkhs" and getattr(old, "v_head_dim", width) != width:
        raise Refusal(f'value_map="rkhs" wants values as wide as keys, {width}, got {old.v_head_dim}')
    old.set_transport = SetTransport(heads, width, like(old), own).train(old.training)
    old.config._attn_implementation = ADDITIVE if _adds_to_masks(type(old)) else NAME  # type: ignore[union-attr]


def key_heads(module: nn.Module) -> tuple[int, int]:
    """Hk and D of the keys that module hands to the interface: as many heads as its queries have, over the groups that
    the implementations of the interface repeat."""
    heads = _number(module, HEADS)
    if heads is None:
        raise Refusal(f"the number of its heads is unknown: it has none of {', '.join(HEADS)}")
    width = _number(module, HEAD_DIM)
    if width is None:
        whole = _number(module, WIDTH)
        if whole is None:
            raise Refusal(f"the width of its heads is unknown: it has none of {', '.join((*HEAD_DIM, *WIDTH))}")
        width = whole // heads
    width *= WIDER.get(type(module).__name__, 1)
    groups = getattr(module, "num_key_value_groups", None) or 1
    return heads // int(groups), width


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these that the module has, else that its configuration has."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            try:
                found = getattr(owner, name, None)
            except RuntimeError:  # a configuration whose layers differ in it
                continue
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def _adds_to_masks(kind: type[nn.Module]) -> bool:
    """Whether the models that kind is of know masks of numbers alone: no class beside it takes sdpa's, of bool."""
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    beside = vars(sys.modules[kind.__module__]).values()
    models = [c for c in beside if isinstance(c, type) and issubclass(c, base) and c is not base]
    return bool(models) and not any(getattr(c, "_supports_sdpa", False) for c in models)
