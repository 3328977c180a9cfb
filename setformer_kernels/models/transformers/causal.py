"""The causal SeTformer behind transformers' classes, on transformers' own cache of linear attention.

A block's layer of the cache holds the sums of attention as its recurrent state and the last inputs of the convolution
as its convolutional state.  The first layer has another convolutional state of two numbers a row: how many tokens, with
padding and without, the cache has seen, which transformers does not count where no layer keeps keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..causal import CausalBlock, CausalDecoder, Past
from ..layers import own_start
from .arguments import ABSENT_CAUSAL, Asked, chosen_states, either, refuse_arguments
from .configuration import SeTformerCausalConfig
from .initialization import SeTPreTrainedModel

# transformers 5.24 renamed the argument, and the field of outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
INPUTS, SEEN = 0, 1  # convolutional states


class CausalLayer(GradientCheckpointingLayer, CausalBlock):
    """A block that transformers recomputes in the backward pass as it was told to."""


class LayeredCausalDecoder(CausalDecoder):
    block_class = CausalLayer


class SeTformerCausalPreTrainedModel(SeTPreTrainedModel):
    config_class = SeTformerCausalConfig
    base_model_prefix = "setformer"
    _no_split_modules = ("CausalLayer",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _is_stateful = True
    _can_compile_fullgraph = True
    _fixed_options = {  # noqa: RUF012
        "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False,
    }  # fmt: skip


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names."""
    if past_key_values is not None and cache is not None:
        raise ValueError("pass the cache as past_key_values or as cache: got both")
    return past_key_values if cache is None else cache


def layers_of(cache: Cache, depth: int) -> list[Any]:
    """The cache's layers, one a block."""
    kept = getattr(cache, "layers", [])
    if len(kept) != depth or not all(hasattr(layer, "recurrent_states") for layer in kept):
        raise ValueError(
            f"{CACHE} must hold {depth} layers of linear attention, as DynamicCache(config=model.config) does,"
            f" got {type(cache).__name__} of {[type(layer).__name__ for layer in kept]}"
        )
    return kept


def check_rows(kept: list[Any], tokens: Tensor | None) -> None:
    """ValueError for a cache of another batch than tokens [B, L, ...]."""
    state = kept[0].recurrent_states[0] if kept else None
    if state is not None and tokens is not None and state.shape[0] != tokens.shape[0]:
        raise ValueError(f"{CACHE} must be of {tokens.shape[0]} texts, as the input, got a cache of {state.shape[0]}")


def read(layer: Any) -> Past:
    """What a layer holds.  Not by `Cache.get_recurrent_state`, which says None where there is no convolution; a cache
    that was reset holds zeros, which mean that there was nothing."""
    past = Past(layer.conv_states[INPUTS], layer.recurrent_states[0])
    # The layer's tensors are written over, and a graph may need what they held.
    return Past(*(None if t is None else t.clone() for t in past)) if torch.is_grad_enabled() else past


def write(layer: Any, past: Past) -> None:
    """Into the layer's own tensors, whose addresses compiled graphs rely on."""
    assert past.sums is not None
    if past.inputs is not None:
        layer.update_conv_state(past.inputs.detach(), INPUTS)
    layer.update_recurrent_state(past.sums.detach())


def count(layer: Any, tokens: Tensor, mask: Tensor | None) -> None:
    """Notes in the cache's first layer that it has seen tokens [B, L, C], and how many of them mask [B, L] says there
    are."""
    seen = layer.conv_states[SEEN]
    if seen is None:
        seen = torch.zeros((tokens.shape[0], 1, 2), dtype=torch.long, device=tokens.device)
    new = torch.full_like(seen, tokens.shape[1])
    if mask is not None:
        new[:, 0, 1] = (mask != 0).sum(1)
    layer.update_conv_state(seen + new, SEEN)


def check_past(layer: Any, attention_mask: Tensor | None, length: int) -> None:
    """ValueError for a mask [B, all tokens so far] that says of those before another number than was taken in: states
    can neither forget nor learn of one later.  Looked at on the CPU alone, where that waits for nobody."""
    seen = layer.conv_states[SEEN]
    if attention_mask is None or seen is None or seen.device.type != "cpu" or torch.compiler.is_compiling():
        return
    known, before = seen[:, 0], (attention_mask[:, : attention_mask.shape[1] - length] != 0).sum(1)
    if attention_mask.shape[1] - length == int(known[:, 0].max()) and not torch.equal(before, known[:, 1]):
        raise ValueError(
            f"attention_mask must say of the tokens before what it said when {CACHE} took them in: they were"
            f" {known[:, 1].tolist()} of the rows, got {before.tolist()}"
        )


def seen_tokens(cache: Cache | None) -> int:
    """How many tokens the cache has seen, padding among them."""
    layer = cache.layers[0] if cache is not None and cache.layers else None
    counts = None if layer is None or not hasattr(layer, "conv_states") else layer.conv_states.get(SEEN)
    return 0 if counts is None else int(counts[..., 0].max())


def local_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The columns of the last `length` tokens of a mask of all tokens so far; None where it says nothing."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [B, {length} or more], the tokens that the cache has seen in front of those of"
            f" this call, got {list(attention_mask.shape)}"
        )
    if not torch.compiler.is_compiling() and bool((attention_mask[:, -length:] != 0).all()):
        return None
    return attention_mask[:, -length:].contiguous()


def unseen(length: int, whole: int, seen: int) -> int:
    """How many of the last `length` tokens that `generate` was given a cache has not seen, of a text of `whole` tokens:
    all, where they are fewer than the text has; else the text was given again, with what the cache has seen."""
    if seen == 0 or length != whole:
        return length
    if length <= seen:
        raise ValueError(
            f"input_ids must be the whole text, beginning with the {seen} tokens that {CACHE} has seen, or its new"
            f" tokens alone with an attention_mask of the whole, got {length} tokens"
        )
    return length - seen


class SeTformerCausalModel(SeTformerCausalPreTrainedModel):
    """input_ids [B, L] -> last_hidden_state [B, L, hidden_size], each place from the tokens up to it.

    Without positions there is no longest text.  A cache is `DynamicCache(config=model.config)`, of a size that does not
    depend on how many tokens it has seen; attention_mask covers those before this call, too, or this call's alone.
    """

    def __init__(self, config: SeTformerCausalConfig) -> None:
        super().__init__(config)
        self.decoder = LayeredCausalDecoder(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.intermediate_size, num_references=config.num_references, conv_width=config.conv_width,
            gate=config.gate, pad_token_id=config.pad_token_id, dropout=config.hidden_dropout_prob,
            layer_norm_eps=config.layer_norm_eps, attention=config.attention,
        )  # fmt: skip
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.word

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.word = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, past_key_values: Cache | None = None, cache: Cache | None = None,
        use_cache: bool | None = None, output_hidden_states: Asked = None, **others: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        refuse_arguments(self, others, ABSENT_CAUSAL)
        cache = given_cache(past_key_values, cache)
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        kept = [] if cache is None else layers_of(cache, len(self.decoder.blocks))
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_rows(kept, tokens)
        self.decoder.refuse_padding(attention_mask)
        mask = None if tokens is None else local_mask(attention_mask, tokens.shape[1])
        if kept and tokens is not None:
            check_past(kept[0], attention_mask, tokens.shape[1])
        asked = either(output_hidden_states, self.config, "output_hidden_states")
        states: list[Tensor] = []
        hidden, after = self.decoder.with_past(
            input_ids, mask, inputs_embeds, [read(layer) for layer in kept] if kept else None, bool(kept),
            states.append if asked else None,
        )  # fmt: skip
        for layer, past in zip(kept, after, strict=True):
            write(layer, past)
        if kept:
            count(kept[0], hidden, mask)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=chosen_states([*states, hidden], asked),
            **{CACHE: cache if use_cache else None},
        )  # fmt: skip


class SeTformerForCausalLM(SeTformerCausalPreTrainedModel, GenerationMixin):
    """Logits [B, L, vocab_size] of the token after each place, or of the last `logits_to_keep` places; a label of -100
    takes no part in the loss, and labels are shifted here, unless they are `shift_labels`: of a shard of a sequence,
    say, whose last token is followed by another rank's first."""

    _tied_weights_keys = {"lm_head.weight": "setformer.decoder.word.weight"}  # noqa: RUF012

    def __init__(self, config: SeTformerCausalConfig) -> None:
        super().__init__(config)
        self.setformer = SeTformerCausalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # whose row of zeros stays zero
            vars(self.lm_head)["padding_idx"] = config.pad_token_id
        own_start(self.lm_head)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.setformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.setformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, past_key_values: Cache | None = None, cache: Cache | None = None,
        use_cache: bool | None = None, labels: Tensor | None = None, output_hidden_states: Asked = None,
        logits_to_keep: int | Tensor = 0, num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        shifted = others.pop("shift_labels", None)  # no parameter: transformers' Trainer would ask for it beside labels
        outputs = self.setformer(
            input_ids, attention_mask, inputs_embeds, past_key_values, cache, use_cache, output_hidden_states,
            return_dict=True, **others,
        )  # fmt: skip
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, places])
        loss = None
        if labels is not None or shifted is not None:
            loss = self.loss_function(
                logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch, shift_labels=shifted
            )
        return CausalLMOutputWithPast(loss, logits, getattr(outputs, CACHE), outputs.hidden_states)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, is_first_iteration: bool | None = False, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if not is_first_iteration and next_sequence_length == 1:
            attention_mask = None  # a token that was generated is no padding
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, attention_mask=attention_mask,
            inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs,
        )  # fmt: skip

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:  # fmt: skip
        """What `generate` passes to forward with a cache of fixed size: the mask of this call's tokens [B, L]."""
        return local_mask(attention_mask, inputs_embeds.shape[1])

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:  # fmt: skip
        """As transformers', which asks the cache for a length that it does not have; in pieces of
        `prefill_chunk_size` tokens, where that is given."""
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        length = (input_ids if embeds is None else embeds).shape[1]
        # without a mask, which transformers drops where it is all ones, it says how long it was
        whole = getattr(generation_config, "_mask_length", None) or length if mask is None else mask.shape[1]
        fresh = unseen(length, whole, seen_tokens(model_kwargs.get(CACHE)))
        size = generation_config.prefill_chunk_size
        if size is None or embeds is not None:
            inputs = self.prepare_inputs_for_generation(
                input_ids, fresh, is_first_iteration=is_first_iteration, **model_kwargs
            )
            return self(**inputs, return_dict=True)
        outputs, masks = None, None if mask is None else mask[:, -fresh:].split(size, 1)
        for i, piece in enumerate(input_ids[:, -fresh:].split(size, 1)):
            own = {**model_kwargs, "attention_mask": None if masks is None else masks[i]}
            outputs = self(**self.prepare_inputs_for_generation(piece, **own), return_dict=True)
        return outputs
