"""The keyword arguments that overloads name are those of the functions."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest

import setformer_kernels.functional as SF
from setformer_kernels import ot, signatures

FUNCTIONS: dict[str, tuple[Callable[..., Any], type]] = {
    "set_attention": (SF.set_attention, signatures.Attention),
    "set_pool": (SF.set_pool, signatures.Transport),
    "set_transport": (SF.set_transport, signatures.Transport),
    "sinkhorn": (SF.sinkhorn, signatures.Convergence),
    "transport_plan": (ot.transport_plan, signatures.Plan),
    "transport_cost": (ot.transport_cost, signatures.Cost),
}
ALIASES = {"Rho": "Hyper | tuple[Hyper, Hyper] | None"}
APART = {"return_info", "epsilon"}  # what the overloads of some write themselves


@pytest.mark.parametrize(("function", "stands_for"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_overloads_name_every_keyword_argument(function: Callable[..., Any], stands_for: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    wanted = {p.name: ALIASES.get(p.annotation, p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}
    found = {name: reference.__forward_arg__ for name, reference in stands_for.__annotations__.items()}
    assert {n: t for n, t in found.items() if n not in APART} == {n: t for n, t in wanted.items() if n not in APART}


def test_what_comes_back_follows_return_info() -> None:
    """As a type checker sees it: `typing.get_overloads` has them from Python 3.11 on."""
    if not hasattr(typing, "get_overloads"):
        pytest.skip("typing.get_overloads is Python 3.11's")
    for function, _ in FUNCTIONS.values():
        plain, informed, either = typing.get_overloads(inspect.unwrap(function))
        assert "TransportInfo" not in plain.__annotations__["return"]
        assert plain.__annotations__["return_info"] == "Literal[False]"
        assert "TransportInfo" in informed.__annotations__["return"]
        assert informed.__annotations__["return_info"] == "Literal[True]"
        assert either.__annotations__["return_info"] == "bool"
