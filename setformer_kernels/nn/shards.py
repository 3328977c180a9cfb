"""Modules on a shard of a sequence: what only whole sequences have, and contexts that know no SeT attention."""

from __future__ import annotations

import sys

import torch.nn.functional as F

# Where releases of torch keep the functions that their context_parallel has replaced.
PATCHES = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)


SOFTMAX = F.scaled_dot_product_attention  # while it is this one, nobody has replaced it


def softmax_is_sharded() -> bool:
    """Whether this runs inside torch's context_parallel, which Accelerate's is: it has replaced softmax attention."""
    replaced = [getattr(sys.modules.get(name), "_replaced_functions", None) for name in PATCHES]
    return any(functions and F.scaled_dot_product_attention in functions for functions in replaced)


# What torch.compiler.assume_constant_result does, which imports dynamo and with it a second of modules.
softmax_is_sharded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_shards_of_others() -> None:
    if softmax_is_sharded():
        raise RuntimeError(
            "SeT attention without a cp_context inside torch's context_parallel, which shards softmax attention alone: "
            "each rank would attend to its own shard. Call distributed.context_parallel(model, mesh) instead"
        )


def whole_only(context: object, **what: object) -> None:
    """ValueError where a module with a context is asked for what only whole sequences have."""
    for name, asked in what.items():
        if context is not None and asked:
            raise ValueError(f"{name} goes without cp_context: the module's tokens are a shard of a sequence")
