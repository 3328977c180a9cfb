"""What transformers' tensor parallelism needs to know of the models; nothing, of releases with another interface."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

KNOWN = find_spec("transformers.distributed") is not None and find_spec("transformers.distributed.tensor_parallel")


def plan_of(blocks: str) -> dict[str, Any] | None:
    """`base_model_tp_plan` of a model with such blocks."""
    if not KNOWN:
        return None
    from ...distributed import transformers

    return transformers.plan_of(blocks)


def name_transports(model: Any) -> None:
    """Adds what took the place of softmax to the plan of a converted model."""
    if KNOWN:
        from ...distributed import transformers

        transformers.name_transports(model)
