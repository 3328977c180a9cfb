"""Why nn.TransformerEncoderLayer calls SeT attention in eval, instead of computing softmax attention from its weights.

In eval the layer hands the projection weights of its `self_attn` to a C++ kernel of softmax attention, without calling
`self_attn.forward`, unless one of the conditions it reads says no.  Most are facts about the weights, which others read
too and which must stay true (`in_proj_bias`, `_qkv_same_embed_dim`, `batch_first`, `num_heads`).  One is free: that
some module inside the layer has a forward hook.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


def keep_python_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook that is there to be counted."""


class _StandingHook:
    """In the place of `_forward_pre_hooks`: a dict of hooks in which `keep_python_forward` is found at every look."""

    def __get__(self, module: nn.Module, owner: type | None = None) -> OrderedDict[int, Any]:
        hooks = module.__dict__.setdefault("_forward_pre_hooks", OrderedDict())
        hooks.setdefault(-1, keep_python_forward)  # the keys of registered hooks count up from 0
        return hooks

    def __set__(self, module: nn.Module, hooks: OrderedDict[int, Any]) -> None:
        module.__dict__["_forward_pre_hooks"] = hooks


class PythonForward(nn.Module):
    """A child without parameters that is never called, so its hook costs nothing and no tracer meets it.

    Clearing hooks, by any way of doing so, leaves it what it is; so do copies, pickles and exchanged parameters.
    """

    _forward_pre_hooks = _StandingHook()
