"""Attention and pooling: keys onto references, then queries read from these.

Defined by `reference.attention.attention` and `reference.attention.pool`; packed batches, of which a program walks one
head of one segment, by `reference.packed.packed` and `reference.packed.packed_pool`.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Operands, Options
from ..host.groups import Segments
from ..parameters.prepare import prepare
from .read import read
from .transport import transport


def attention(x: Operands, opt: Options) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, L, E], z [B, H, M, E], c [B, H, max(T, 1), M]."""
    prepared = prepare(x, opt)
    z, c = transport(x, opt, prepared)
    return read(x, opt, prepared, z, c), z, c


def pool(x: Operands, opt: Options) -> tuple[Tensor, Tensor]:
    """z [B, H, M, E], c [B, H, max(T, 1), M]."""
    return transport(x, opt, prepare(x, opt))


def packed(x: Operands, opt: Options, at: tuple[Segments, Segments]) -> tuple[Tensor, Tensor, Tensor]:
    """o [1, H, L, E], z [N, H, M, E], c [N, H, max(T, 1), M]; at: the segments of queries and of keys."""
    prepared = prepare(x, opt)
    z, c = transport(x, opt, prepared, at[1])
    return read(x, opt, prepared, z, c, at[0]), z, c


def packed_pool(x: Operands, opt: Options, keys_at: Segments) -> tuple[Tensor, Tensor]:
    """z [N, H, M, E], c [N, H, max(T, 1), M]."""
    return transport(x, opt, prepare(x, opt), keys_at)
