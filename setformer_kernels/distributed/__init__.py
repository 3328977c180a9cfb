"""Models on several ranks, by torch.distributed: what is here is imported with the first use of it."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that has it.  Nothing imports torch.distributed before it is asked for.
NAMES = {
    "SeTParallel": "tensor_parallel",
    "clip_grad_norm_": "sharding",
    "full_state_dict": "of_rank",
    "fully_shard": "sharding",
}

__all__ = list(NAMES)


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})
