"""What a `cp_context` is to the functions that take one: who answers a call whose sequence lies on several ranks.

`distributed` has the one that there is.  Tokens are local shards; all ranks make the same calls in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import checks


class Sharded(ABC):
    """Answers calls on shards.  `tensors` are the positional arguments of `arguments.normalise`, `constants` its
    others; `others` is what goes without a context.  All unchecked: what is wrong on one rank is told to all."""

    @abstractmethod
    def attention(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], causal: Any, others: Mapping[str, Any]
    ) -> Tensor: ...  # fmt: skip

    @abstractmethod
    def transport(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """z [B, Hk, M, E] and g [B, Hk, M] of all keys, the same on every rank."""

    @abstractmethod
    def scan(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], initial_state: Any, wanted: Any, log_decay: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """o of this rank's queries, and the state after the last key of all where `wanted`."""

    @abstractmethod
    def packed(
        self, tensors: tuple[Any, ...], constants: Mapping[str, Any], offsets: tuple[Any, Any], causal: Any,
        streamed: tuple[Any, Any, Any],
    ) -> Any:  # fmt: skip
        """What `set_attention_varlen` returns; streamed: initial_state, output_final_state and log_decay."""

    @abstractmethod
    def windows(
        self, x: Tensor, reach: int, before: Tensor | None, wanted: bool
    ) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
        """Of this rank's tokens x [B, C, L] each piece [B, C, reach + l], behind the `reach` tokens before it in the
        sequence, and where `wanted` the last `reach` of all, the same on every rank; `before` [B, C, reach] stands
        before the first of all, zeros where it is None."""


def sharded(context: Any) -> Sharded:
    """`cp_context` as given, checked."""
    if not isinstance(context, Sharded):
        raise TypeError(
            f"cp_context must be what distributed.build_cp_context returned, or None, got {type(context).__name__}"
        )
    return context


def without(**others: Any) -> None:
    """ValueError where one of these arguments, which go without a context, is given."""
    for name, value in others.items():
        given = checks.plain(value)  # False of NumPy is not given, either
        if given is not None and given is not False:
            raise ValueError(f"{name} goes without cp_context: it is not computed over shards of the keys")
