"""SeTformer for images behind transformers' classes."""

from __future__ import annotations

from typing import Any

from torch import LongTensor, Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from ..vision import PoolHead, SeTformer, Stage, VisionBlock, checked_image
from .arguments import Asked, chosen_states, either, refuse_arguments
from .configuration import SeTformerConfig
from .initialization import SeTPreTrainedModel


class VisionLayer(GradientCheckpointingLayer, VisionBlock):
    """A block that transformers recomputes in the backward pass as it was told to."""


class LayeredSeTformer(SeTformer):
    block_class = VisionLayer

    def forward(self, image: Tensor) -> list[Tensor]:
        """The patches [B, C₁, ⌈h/4⌉, ⌈w/4⌉] that enter the first block, then the maps of all stages there are."""
        first, *others = self.stages
        assert isinstance(first, Stage)
        x = first.downsample(checked_image(image, self.in_channels))
        maps = [x, first(x, downsample=False)]
        for stage in others:
            maps.append(stage(maps[-1]))
        return maps


class SeTformerPreTrainedModel(SeTPreTrainedModel):
    config_class = SeTformerConfig
    base_model_prefix = "setformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("VisionLayer",)
    _fixed_options = {  # noqa: RUF012
        "hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


class SeTformerModel(SeTformerPreTrainedModel):
    """pixel_values [B, C, height, width] -> last_hidden_state [B, width₄, h₄, w₄]; its mean as pooler_output.

    hidden_states: the patches, then the maps of all stages.  `interpolate_pos_encoding` is taken and changes nothing:
    positions lie on the unit square, whatever the size of the image.
    """

    def __init__(self, config: SeTformerConfig, last_stage: int = 3) -> None:
        super().__init__(config)
        self.backbone = LayeredSeTformer(
            config.widths, config.depths, config.num_heads, mlp_ratio=config.mlp_ratio,
            num_references=config.num_references, in_channels=config.num_channels, features_only=True,
            out_indices=range(last_stage + 1), drop_path_rate=config.drop_path_rate, layer_scale=config.layer_scale,
            position_scale=config.position_scale, attention=config.attention,
        )  # fmt: skip
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.stages[0].downsample  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.stages[0].downsample = value

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: Asked = None, interpolate_pos_encoding: bool = False, **others: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention:  # fmt: skip
        maps = self.maps(pixel_values, output_attentions, others)
        asked = either(output_hidden_states, self.config, "output_hidden_states")
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=maps[-1].mean((2, 3)),
            hidden_states=chosen_states(maps, asked),
        )

    def maps(self, pixel_values: Tensor | None, output_attentions: bool | None, others: dict[str, Any]) -> list[Tensor]:
        """What `LayeredSeTformer` gives, of a call whose arguments have a meaning."""
        refuse_arguments(self, others)
        if pixel_values is None:
            raise ValueError("pixel_values must be [B, C, height, width], got None")
        if either(output_attentions, self.config, "output_attentions"):
            raise ValueError(
                "output_attentions must be False: the weights of an image's cells are not computed"
                " (width/4 · height/4 squared numbers a head)"
            )
        return self.backbone(pixel_values)


class SeTformerForImageClassification(SeTformerPreTrainedModel):
    """Logits [B, num_labels], from the mean of the last map or from SeT pooling (`config.pool`)."""

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.setformer = SeTformerModel(config)
        self.head = PoolHead(
            config.widths[-1], config.num_labels, config.pool, config.num_heads[-1], config.pool_references,
            config.dropout,
        )  # fmt: skip
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: LongTensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: Asked = None,
        interpolate_pos_encoding: bool = False, num_items_in_batch: Tensor | int | None = None, **others: Any,
    ) -> ImageClassifierOutputWithNoAttention:  # fmt: skip
        outputs = self.setformer(pixel_values, output_attentions, output_hidden_states, return_dict=True, **others)
        logits = self.head(outputs.last_hidden_state.permute(0, 2, 3, 1))
        loss = self.classification_loss(logits, labels, num_items_in_batch)
        return ImageClassifierOutputWithNoAttention(loss, logits, outputs.hidden_states)


class SeTformerBackbone(BackboneMixin, SeTformerPreTrainedModel):
    """The maps of `config.out_features`, for detectors and segmenters."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = (r"^head\.",)  # of a classifier

    def __init__(self, config: SeTformerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.widths[0], *config.widths]
        last = max(self.stage_names.index(name) for name in self.out_features)
        self.setformer = SeTformerModel(config, max(last - 1, 0))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: Asked = None, interpolate_pos_encoding: bool = False, **others: Any,
    ) -> BackboneOutput:  # fmt: skip
        maps = self.setformer.maps(pixel_values, output_attentions, others)
        asked = either(output_hidden_states, self.config, "output_hidden_states")
        return BackboneOutput(
            feature_maps=tuple(maps[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=chosen_states(maps, asked),
        )
