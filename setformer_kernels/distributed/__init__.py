"""One sequence, or its heads, over many devices, on torch.distributed, which nothing else here imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import CPContext, build_cp_context
    from .models import context_parallel
    from .simulated import Ranks

_HOMES = {
    "CPContext": "context",
    "Ranks": "simulated",
    "build_cp_context": "context",
    "context_parallel": "models",
}

__all__ = ["CPContext", "Ranks", "build_cp_context", "context_parallel"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
