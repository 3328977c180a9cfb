"""SeTformer in Hugging Face transformers: importing this registers its classes with AutoConfig and AutoModel*."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration import SeTformerConfig, SeTformerTextConfig
from .text import (
    SeTformerForMaskedLM,
    SeTformerForSequenceClassification,
    SeTformerForTokenClassification,
    SeTformerTextModel,
)
from .vision import SeTformerBackbone, SeTformerForImageClassification, SeTformerModel

__all__ = [
    "SeTformerBackbone",
    "SeTformerConfig",
    "SeTformerForImageClassification",
    "SeTformerForMaskedLM",
    "SeTformerForSequenceClassification",
    "SeTformerForTokenClassification",
    "SeTformerModel",
    "SeTformerTextConfig",
    "SeTformerTextModel",
]

for _config in (SeTformerConfig, SeTformerTextConfig):
    AutoConfig.register(_config.model_type, _config)

for _auto, _config, _model in (
    (AutoModel, SeTformerConfig, SeTformerModel),
    (AutoBackbone, SeTformerConfig, SeTformerBackbone),
    (AutoModelForImageClassification, SeTformerConfig, SeTformerForImageClassification),
    (AutoModel, SeTformerTextConfig, SeTformerTextModel),
    (AutoModelForSequenceClassification, SeTformerTextConfig, SeTformerForSequenceClassification),
    (AutoModelForTokenClassification, SeTformerTextConfig, SeTformerForTokenClassification),
    (AutoModelForMaskedLM, SeTformerTextConfig, SeTformerForMaskedLM),
):
    _auto.register(_config, _model)
