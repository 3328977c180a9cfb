"""SeTformer in Hugging Face transformers: importing this registers its classes with AutoConfig and AutoModel*."""

import transformers

from .causal import SeTformerCausalModel, SeTformerForCausalLM
from .configuration import SeTformerCausalConfig, SeTformerConfig, SeTformerTextConfig
from .conversion import from_pretrained
from .state_cache import StateCache
from .text import (
    SeTformerForMaskedLM,
    SeTformerForSequenceClassification,
    SeTformerForTokenClassification,
    SeTformerTextModel,
)
from .vision import SeTformerBackbone, SeTformerForImageClassification, SeTformerModel

__all__ = [
    "SeTformerBackbone",
    "SeTformerCausalConfig",
    "SeTformerCausalModel",
    "SeTformerConfig",
    "SeTformerForCausalLM",
    "SeTformerForImageClassification",
    "SeTformerForMaskedLM",
    "SeTformerForSequenceClassification",
    "SeTformerForTokenClassification",
    "SeTformerModel",
    "SeTformerTextConfig",
    "SeTformerTextModel",
    "StateCache",
    "from_pretrained",
]

for _config in (SeTformerConfig, SeTformerTextConfig, SeTformerCausalConfig):
    transformers.AutoConfig.register(_config.model_type, _config)
    for _auto, _model in _config.auto_classes.items():
        getattr(transformers, _auto).register(_config, globals()[_model])
