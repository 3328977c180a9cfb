"""SeTformer for images behind transformers' classes."""

from __future__ import annotations

from typing import Any

from torch import LongTensor, Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from ..vision import PoolHead, SeTformer
from .configuration import SeTformerConfig
from .initialization import SeTPreTrainedModel


class SeTformerPreTrainedModel(SeTPreTrainedModel):
    config_class = SeTformerConfig
    base_model_prefix = "setformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)


class SeTformerModel(SeTformerPreTrainedModel):
    """pixel_values [B, C, height, width] -> last_hidden_state [B, width₄, h₄, w₄]; its mean as pooler_output."""

    def __init__(self, config: SeTformerConfig, last_stage: int = 3) -> None:
        super().__init__(config)
        self.backbone = SeTformer(
            config.widths, config.depths, config.num_heads, mlp_ratio=config.mlp_ratio,
            num_references=config.num_references, in_channels=config.num_channels, features_only=True,
            out_indices=range(last_stage + 1), drop_path_rate=config.drop_path_rate, layer_scale=config.layer_scale,
            position_scale=config.position_scale, attention=config.attention,
        )  # fmt: skip
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        maps = self.backbone.forward_maps(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=maps[-1].mean((2, 3)),
            hidden_states=tuple(maps) if self.wants_hidden_states(output_hidden_states) else None,
        )

    def wants_hidden_states(self, asked: bool | None) -> bool:
        return bool(getattr(self.config, "output_hidden_states", False) if asked is None else asked)


class SeTformerForImageClassification(SeTformerPreTrainedModel):
    """Logits [B, num_labels], from the mean of the last map or from SeT pooling (`config.pool`)."""

    accepts_loss_kwargs = False

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.setformer = SeTformerModel(config)
        self.head = PoolHead(
            config.hidden_size, config.num_labels, config.pool, config.num_heads[-1], config.pool_references,
            config.dropout,
        )  # fmt: skip
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: LongTensor | None = None, output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:  # fmt: skip
        outputs = self.setformer(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.head(outputs.last_hidden_state.permute(0, 2, 3, 1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class SeTformerBackbone(BackboneMixin, SeTformerPreTrainedModel):
    """The maps of `config.out_features`, for detectors and segmenters."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = (r"^head\.",)  # of a classifier

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.widths)
        last = max(index % len(self.stage_names) for index in self.out_indices)
        self.setformer = SeTformerModel(config, last)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        patches = self.setformer.backbone.stages[0].downsample
        assert isinstance(patches, nn.Module)
        return patches

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:  # fmt: skip
        maps = self.setformer.backbone.forward_maps(pixel_values)
        return BackboneOutput(
            feature_maps=tuple(maps[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=tuple(maps) if self.setformer.wants_hidden_states(output_hidden_states) else None,
        )
