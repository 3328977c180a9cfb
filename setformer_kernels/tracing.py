"""torch.fx: a call that gets a Proxy becomes one node, as calls of torch's functions and of nn.MultiheadAttention do.

torch.fx decides by the name of a class's module what is a leaf, which no class outside torch.nn can have: so it is the
call that looks for a Proxy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

P = ParamSpec("P")
R = TypeVar("R")


PLAIN = frozenset((Tensor, nn.Parameter, NoneType, str, bool, int, float))  # what calls are mostly made of


def _proxy_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Proxy | None:
    plain = not torch.compiler.is_compiling()  # torch 2.6 cannot compile what follows
    if plain and PLAIN.issuperset(map(type, args)) and PLAIN.issuperset(map(type, kwargs.values())):
        return None
    for value in args:
        if isinstance(value, Proxy):
            return value
    for value in kwargs.values():
        if isinstance(value, Proxy):
            return value
    return None


def leaf(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the top level of a module, whose calls with a Proxy torch.fx records as `call_function`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        proxy = _proxy_among(args, kwargs)
        if proxy is None:
            return function(*args, **kwargs)
        return cast(R, proxy.tracer.create_proxy("call_function", call, args, kwargs))

    return call


class Leaf(nn.Module):
    """Mixin: a module whose calls with a Proxy torch.fx records as `call_module`, hooks included."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = _proxy_among(args, kwargs)
        if proxy is None or not isinstance(proxy.tracer, Tracer):
            return super()._call_impl(*args, **kwargs)
        # Not in forward: the hooks around it would run once now, on the Proxy, and again in every call of the node.
        return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)
