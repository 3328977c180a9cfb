"""Attention of existing models, replaced by SeT attention: a rule table a library."""

from .replace import replace_attention
from .report import ReplacementReport

__all__ = ["ReplacementReport", "replace_attention"]
