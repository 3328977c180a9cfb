"""What the kernels of one call share, as the host brings it: rows of tokens, the mask, tiles, and heads in parts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.softmax import dropout_constants
from ..host.groups import Dropout, Group, Sizes, cut_of, rule_of, sizes_of
from ..host.launch import device_of
from ..host.rows import stride_step, unit_rows
from ..host.tiles import Tile, tile
from ..parameters.prepare import References, prepare
from .walks import SAFE

LOG_QUERIES = 16  # of a tile of the log domain, whose keys are `rows` of its kind
# Kinds of kernels that multiply by e^{ℓ−m}: cut otherwise where these factors are wider than the tokens.
FACTORED = ("masked", "masked_backward", "masked_keys_backward", "masked_mask_backward")


class Mask(NamedTuple):
    """A mask as kernels read it."""

    tensor: Tensor | None  # [B or 1, H or 1, L, S], uint8 or float32
    strides: tuple[int, ...]  # 0 along dimensions that are broadcast
    heads: tuple[int, int]  # how many of batch elements and heads have one of their own

    @property
    def strided(self) -> tuple[Any, ...]:
        """The tensor and its strides."""
        return (self.tensor, *self.strides)


@dataclass(frozen=True, eq=False)
class Way(Group):
    """How a kernel walks."""

    ROWS: int  # queries of a tile
    KEYS: int  # keys of a tile
    BLOCK: int  # queries that are computed by products or in logs together
    MORE: bool  # T ≥ 2
    LOGS: bool
    CAUSAL: bool
    UNIT: bool  # λ_a is the number 1


_way = functools.cache(Way)


class Walk(NamedTuple):
    """What a launch of such a kernel takes."""

    rows: int
    keys: int
    tile: Tile
    constants: dict[str, Any]


class Arguments(NamedTuple):
    """One call."""

    x: Operands
    opt: Options
    mask: Mask
    causal: bool
    prepared: References
    dropout: Dropout
    threshold: int
    sizes: Sizes
    always: bool  # whether products hold whatever the values: nothing runs in the log domain

    @property
    def lengths(self) -> tuple[int, int, int]:
        """H, L and S."""
        assert self.x.query is not None
        return self.x.key.shape[1], self.x.query.shape[2], self.x.key.shape[2]

    @property
    def heads(self) -> int:
        """B·H."""
        return self.x.key.shape[0] * self.x.key.shape[1]

    @property
    def far(self) -> bool:
        """Whether e^{ℓ−m} and what multiplies it are wider than the tokens: two bfloat16 each.

        float16 has too few exponents.  Positions may lie far from all references but one: then dℓ is what is left of
        terms that cancel, and their rounding to bfloat16 is 2 to 10 times the error budget; two are 2^9 times as fine.
        """
        placed = self.x.reference_position is not None
        return self.x.key.element_size() == 2 and (placed or self.x.key.dtype == torch.float16)

    def tile(self, kind: str) -> Tile:
        """The tile of a kind of kernel."""
        sizes, key = self.sizes, self.x.key
        if kind in FACTORED and self.far:
            kind = kind.replace("masked", "masked_far")
        return tile(kind, device_of(key).family, max(sizes.MP, sizes.DP, sizes.EP), key.element_size(), sizes.MP)

    def constants(self, t: Tile, *tokens: Tensor | None) -> dict[str, Any]:
        """The compile-time arguments of kernels that read such tokens."""
        device, step = device_of(self.x.key), stride_step(*tokens)
        cut = cut_of(t, self.sizes, device.in_parts if self.far else device, step)
        return {"rule": rule_of(self.opt).compiled, "sizes": self.sizes.compiled, "cut": cut.compiled}

    def ways(self, kind: str, *tokens: Tensor | None) -> list[Walk]:
        """How kernels of a kind walk: by products, and in the log domain where those may not hold."""
        block, found = self.tile("masked").rows, []
        more, unit = self.opt.num_iters > 1, self.x.key_relaxation is None and self.opt.scalars[2] == 1.0
        for logs in (False,) if self.always else (False, True):
            t = self.tile(kind.replace("masked", "masked_logs") if logs else kind)
            rows = LOG_QUERIES if logs else t.rows
            keys = t.keys or t.rows
            way = _way(rows, keys, block, more, logs, self.causal, unit)
            found.append(Walk(rows, keys, t, {"way": way.compiled} | self.constants(t, *tokens)))
        return found


def arguments(x: Operands, mask: Tensor | None, opt: Options, causal: bool) -> Arguments:
    """The arguments of one call; launches the preparation of its references."""
    names = ("query", "key", "value", "query_position", "key_position")
    x = replaced(x, **{name: unit_rows(getattr(x, name)) for name in names})
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    dropout = Dropout(x.seed, keep_scale)
    return Arguments(
        x, opt, mask_argument(mask), causal, prepare(x, opt), dropout, threshold, sizes_of(x), always_narrow(x, opt)
    )


def mask_argument(mask: Tensor | None) -> Mask:
    """A mask without what it is broadcast along."""
    if mask is None:
        return Mask(None, (0, 0, 0, 0), (1, 1))
    seen = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    own = [n if stride else min(n, 1) for n, stride in zip(mask.shape[:2], mask.stride(), strict=False)]
    strides = [stride if n > 1 else 0 for n, stride in zip((*own, 2, 2), mask.stride(), strict=True)]
    return Mask(seen, tuple(strides), (own[0], own[1]))


def always_narrow(x: Operands, opt: Options) -> bool:
    """Whether numbers for β and ε bound all logits by `SAFE`, and references of equal mass do not add to it."""
    given = (x.bandwidth, x.epsilon, x.log_b, x.reference_position)
    bandwidth, epsilon = opt.scalars[:2]
    return opt.kernel == "rbf" and given == (None,) * 4 and (1 - math.exp(-2 * bandwidth)) / epsilon <= SAFE


def pieces(length: int, rows: int) -> int:
    """How many blocks of so many rows a length has."""
    return -(-length // rows)
