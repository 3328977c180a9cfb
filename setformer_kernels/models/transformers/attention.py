"""SeT attention as an implementation of transformers' attention interface, for modules that have a `set_transport`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from .masks import CausalMask, as_options, set_attention_mask

NAME = "setformer"
# Of models that add numbers to their masks before attention sees them: masks are of numbers, written out.
ADDITIVE = "setformer_additive"
# What is saved: where nothing has imported this package, transformers refuses it by a message that repeats it.
SAVED_NAME = "setformer (import setformer_kernels.models.transformers first)"


def set_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, position_bias: Tensor | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, E] -> [B, L, H, E], and with output_attentions the
    weights [B, H, L, S]; modules without references keep softmax.

    As transformers' own implementations read them: no mask means a causal one where the module or the call says so,
    position_bias [1 or B, H, L, S] is added, `cu_seq_lens_q` and `cu_seq_lens_k` are the bounds of packed sequences,
    and indices [B, L, n] those of the keys that each query may see.
    Scales and soft caps of logits, which are cosines here, and sinks have no counterpart.
    """
    transport = getattr(module, "set_transport", None)
    if transport is None:
        return _softmax(module, query, key, value, attention_mask, dropout, position_bias, is_causal, **kwargs)
    implied = getattr(module, "is_causal", False) and module.config._attn_implementation != ADDITIVE
    causal = bool(implied if is_causal is None else is_causal)
    if query.shape[0] != key.shape[0]:  # learned queries, the same for all
        query = query.expand(key.shape[0], *query.shape[1:])
    if (past := getattr(key, "set_state", None)) is not None:
        if position_bias is not None or kwargs.get("indices") is not None:
            raise ValueError("past_key_values must be a DynamicCache where positions are biased, got a StateCache")
        heads = past.attend(transport, query, key, value, attention_mask, causal, dropout)
        return heads.transpose(1, 2).contiguous(), None
    options = as_options(_cropped(attention_mask, key), query.shape[2], key.shape[2], causal)
    ends = kwargs.get("cu_seq_lens_q")
    bounds = (ends, kwargs.get("cu_seq_lens_k"))
    if ends is not None:
        if _is_packed(transport, query, causal, position_bias, kwargs):
            heads = transport.packed(query[0], key[0], value[0], *bounds, is_causal=causal, dropout_p=dropout)
            return heads[None].transpose(1, 2).contiguous(), None
        options = _biased(options, _same_sequence(query, key, ends, bounds[1]), query, key)
    if kwargs.get("indices") is not None:
        options = _biased(options, _among(kwargs["indices"], key.shape[2]), query, key)
    if position_bias is not None:
        options = _biased(options, position_bias, query, key)
    heads = transport(query, key, value, dropout_p=dropout, **options)
    asked = kwargs.get("output_attentions", getattr(module.config, "output_attentions", False))
    weights = transport.weights(query, key, **options) if asked else None
    return heads.transpose(1, 2).contiguous(), weights


def _softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    position_bias: Tensor | None, is_causal: bool | None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Of a module that was left: transformers' own, of the masks that it knows."""
    if isinstance(mask, CausalMask):
        mask = mask.dense()
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None].bool()
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    kwargs.pop("softcap", None)  # which sdpa refuses
    return sdpa_attention_forward(module, query, key, value, mask, dropout, is_causal=is_causal, **kwargs)


def _cropped(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Some models make one mask of the longest layer's keys for all."""
    if mask is None or mask.dim() != 4 or mask.shape[-1] <= key.shape[2]:
        return mask
    return mask[..., : key.shape[2]]


def _is_packed(
    transport: Any, query: Tensor, causal: bool, position_bias: Tensor | None, kwargs: dict[str, Any]
) -> bool:  # fmt: skip
    """Whether the kernels of packed batches take the call; else its sequences are told apart by a mask."""
    window = kwargs.get("sliding_window")
    long = window is not None and (kwargs.get("max_length_q") is None or kwargs["max_length_q"] > window)
    scan = not causal or transport.num_iters <= 1
    return query.shape[0] == 1 and position_bias is None and not long and scan and not transport.converges


def _same_sequence(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> Tensor:
    """[1, 1, L, S], True where query and key are of one sequence."""
    of = [
        torch.searchsorted(cu[1:].contiguous(), torch.arange(x.shape[2], device=x.device, dtype=cu.dtype), right=True)
        for x, cu in ((query, cu_q), (key, cu_q if cu_k is None else cu_k))
    ]
    return (of[0][:, None] == of[1][None])[None, None]


def _among(indices: Tensor, s: int) -> Tensor:
    """[B, 1, L, S], True where a query chose the key."""
    chosen = torch.zeros((*indices.shape[:2], s), dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, indices.long(), True)[:, None]


def _biased(options: dict[str, Any], bias: Tensor, query: Tensor, key: Tensor) -> dict[str, Any]:
    """options with a bias [.., L, S] of every query more: numbers that are added, or bool."""
    length, s = query.shape[2], key.shape[2]
    bias = bias[..., -length:, :s]
    given = [options[name] for name in ("key_mask", "attn_mask") if options.get(name) is not None]
    rows = [m if m.dim() == 4 else m[:, None, None] if m.dim() == 2 else m[:, :, None] for m in given]
    if options.get("is_causal"):
        rows.append(torch.ones(length, s, dtype=torch.bool, device=key.device).tril(s - length))
    for m in rows:
        if bias.dtype == torch.bool:
            bias = m & bias if m.dtype == torch.bool else m.masked_fill(~bias, -torch.inf)
        else:
            bias = bias.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else bias + m
    return {"attn_mask": bias}


for _name in (NAME, SAVED_NAME):
    AttentionInterface.register(_name, set_attention_forward)
    AttentionMaskInterface.register(_name, set_attention_mask)
AttentionInterface.register(ADDITIVE, set_attention_forward)
AttentionMaskInterface.register(ADDITIVE, eager_mask)
