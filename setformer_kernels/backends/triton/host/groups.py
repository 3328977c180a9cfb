"""What kernels take together.  Strides and counts stay apart: Triton specialises on every member of a group.

Groups of compile-time numbers have capital members.  What makes them is cached (no length enters, so there are few): a
launch finds the form that kernels take ready-made.  In groups of tensors a member may be None.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from .launch import Device
from .tiles import Tile, padded, power_of_two


class Group:
    """Compile-time numbers: attributes on the host, members of a named tuple in a kernel."""

    @functools.cached_property
    def compiled(self) -> Any:
        """The form in which kernels take them."""
        members = {field.name: tl.constexpr(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return _named(type(self).__name__, tuple(members))(**members)


@functools.cache
def _named(name: str, members: tuple[str, ...]) -> Any:
    return namedtuple(name, members)


@dataclass(frozen=True, eq=False)
class Sizes(Group):
    """The sides of a call's tensors, and the powers of two that their tiles have."""

    M: int
    MP: int
    D: int
    DP: int
    E: int
    EP: int
    P: int
    PP: int


@dataclass(frozen=True, eq=False)
class Cut(Group):
    """A tile, as one call's kernels use it."""

    ROWS: int  # tokens of a step
    DEPTH: int  # columns of queries, keys and references in one product
    VDEPTH: int  # columns of values and outputs
    STEP: int  # unit of the strides of tokens, see `rows.stride_step`
    PRECISION: str  # of float32 products, see `primitives.dot`
    ACROSS: bool = False  # warps share the references, see `primitives.tokens_by`


@dataclass(frozen=True, eq=False)
class KeysCut(Cut):
    """That of the keys' backward pass."""

    FRUGAL: bool = False  # see `Tile.frugal`


@dataclass(frozen=True, eq=False)
class Rule(Group):
    """Which formulas a kernel follows."""

    DOT: bool  # κ is the dot product, else rbf
    UPDATE_ROWS: bool  # T ≥ 1
    RANGE: str = "tile"  # see `plan.range_known`


class Dropout(NamedTuple):
    """What dropout takes beside its threshold."""

    seed: Tensor | None  # [] int64, None without dropout
    keep_scale: float  # 1/(1 − p)


class Segments(NamedTuple):
    """Where the rows of a packed batch's segments lie, in tables [N] on the device; None: a batch like any other."""

    first: Tensor | None = None  # int64
    length: Tensor | None = None  # int32
    uniforms: Tensor | None = None  # float32, log2 of a key's mass where none is given


def sizes_of(x: Operands) -> Sizes:
    """The sizes of one call."""
    m, d = x.references.shape[1:]
    return _sizes(m, d, x.value.shape[-1], 0 if x.reference_position is None else x.reference_position.shape[-1])


@functools.cache
def _sizes(m: int, d: int, e: int, p: int) -> Sizes:
    return Sizes(m, padded(m), d, padded(d), e, padded(e), p, power_of_two(p))


@functools.cache
def cut_of(tile: Tile, sizes: Sizes, device: Device, step: int, across: bool = False) -> Cut:
    """How a tile cuts tokens of these sizes."""
    return Cut(tile.rows, min(tile.depth, sizes.DP), min(tile.depth, sizes.EP), step, device.precision, across)


@functools.cache
def keys_cut_of(tile: Tile, sizes: Sizes, device: Device, step: int) -> KeysCut:
    """`cut_of`, for kernels that ask whether they are to be frugal."""
    depths = min(tile.depth, sizes.DP), min(tile.depth, sizes.EP)
    return KeysCut(tile.rows, *depths, step, device.precision, tile.across, tile.frugal)


def rule_of(opt: Options, known: str = "tile") -> Rule:
    """The formulas of one call; known: `plan.range_known`."""
    return _rule(opt.kernel == "dot", opt.num_iters > 0, known)


_rule = functools.cache(Rule)
