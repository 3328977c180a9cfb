"""SeTformer for text behind transformers' classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from ..text import MaskedLMHead, Pooler, TextBlock, TextEncoder, TokenHead
from .arguments import Asked, chosen_states, either, refuse_arguments
from .configuration import SeTformerTextConfig
from .initialization import SeTPreTrainedModel


class TextLayer(GradientCheckpointingLayer, TextBlock):
    """A block that transformers recomputes in the backward pass as it was told to: [B, L, C] and, if need_weights, the
    weights [B, H, L, L]; the MLP takes `chunk` tokens at a time (0: all)."""

    chunk = 0

    def forward(  # type: ignore[override]
        self, x: Tensor, padding: Tensor | None, position: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self.with_weights(x, padding, position, need_weights)

    def feed_forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mlp(part) for part in x.split(self.chunk, 1)], 1) if self.chunk else self.mlp(x)


class LayeredTextEncoder(TextEncoder):
    """The encoder with what its blocks gave: hidden states [B, L, C], of all blocks if need_states (what enters the
    first block first, as in BERT), else only the last; weights [B, H, L, L], or none."""

    block_class = TextLayer

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        need_states: bool = False, need_weights: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        x, padding, position = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        states, weights = [x], []
        for block in self.blocks:
            x, w = self.run(block, x, padding, position, need_weights)
            states = [*states, x] if need_states else [x]
            weights.append(w)
        return tuple(states), tuple(weights) if need_weights else ()


class SeTformerTextPreTrainedModel(SeTPreTrainedModel):
    config_class = SeTformerTextConfig
    base_model_prefix = "setformer"
    _no_split_modules = ("TextLayer",)
    _fixed_options = {  # noqa: RUF012
        "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False,
        "position_embedding_type": "absolute",
    }  # fmt: skip


class SeTformerTextModel(SeTformerTextPreTrainedModel):
    """input_ids [B, L] -> last_hidden_state [B, L, hidden_size], and BERT's pooled first token [B, hidden_size]."""

    def __init__(self, config: SeTformerTextConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.encoder = LayeredTextEncoder(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.intermediate_size, num_references=config.num_references,
            max_positions=config.max_position_embeddings, type_vocab_size=config.type_vocab_size,
            pad_token_id=config.pad_token_id, dropout=config.hidden_dropout_prob, position_scale=config.position_scale,
            layer_norm_eps=config.layer_norm_eps,
            attention={"dropout": config.attention_probs_dropout_prob, **(config.attention or {})},
        )  # fmt: skip
        for block in self.encoder.blocks:
            block.chunk = config.chunk_size_feed_forward
        self.pooler = Pooler(config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embeddings.word

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embeddings.word = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: Asked = None, **others: Any,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        refuse_arguments(self, others)
        need_weights = bool(either(output_attentions, self.config, "output_attentions"))
        asked = either(output_hidden_states, self.config, "output_hidden_states")
        states, weights = self.encoder(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, bool(asked), need_weights
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=None if self.pooler is None else self.pooler(states[-1]),
            hidden_states=chosen_states(states, asked),
            attentions=weights if need_weights else None,
        )


class SeTformerForSequenceClassification(SeTformerTextPreTrainedModel):
    """Logits [B, num_labels]; `config.problem_type` asks for regression or several labels at once."""

    def __init__(self, config: SeTformerTextConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.setformer = SeTformerTextModel(config)
        self.head = TokenHead(config.hidden_size, config.num_labels, config.head_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: Asked = None,
        num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        outputs = self.setformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, return_dict=True, **others,
        )  # fmt: skip
        logits = self.head(outputs.pooler_output)
        loss = self.classification_loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class SeTformerForTokenClassification(SeTformerTextPreTrainedModel):
    """Logits [B, L, num_labels]; a label of -100 takes no part in the loss."""

    def __init__(self, config: SeTformerTextConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.setformer = SeTformerTextModel(config, add_pooling_layer=False)
        self.head = TokenHead(config.hidden_size, config.num_labels, config.head_dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: Asked = None,
        num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> TokenClassifierOutput:  # fmt: skip
        outputs = self.setformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, return_dict=True, **others,
        )  # fmt: skip
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class SeTformerForMaskedLM(SeTformerTextPreTrainedModel):
    """Logits [B, L, vocab_size]; a label of -100 takes no part in the loss."""

    _tied_weights_keys = {"head.decoder.weight": "setformer.encoder.embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: SeTformerTextConfig) -> None:
        super().__init__(config)
        self.setformer = SeTformerTextModel(config, add_pooling_layer=False)
        self.head = MaskedLMHead(
            config.hidden_size, config.vocab_size, config.layer_norm_eps,
            config.pad_token_id if config.tie_word_embeddings else None,
        )  # fmt: skip
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: Asked = None,
        num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        outputs = self.setformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, return_dict=True, **others,
        )  # fmt: skip
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)
