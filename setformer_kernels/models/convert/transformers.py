"""The rule of BERT and ViT of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..transport import SetTransport
from .report import Refusal
from .weights import like


def from_transformers(old: nn.Module, own: dict[str, Any]) -> None:
    """Its projections call the attention that its config names, which becomes SeT attention."""
    from ..transformers.attention import NAME

    if getattr(old, "is_causal", False) or getattr(old, "is_decoder", False):
        raise Refusal("it is a decoder's, with a cache: only encoders are replaced")
    width = getattr(old, "head_dim", None) or old.attention_head_size
    assert isinstance(old.num_attention_heads, int)
    assert isinstance(width, int)
    old.set_transport = SetTransport(old.num_attention_heads, width, like(old), own).train(old.training)
    old.config._attn_implementation = NAME  # type: ignore[union-attr]
