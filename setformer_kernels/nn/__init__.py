"""Layers built on SeT attention."""

from .attention import SeTAttention
from .contract import AttentionInputError
from .pooling import SeTPooling

__all__ = ["AttentionInputError", "SeTAttention", "SeTPooling"]
