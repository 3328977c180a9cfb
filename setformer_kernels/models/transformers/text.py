"""SeTformer for text behind transformers' classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from ..text import MaskedLMHead, Pooler, TextEncoder, TokenHead
from .configuration import SeTformerTextConfig
from .initialization import SeTPreTrainedModel


class SeTformerTextPreTrainedModel(SeTPreTrainedModel):
    config_class = SeTformerTextConfig
    base_model_prefix = "setformer"
    accepts_loss_kwargs = False


class SeTformerTextModel(SeTformerTextPreTrainedModel):
    """input_ids [B, L] -> last_hidden_state [B, L, hidden_size], and BERT's pooled first token [B, hidden_size]."""

    def __init__(self, config: SeTformerTextConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.encoder = TextEncoder(
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.intermediate_size, num_references=config.num_references,
            max_positions=config.max_position_embeddings, type_vocab_size=config.type_vocab_size,
            pad_token_id=config.pad_token_id, dropout=config.hidden_dropout_prob, position_scale=config.position_scale,
            layer_norm_eps=config.layer_norm_eps,
            attention={"dropout": config.attention_probs_dropout_prob, **(config.attention or {})},
        )  # fmt: skip
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        hidden = self.encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


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
        labels: Tensor | None = None, **kwargs: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        outputs = self.setformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = self.head(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


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
        labels: Tensor | None = None, **kwargs: Any,
    ) -> TokenClassifierOutput:  # fmt: skip
        outputs = self.setformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = self.head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits)


class SeTformerForMaskedLM(SeTformerTextPreTrainedModel):
    """Logits [B, L, vocab_size]; a label of -100 takes no part in the loss."""

    _tied_weights_keys = {"head.decoder.weight": "setformer.encoder.embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: SeTformerTextConfig) -> None:
        super().__init__(config)
        self.setformer = SeTformerTextModel(config, add_pooling_layer=False)
        self.head = MaskedLMHead(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        outputs = self.setformer(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
