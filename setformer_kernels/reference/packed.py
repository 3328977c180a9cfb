"""Packed batches: N segments one after another, each answered as if it were alone.

cu holds the N + 1 offsets of the segments, from 0 on: segment n has the rows cu[n] .. cu[n + 1] − 1.  What lies behind
the last offset belongs to nobody: it is never read, and its outputs and gradients are 0.  Dropout in a segment has the
seed plus the segment's first row of queries as its key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import NO_STREAM, Operands, Options, Stream, replaced, with_an_absent_key
from .attention import attention_with_state, causal_with_state, pool_with_state
from .attention import causal as causal_alone
from .dense import normalise_masses
from .state import empty_like
from .transport import INF

Rows = tuple[int, int]  # the first, and the one behind the last


def segments(cu: Tensor, total: int) -> list[Rows]:
    """The rows of every segment, within 0 .. total, and no segment ending before it begins."""
    at = [min(max(offset, 0), total) for offset in cu.tolist()]
    return [(first, max(first, last)) for first, last in itertools.pairwise(at)]


def masses(log_a: Tensor) -> Tensor:
    """log a [..., S] of one segment from unnormalised log masses; −∞ where a key takes no part."""
    log_mass, seen = normalise_masses(log_a)
    return torch.where(seen, log_mass, -INF)


def segment(x: Operands, queries: Rows, keys: Rows, normalised: bool = True) -> Operands:
    """The operands [1, H, ...] of one segment alone; x.log_a holds unnormalised log masses."""

    def cut(t: Tensor | None, rows: Rows) -> Tensor | None:
        return None if t is None else t[:, :, rows[0] : rows[1]]

    log_a = cut(x.log_a, keys)
    part = replaced(
        x,
        query=cut(x.query, queries),
        key=cut(x.key, keys),
        value=cut(x.value, keys),
        log_a=None if log_a is None else masses(log_a) if normalised else log_a,
        query_position=cut(x.query_position, queries),
        key_position=cut(x.key_position, keys),
        seed=None if x.seed is None else x.seed + queries[0],
    )
    return with_an_absent_key(part) if keys[0] == keys[1] else part


def _each(
    x: Operands, cu_q: Tensor, cu_k: Tensor, alone: Callable[[Operands], tuple[Tensor, ...]]
) -> list[list[Tensor]]:
    """The outputs of `alone` on every segment, output by output; of one without rows where there are no segments."""
    length = 0 if x.query is None else x.query.shape[2]
    pairs = list(zip(segments(cu_q, length), segments(cu_k, x.key.shape[2]), strict=True)) or [((0, 0), (0, 0))]
    return [list(column) for column in zip(*(alone(segment(x, *pair)) for pair in pairs), strict=True)]


def _in_place(parts: list[Tensor], cu: Tensor, total: int) -> Tensor:
    """[1, H, total, E] of the segments' rows, and 0 where there is none."""
    rows: list[Tensor] = []
    end = 0
    for (first, last), part in zip(segments(cu, total) or [(0, 0)], parts, strict=True):
        rows += [
            part.new_zeros((*part.shape[:2], max(first - end, 0), part.shape[3])),
            part[:, :, max(end - first, 0) :],
        ]
        end = max(end, last)
    return torch.cat([*rows, parts[0].new_zeros((*parts[0].shape[:2], total - end, parts[0].shape[3]))], 2)


def packed_with_state(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(o [1, H, L, E], z [N, H, M, E], c [N, H, max(T, 1), M])."""
    assert x.query is not None
    o, z, c = _each(x, cu_q, cu_k, lambda part: attention_with_state(part, opt))
    n = cu_k.shape[0] - 1
    return _in_place(o, cu_q, x.query.shape[2]), torch.cat(z)[:n], torch.cat(c)[:n]


def packed_pool_with_state(x: Operands, opt: Options, cu: Tensor) -> tuple[Tensor, Tensor]:
    """(z [N, H, M, E], c [N, H, max(T, 1), M]) in the compute dtype."""
    z, c = _each(x, torch.zeros_like(cu), cu, lambda part: pool_with_state(part, opt))
    return torch.cat(z)[: cu.shape[0] - 1], torch.cat(c)[: cu.shape[0] - 1]


def packed(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """o [1, H, L, E]."""
    return packed_with_state(x, opt, cu_q, cu_k)[0]


def packed_pool(x: Operands, opt: Options, cu: Tensor) -> Tensor:
    """z [N, H, M, E] in the dtype of the values."""
    return packed_pool_with_state(x, opt, cu)[0].to(x.value.dtype)


def packed_causal(x: Operands, opt: Options, cu: Tensor) -> Tensor:
    """Causal o [1, H, L, E] for T ≤ 1; the segments of queries are those of keys."""
    assert x.query is not None

    def alone(part: Operands) -> tuple[Tensor, ...]:
        assert part.query is not None
        empty = part.query.shape[2] == 0  # whose one key stands for none
        return (attention_with_state(part, opt)[0] if empty else causal_alone(part, opt),)

    (o,) = _each(x, cu, cu, alone)
    return _in_place(o, cu, x.query.shape[2])


def packed_causal_with_state(x: Operands, opt: Options, cu: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    """Causal o [1, H, L, E] for T ≤ 1, and the states [N, H, M, 2E + 3] after the last keys, with gates [1, H, S] and
    the states before the first ones.  Masses are taken as they are: a segment does not know those before it."""
    assert x.query is not None
    at = segments(cu, x.key.shape[2])
    found = [_piece(x, opt, stream, n, rows) for n, rows in enumerate(at)] or [_piece(x, opt, NO_STREAM, 0, (0, 0))]
    o, states = ([*column] for column in zip(*found, strict=True))
    return _in_place(o, cu, x.query.shape[2]), torch.cat(states)[: len(at)]


def _piece(x: Operands, opt: Options, stream: Stream, n: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """o and the state after segment n, which goes on from the state of its number."""
    part, before = segment(x, rows, rows, normalised=False), stream.initial_state
    before = None if before is None else before[n : n + 1]
    if rows[0] == rows[1]:  # whose one key stands for none
        state = empty_like(part).zero_() if before is None else before.clone()
        return attention_with_state(part, opt)[0], state
    gates = None if stream.log_decay is None else stream.log_decay[:, :, rows[0] : rows[1]]
    return causal_with_state(part, opt, Stream(gates, before))
