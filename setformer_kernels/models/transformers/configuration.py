"""What a saved SeTformer needs to be built again.

Annotations are types here, not strings: transformers checks every field against its own, whenever one is set.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ...nn import SeTAttention
from ..causal import CausalAttention
from ..sizes import VISION_SIZES
from ..transport import OWN_DEFAULTS
from .parallel import plan_of

# What `attention` may set of SeTAttention; the rest follows from other fields.
ATTENTION_OPTIONS = {"dropout", "bias", "add_bias_kv", "add_zero_attn", "num_kv_heads", *OWN_DEFAULTS} - {
    "num_references",
    "position_dim",
    "position_scale",
}
CAUSAL_OPTIONS = ATTENTION_OPTIONS & set(OWN_DEFAULTS)  # of CausalAttention, likewise
Sizes = list[int] | tuple[int, ...]


def check_count(value: int) -> None:
    if value < 1:
        raise ValueError(f"must be ≥ 1, got {value}")


def check_counts(values: Sizes) -> None:
    if not values or min(values) < 1:
        raise ValueError(f"must be positive integers, one a stage, got {values}")


def check_not_negative(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"must be ≥ 0, got {value}")


def check_probability(value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"must be in [0, 1], got {value}")


def check_drop_path_rate(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"must be in [0, 1), got {value}")


def check_options(value: Mapping[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """The options, all of them known and what JSON holds."""
    options = dict(value or {})
    if unknown := options.keys() - known:
        raise ValueError(f"has unknown keys {sorted(unknown)}, known are {', '.join(sorted(known))}")
    for name, option in options.items():
        if not isinstance(option, (bool, int, float, str)):
            raise TypeError(f"{name} must be a Python number or string, got {type(option).__name__}")
    return options


def check_attention(value: Mapping[str, Any] | None) -> None:
    """Options of SeTAttention by the rules of its constructor."""
    options = check_options(value, ATTENTION_OPTIONS)
    check_probability(options.get("dropout", 0.0))
    SeTAttention(2, 1, device="meta", **options)


def check_causal_attention(value: Mapping[str, Any] | None) -> None:
    """Options of CausalAttention, likewise."""
    CausalAttention(2, 1, **check_options(value, CAUSAL_OPTIONS))


def refuse_misplaced(others: Mapping[str, Any]) -> None:
    """transformers takes arguments that a configuration does not know, and no model would read these."""
    for name in sorted(CAUSAL_OPTIONS & others.keys()):
        raise ValueError(f"{name} must be within attention={{...}}, got {name}={others[name]!r} beside it")


def field(check: Callable[[Any], None], default: Any) -> Any:
    """A field whose values also have to pass `check`."""
    return validated_field(check, default=default)


class SavedWithModule:
    """Mixin: what is saved names and carries a module that imports this package, for `trust_remote_code=True`."""

    auto_classes: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As of any configuration, with `modeling_setformer.py` beside it."""
        module = Path(__file__).with_name("modeling_setformer.py")
        if not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            shutil.copyfile(module, Path(save_directory) / module.name)
        classes = {"AutoConfig": type(self).__name__, **self.auto_classes}
        self.auto_map = {auto: f"{module.stem}.{name}" for auto, name in classes.items()}
        try:
            super().save_pretrained(save_directory, push_to_hub, **kwargs)  # type: ignore[misc]
        finally:
            del self.auto_map  # of the file: here the classes are there

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would save this module's own file, which does not stand alone."""


@strict
class SeTformerConfig(SavedWithModule, BackboneConfigMixin, PretrainedConfig):
    """Arguments of `SeTformer` by the same names; the defaults are the size "setformer_tiny".

    `out_features` ("stem", "stage1" ... "stage4") or `out_indices` (0 ... 4) choose the maps of the backbone; the
    stem's are the patches that enter the first stage.
    """

    model_type = "setformer"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = plan_of("backbone.stages.*.blocks.*")
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "SeTformerModel",
        "AutoBackbone": "SeTformerBackbone",
        "AutoModelForImageClassification": "SeTformerForImageClassification",
    }

    widths: Sizes = field(check_counts, VISION_SIZES["setformer_tiny"].widths)
    depths: Sizes = field(check_counts, VISION_SIZES["setformer_tiny"].depths)
    num_heads: Sizes = field(check_counts, VISION_SIZES["setformer_tiny"].num_heads)
    mlp_ratio: float | int = field(check_not_negative, VISION_SIZES["setformer_tiny"].mlp_ratio)
    num_references: int = field(check_count, VISION_SIZES["setformer_tiny"].num_references)
    num_channels: int = field(check_count, 3)
    pool: Literal["mean", "set"] = "mean"
    pool_references: int = field(check_count, 4)
    dropout: float | int = field(check_probability, 0.0)
    drop_path_rate: float | int = field(check_drop_path_rate, VISION_SIZES["setformer_tiny"].drop_path_rate)
    layer_scale: float | int = 0.1
    position_scale: float | int | None = 4.0
    attention: dict[str, Any] | None = field(check_attention, None)
    initializer_range: float | int = field(check_not_negative, 0.02)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, auto_map: Any = None, **kwargs: Any) -> None:
        self.num_layers = len(self.depths)
        self.hidden_size = self.widths[-1]
        self.hidden_sizes = list(self.widths)
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.widths)))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        refuse_misplaced(kwargs)
        super().__post_init__(**kwargs)

    def validate_stages(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.num_heads):
            raise ValueError(
                "widths, depths and num_heads must be of the same length,"
                f" got {len(self.widths)}, {len(self.depths)} and {len(self.num_heads)}"
            )

    @classmethod
    def from_size(cls, name: str, **changes: Any) -> "SeTformerConfig":
        """The configuration of a named size, with changes."""
        if name not in VISION_SIZES:
            raise ValueError(f"name must be one of {', '.join(VISION_SIZES)}, got {name!r}")
        return cls(**{**VISION_SIZES[name].arguments(), **changes})


@strict
class SeTformerTextConfig(SavedWithModule, PretrainedConfig):
    """Arguments of `TextEncoder` by the names that transformers gives them; the defaults are BERT-base's."""

    model_type = "setformer_text"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = plan_of("encoder.blocks.*")
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "SeTformerTextModel",
        "AutoModelForSequenceClassification": "SeTformerForSequenceClassification",
        "AutoModelForTokenClassification": "SeTformerForTokenClassification",
        "AutoModelForMaskedLM": "SeTformerForMaskedLM",
    }

    vocab_size: int = field(check_count, 30522)
    hidden_size: int = field(check_count, 768)
    num_hidden_layers: int = field(check_count, 12)
    num_attention_heads: int = field(check_count, 12)
    intermediate_size: int = field(check_count, 3072)
    num_references: int = field(check_count, 64)
    max_position_embeddings: int = field(check_count, 512)
    type_vocab_size: int = field(check_count, 2)
    hidden_dropout_prob: float | int = field(check_probability, 0.1)
    attention_probs_dropout_prob: float | int = field(check_probability, 0.1)
    classifier_dropout: float | int | None = field(check_probability, None)
    position_scale: float | int | None = 4.0
    attention: dict[str, Any] | None = field(check_attention, None)
    initializer_range: float | int = field(check_not_negative, 0.02)
    layer_norm_eps: float | int = field(check_not_negative, 1e-12)
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, auto_map: Any = None, **kwargs: Any) -> None:
        refuse_misplaced(kwargs)
        super().__post_init__(**kwargs)

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


@strict
class SeTformerCausalConfig(SavedWithModule, PretrainedConfig):
    """Arguments of `CausalDecoder` by the names that transformers gives them; the defaults are GPT-2's sizes."""

    model_type = "setformer_causal"
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = plan_of("decoder.blocks.*")
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "SeTformerCausalModel",
        "AutoModelForCausalLM": "SeTformerForCausalLM",
    }

    vocab_size: int = field(check_count, 50257)
    hidden_size: int = field(check_count, 768)
    num_hidden_layers: int = field(check_count, 12)
    num_attention_heads: int = field(check_count, 12)
    intermediate_size: int = field(check_count, 3072)
    num_references: int = field(check_count, 64)
    conv_width: int = field(check_count, 4)
    gate: bool = True
    hidden_dropout_prob: float | int = field(check_probability, 0.0)
    attention: dict[str, Any] | None = field(check_causal_attention, None)
    initializer_range: float | int = field(check_not_negative, 0.02)
    layer_norm_eps: float | int = field(check_not_negative, 1e-5)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, auto_map: Any = None, **kwargs: Any) -> None:
        refuse_misplaced(kwargs)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds caches by."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def number_of_conv_states(self) -> int:
        """Of a cache's layer: inputs of the convolution, and in the first layer how many tokens there were."""
        return 2
