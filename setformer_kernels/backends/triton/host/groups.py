"""What kernels take together.  Strides and counts stay apart: Triton specialises on every member of a group.

Groups of compile-time numbers have capital members; in those of tensors a member may be None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ....problem import Operands, Options
from .launch import Device
from .tiles import Tile, padded, power_of_two


class Sizes(NamedTuple):
    """The sides of a call's tensors, and the powers of two that their tiles have."""

    M: int
    MP: int
    D: int
    DP: int
    E: int
    EP: int
    P: int
    PP: int


class Cut(NamedTuple):
    """A tile, as one call's kernels use it."""

    ROWS: int  # tokens of a step
    DEPTH: int  # columns of queries, keys and references in one product
    VDEPTH: int  # columns of values and outputs
    STEP: int  # unit of the strides of tokens, see `rows.stride_step`
    PRECISION: str  # of float32 products
    ACROSS: bool = False  # warps share the references, see `primitives.tokens_by`


class Rule(NamedTuple):
    """Which formulas a kernel follows."""

    DOT: bool  # κ is the dot product, else rbf
    UPDATE_ROWS: bool  # T ≥ 1
    RANGE: str = "tile"  # see `plan.range_known`
    REPEAT: bool = False  # T ≥ 2
    LOG_B: bool = False  # d log b is wanted


class Scalars(NamedTuple):
    """Numbers that no kernel is compiled for."""

    seed: Tensor | None  # [] int64 of dropout
    keep_scale: float  # 1/(1 − p)
    uniform: float = 0.0  # log2 of a key's mass where none is given


def sizes_of(x: Operands) -> Sizes:
    """The sizes of one call."""
    (m, d), e = x.references.shape[1:], x.value.shape[-1]
    p = 0 if x.reference_position is None else x.reference_position.shape[-1]
    return Sizes(m, padded(m), d, padded(d), e, padded(e), p, power_of_two(p))


def cut_of(tile: Tile, sizes: Sizes, device: Device, step: int, across: bool = False) -> Cut:
    """How a tile cuts tokens of these sizes."""
    return Cut(tile.rows, min(tile.depth, sizes.DP), min(tile.depth, sizes.EP), step, device.precision, across)


def rule_of(opt: Options, **more: Any) -> Rule:
    """The formulas of one call."""
    return Rule(opt.kernel == "dot", opt.num_iters > 0, **more)
