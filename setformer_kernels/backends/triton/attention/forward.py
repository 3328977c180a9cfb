"""Attention and pooling: keys onto references, then queries read from these.

Defined by `reference.attention.attention` and `reference.attention.pool`.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Operands, Options
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
