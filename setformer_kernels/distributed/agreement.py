"""Ranks that find out that they are about to do different things, before one waits for another for ever.

The first call of a kind is compared over the ranks: what is the same for all tokens of a sequence, and whether the
arguments passed the checks.  A rank whose arguments did not pass says so, and all raise.  Later calls of that kind cost
nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ..problem import HYPER
from .ranks import WORDS, Communicator

Found = TypeVar("Found")
ROOM = 800  # characters of an error that fit into what a rank may say beside its facts
# Sizes that ranks share; those of tokens are a rank's own.
SIZES = {"query": (0, 1, 3), "key": (0, 1, 3), "value": (0, 1, 3), "references": (0, 1, 2)}


def digest(values: Any) -> str:
    """What tells two long facts apart."""
    return hashlib.sha256(str(values).encode()).hexdigest()[:16]


def facts_of(tensors: tuple[Any, ...], constants: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks have to have alike, of arguments that nobody has checked: name -> how it is said in a message."""
    query, key, value, references, hyper, *_ = tensors
    facts: dict[str, Any] = {}
    for name, t in (("query", query), ("key", key), ("value", value), ("references", references)):
        if isinstance(t, Tensor) and not t.is_nested:  # of which some have no shape
            shape = [t.shape[at] if at < t.ndim else None for at in SIZES[name]]
            facts[name] = f"{t.dtype} {shape}" if name != "references" else f"{shape}"
    for name, value in constants.items():
        if name != "seed":
            facts[name] = value if isinstance(value, (str, int, float)) else type(value).__name__
    for name, number in zip(HYPER, hyper, strict=True):
        facts[name] = float(number) if isinstance(number, (int, float)) else type(number).__name__
    return facts


def agreed(
    ranks: Communicator, known: dict[str, int], op: str, facts: dict[str, Any], check: Callable[[], Found],
    tokens: int = 0,
) -> tuple[Found, int]:  # fmt: skip
    """What `check` returns, and how many tokens all ranks had when calls of this kind were first compared.

    ValueError on every rank where `check` raises on one, or where the facts of two differ; `known`: those compared.
    """
    kind = json.dumps([op, facts], ensure_ascii=False, default=str)
    if ranks.size == 1:
        return check(), known.setdefault(kind, tokens)
    found, error = None, None
    try:
        found = check()
    except Exception as raised:  # whatever it is, the others wait for this rank's word
        error = raised
    if kind not in known:
        known[kind] = _compare(ranks, op, facts, error, tokens)
    if error is not None:
        raise error
    return found, known[kind]  # type: ignore[return-value]


def _compare(ranks: Communicator, op: str, facts: dict[str, Any], error: Exception | None, tokens: int) -> int:
    """The tokens of all ranks."""
    mine = {"op": op, "facts": facts, "tokens": tokens, "error": None if error is None else str(error)[:ROOM]}
    mine |= {"kind": type(error).__name__}
    text = json.dumps(mine, ensure_ascii=False, default=str)
    if len(text.encode()) > WORDS:
        text = json.dumps(mine | {"facts": {"arguments": digest(facts)}}, ensure_ascii=False)
    all_said = [json.loads(said) for said in ranks.told(text)]
    if error is not None:
        raise error
    for rank, said in enumerate(all_said):
        if said["error"] is not None:
            kind = {"TypeError": TypeError, "ValueError": ValueError}.get(said["kind"], RuntimeError)
            raise kind(f"{said['error']} (on rank {rank} of the cp_context)")
    _same("call", [said["op"] for said in all_said])
    for name in sorted({name for said in all_said for name in said["facts"]}):
        _same(name, [said["facts"].get(name) for said in all_said])
    return sum(said["tokens"] for said in all_said)


def _same(name: str, values: list[Any]) -> None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise ValueError(
            f"{name} must be the same on all ranks of a cp_context, got {values[0]} on rank 0 and {values[other]} on "
            f"rank {other}"
        )
