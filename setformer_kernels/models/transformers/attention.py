"""SeT attention as an implementation of transformers' attention interface, for modules that have a `set_transport`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

NAME = "setformer"
# What is saved: where nothing has imported this package, transformers refuses it by a message that repeats it.
SAVED_NAME = "setformer (import setformer_kernels.models.transformers first)"


def set_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """query [B, H, L, D], key and value [B, H, S, D] -> [B, L, H, D], and with output_attentions the weights
    [B, H, L, S]; modules without references keep softmax."""
    transport = getattr(module, "set_transport", None)
    if transport is None:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
    name = "key_mask" if attention_mask is not None and attention_mask.dim() == 2 else "attn_mask"
    heads = transport(query, key, value, dropout_p=dropout, **{name: attention_mask})
    asked = kwargs.get("output_attentions", getattr(module.config, "output_attentions", False))
    weights = transport.weights(query, key, **{name: attention_mask}) if asked else None
    return heads.transpose(1, 2).contiguous(), weights


def set_attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of keys [B, S] where every query sees the same ones: the linear path; else one row a query."""
    if kwargs["mask_function"] is bidirectional_mask_function and not kwargs.get("use_vmap"):
        return kwargs["attention_mask"]
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


for _name in (NAME, SAVED_NAME):
    AttentionInterface.register(_name, set_attention_forward)
    AttentionMaskInterface.register(_name, set_attention_mask)
