"""How many heads an attention module has, and how wide they are, by what its library calls the two."""

from __future__ import annotations

from torch import nn

from .report import Refusal

# By what modules, or else their configurations, call the number of heads of queries, the width of a key, and that of
# all heads.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads", "heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_kv")
WIDTH = ("all_head_size", "dim_out", "inner_dim", "internal_dim", "embed_dim", "hidden_size", "d_model", "dim")
# Keys of content and of position, one after the other: as many times wider than the head dim that the module names.
WIDER = {"ConditionalDetrDecoderCrossAttention": 2}


def number(module: nn.Module) -> int:
    """Heads of queries."""
    heads = _first(module, HEADS)
    if heads is None:
        raise Refusal(f"the number of its heads is unknown: it has none of {', '.join(HEADS)}")
    return heads


def width_by_scale(module: nn.Module) -> int:
    """D, which timm's modules name or keep as the scale 1/√D of their logits."""
    width, scale = _first(module, ("key_dim", *HEAD_DIM)), getattr(module, "scale", None)
    if width is None and isinstance(scale, float) and 0.0 < scale < 1.0:
        width = round(scale**-2)
    if width is None:
        raise Refusal(f"the width of its heads is unknown: it has none of key_dim, {', '.join(HEAD_DIM)} and scale")
    return width


def of_interface(module: nn.Module) -> tuple[int, int]:
    """Hk and D of the keys that module hands to transformers' interface: as many heads as its queries have, over the
    groups that the implementations of the interface repeat."""
    heads = number(module)
    width = _first(module, HEAD_DIM)
    if width is None:
        whole = _first(module, WIDTH)
        if whole is None:
            raise Refusal(f"the width of its heads is unknown: it has none of {', '.join((*HEAD_DIM, *WIDTH))}")
        width = whole // heads
    width *= WIDER.get(type(module).__name__, 1)
    groups = getattr(module, "num_key_value_groups", None) or 1
    return heads // int(groups), width


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
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
