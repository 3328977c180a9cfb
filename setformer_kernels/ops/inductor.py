"""What torch.compile's Inductor has to be told of ops that have a decomposition for exporters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

INDUCTOR = "torch._inductor.lowering"


def called_by_inductor(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which sees to it that Inductor calls `op`: unasked it does so too, but where the environment has CI it
    takes the decomposition for one that was forgotten, and raises.

    Inductor runs the fake kernels of a graph before it lowers the graph.  It is imported by then, and not by us.
    """

    @functools.wraps(fake)
    def known(*args: Any) -> Any:
        lowering = sys.modules.get(INDUCTOR)
        if lowering is not None and op not in lowering.lowerings:
            # as for any op of a library: strides as they were traced, where this torch can, or else their order
            strides = getattr(lowering, "constrain_to_fake_tensors", lowering.constrain_to_fx_strides)
            lowering.make_fallback(op, strides, warn=False)
        return fake(*args)

    return known
