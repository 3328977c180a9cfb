"""One sequence, or its heads, over many devices, on torch.distributed, which nothing else here imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import CPContext, build_cp_context
    from .models import context_parallel
    from .of_rank import full_state_dict
    from .sharding import clip_grad_norm_, fully_shard
    from .simulated import Ranks
    from .tensor_parallel import SeTParallel

_HOMES = {
    "CPContext": "context",
    "Ranks": "simulated",
    "SeTParallel": "tensor_parallel",
    "build_cp_context": "context",
    "clip_grad_norm_": "sharding",
    "context_parallel": "models",
    "full_state_dict": "of_rank",
    "fully_shard": "sharding",
}

__all__ = [
    "CPContext",
    "Ranks",
    "SeTParallel",
    "build_cp_context",
    "clip_grad_norm_",
    "context_parallel",
    "full_state_dict",
    "fully_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
