"""Attention, pooling and the halves: keys onto references, then queries read from these.

Defined by `reference.attention.attention`, `reference.attention.pool` and `reference.memory`; packed batches, of which
a program walks one head of one segment, by `reference.packed.packed` and `reference.packed.packed_pool`.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Operands, Options
from ..host.groups import Segments
from ..parameters.prepare import prepare
from .read import read as read_prepared
from .transport import transport as transport_prepared


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]."""
    prepared = prepare(x, opt)
    z, g, c = transport_prepared(x, opt, prepared)
    return read_prepared(x, opt, prepared, z, g), z, c


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E], c [B, H, max(T, 1), M]."""
    z, _, c = transport(x, opt)
    return z, c


def transport(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, H, M, E], g [B, H, M], c [B, H, max(T, 1), M]."""
    return transport_prepared(x, opt, prepare(x, opt))


def read(x: Operands, opt: Options, z: Tensor, g: Tensor) -> Tensor:
    """o [B, H, L, E]."""
    return read_prepared(x, opt, prepare(x, opt), z.contiguous(), g.contiguous())


def packed(x: Operands, opt: Options, at: tuple[Segments, Segments]) -> tuple[Tensor, Tensor, Tensor]:
    """o [1, H, L, E], z [N, H, M, E], c [N, H, max(T, 1), M]; at: the segments of queries and of keys."""
    prepared = prepare(x, opt)
    z, g, c = transport_prepared(x, opt, prepared, at[1])
    return read_prepared(x, opt, prepared, z, g, at[0]), z, c


def packed_pool(x: Operands, opt: Options, keys_at: Segments) -> tuple[Tensor, Tensor]:
    """z [N, H, M, E], c [N, H, max(T, 1), M]."""
    z, _, c = transport_prepared(x, opt, prepare(x, opt), keys_at)
    return z, c
