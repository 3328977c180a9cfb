"""Saved beside a SeTformer, so that transformers finds its classes where nothing has imported them yet:

pip install "setformer-kernels[transformers]", then AutoModel.from_pretrained(folder, trust_remote_code=True).
"""

from setformer_kernels.models.transformers import (  # noqa: F401
    SeTformerBackbone,
    SeTformerCausalConfig,
    SeTformerCausalModel,
    SeTformerConfig,
    SeTformerForCausalLM,
    SeTformerForImageClassification,
    SeTformerForMaskedLM,
    SeTformerForSequenceClassification,
    SeTformerForTokenClassification,
    SeTformerModel,
    SeTformerTextConfig,
    SeTformerTextModel,
)
