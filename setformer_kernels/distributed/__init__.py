"""One sequence, or its heads, over many devices, on torch.distributed, which nothing else here imports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .of_rank import full_state_dict
    from .sharding import clip_grad_norm_, fully_shard
    from .tensor_parallel import SeTParallel

_HOMES = {
    "SeTParallel": "tensor_parallel",
    "clip_grad_norm_": "sharding",
    "full_state_dict": "of_rank",
    "fully_shard": "sharding",
}

__all__ = ["SeTParallel", "clip_grad_norm_", "full_state_dict", "fully_shard"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
