"""What a saved SeTformer needs to be built again."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..sizes import VISION_SIZES


@strict
class SeTformerConfig(BackboneConfigMixin, PretrainedConfig):
    """Arguments of `SeTformer` by the same names; the defaults are the size "setformer_tiny".

    `out_features` ("stage1" ... "stage4") or `out_indices` (0 ... 3) choose the maps of the backbone.
    """

    model_type = "setformer"

    widths: list[int] | tuple[int, ...] = VISION_SIZES["setformer_tiny"].widths
    depths: list[int] | tuple[int, ...] = VISION_SIZES["setformer_tiny"].depths
    num_heads: list[int] | tuple[int, ...] = VISION_SIZES["setformer_tiny"].num_heads
    mlp_ratio: float | int = VISION_SIZES["setformer_tiny"].mlp_ratio
    num_references: int = VISION_SIZES["setformer_tiny"].num_references
    num_channels: int = 3
    pool: str = "mean"
    pool_references: int = 4
    dropout: float | int = 0.0
    drop_path_rate: float | int = VISION_SIZES["setformer_tiny"].drop_path_rate
    layer_scale: float = 0.1
    position_scale: float | int | None = 4.0
    attention: dict[str, Any] | None = None
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_size = self.widths[-1]
        self.hidden_sizes = list(self.widths)
        self.stage_names = [f"stage{i + 1}" for i in range(len(self.widths))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, name: str, **changes: Any) -> SeTformerConfig:
        """The configuration of a named size, with changes."""
        if name not in VISION_SIZES:
            raise ValueError(f"name must be one of {', '.join(VISION_SIZES)}, got {name!r}")
        return cls(**{**VISION_SIZES[name].arguments(), **changes})


@strict
class SeTformerTextConfig(PretrainedConfig):
    """Arguments of `TextEncoder` by the names that transformers gives them; the defaults are BERT-base's."""

    model_type = "setformer_text"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_references: int = 64
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    position_scale: float | int | None = 4.0
    attention: dict[str, Any] | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
