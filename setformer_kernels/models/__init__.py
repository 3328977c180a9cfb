"""SeTformer models: transformers for images and text whose attention is SeT attention."""

from .causal import CausalDecoder, CausalLM, Past
from .convert import ReplacementReport, replace_attention
from .layers import initialize_references
from .sizes import VISION_SIZES, VisionSize
from .text import MaskedLMHead, Pooler, SequenceHead, TextEncoder, TextModel, TokenHead
from .vision import SeTformer, setformer_base, setformer_nano, setformer_small, setformer_tiny

__all__ = [
    "VISION_SIZES",
    "CausalDecoder",
    "CausalLM",
    "MaskedLMHead",
    "Past",
    "Pooler",
    "ReplacementReport",
    "SeTformer",
    "SequenceHead",
    "TextEncoder",
    "TextModel",
    "TokenHead",
    "VisionSize",
    "initialize_references",
    "replace_attention",
    "setformer_base",
    "setformer_nano",
    "setformer_small",
    "setformer_tiny",
]
