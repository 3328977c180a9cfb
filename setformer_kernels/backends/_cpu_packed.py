"""The packed half of the C++ CPU backend: sequences of any lengths one after another, [1, H, T, ·], cut by offsets.

`cpu` is its face.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import NO_STREAM, Operands, Options, Stream, compute_dtype, empty_in_order, is_plain
from ..reference.packed import masses, segments
from ..reference.state import empty_like as empty_state_like
from . import _extension
from ._extension import MODULE, on_cpu, stream_gradients, views

_C: Any = MODULE


def _unpacked_masses(x: Operands, cu: Tensor) -> Operands:
    """With log masses normalised segment by segment, as those of one alone are, bit for bit."""
    if x.log_a is None:
        return x
    given = x.log_a[:, :1] if x.log_a.stride(1) == 0 else x.log_a
    log_a = torch.full_like(given, -math.inf)
    for first, last in segments(cu, given.shape[2]):
        if first < last:
            log_a[:, :, first:last] = masses(given[:, :, first:last])
    return x._replace(log_a=log_a.expand(x.log_a.shape))


def _clear_slack(t: Tensor | None, cu: Tensor) -> None:
    """0 for the tokens behind the last segment, which no kernel goes to."""
    if t is not None:
        t[:, :, int(cu[-1]) :].zero_()


def _packed(x: Operands, opt: Options, cu_q: Tensor | None, cu_k: Tensor) -> tuple[Tensor, ...]:
    """(o where there are queries, z [N, H, M, E], c [N, H, max(T, 1), M])."""
    x = _unpacked_masses(x, cu_k)
    o = None if x.query is None else empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    (h, m, _), n, wide = x.references.shape, cu_k.shape[0] - 1, compute_dtype(x.key.dtype)
    shapes = ((n, h, m, x.value.shape[3]), (n, h, max(opt.num_iters, 1), m))
    state = tuple(x.key.new_empty(shape, dtype=wide) for shape in shapes)
    _C.packed(*on_cpu(x, opt), *views((cu_q, cu_k, o, *state)), False, None, None, None)
    if cu_q is not None:
        _clear_slack(o, cu_q)
    return tuple(t for t in (o, *state) if t is not None)


def _packed_backward(
    x: Operands,
    opt: Options,
    offsets: tuple[Tensor | None, Tensor],
    state: tuple[Tensor | None, Tensor | None],
    incoming: tuple[Tensor | None, ...],
    needs: Sequence[bool],
    causal: bool = False,
    stream: tuple[Any, ...] = (None,) * 5,
) -> Operands:
    """x: with masses of `_unpacked_masses`, through whose normaliser no gradient passes: shifting them all by one
    number changes nothing.  `stream`: views of gates and states, and of the gradients of the states after, the gates
    and the states before."""
    cu_q, cu_k = offsets
    given = (*on_cpu(x, opt), *views((*offsets, *state)))
    grads = _extension.attention_backward(
        x,
        needs,
        cu_k.shape[0] - 1,
        lambda grads: _C.packed_backward(*given, (*views(incoming), *grads), causal, *stream),
    )
    for t in (grads.key, grads.value, grads.log_a):
        _clear_slack(t, cu_k)
    if cu_q is not None:
        _clear_slack(grads.query, cu_q)
    return grads


def packed(x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, ...]:
    """o [1, H, L, E], z [N, H, M, E], c [N, H, max(T, 1), M] of a packed batch; x.log_a: unnormalised log masses."""
    return _packed(x, opt, cu_q, cu_k)


def packed_pool(x: Operands, opt: Options, cu: Tensor) -> tuple[Tensor, ...]:
    """z [N, H, M, E], c [N, H, max(T, 1), M]."""
    return _packed(x._replace(query=None, query_position=None), opt, None, cu)


def packed_causal(
    x: Operands, opt: Options, cu: Tensor, stream: Stream = NO_STREAM, with_state: bool = False
) -> tuple[Tensor, Tensor]:
    """o [1, H, L, E] for T <= 1, and the states after the last keys."""
    assert x.query is not None
    o = empty_in_order(x.query, (*x.query.shape[:-1], x.value.shape[-1]))
    state = empty_state_like(x, with_state, cu.shape[0] - 1)
    x = _unpacked_masses(x, cu) if is_plain(stream, with_state) else x
    gates, before, after = views((*stream, state if with_state else None))
    _C.packed(*on_cpu(x, opt), *views((cu, cu, o, None, None)), True, gates, before, after)
    _clear_slack(o, cu)
    return o, state


def packed_backward(
    x: Operands, opt: Options, cu_q: Tensor, cu_k: Tensor, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, of a packed batch."""
    return _packed_backward(_unpacked_masses(x, cu_k), opt, (cu_q, cu_k), (z, c), (d_o, None, None), needs)


def packed_pool_backward(
    x: Operands, opt: Options, cu: Tensor, z: Tensor, c: Tensor, d_z: Tensor, needs: Sequence[bool]
) -> Operands:
    """As `pool_backward`, of a packed batch."""
    x = _unpacked_masses(x, cu)._replace(query=None, query_position=None)
    return _packed_backward(x, opt, (None, cu), (z, c), (None, d_z, None), needs)


def packed_causal_backward(
    x: Operands,
    opt: Options,
    cu: Tensor,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream = NO_STREAM,
    with_state: bool = False,
    d_state: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """As `causal_backward`, of a packed batch."""
    d_stream = stream_gradients(stream, needs[len(x) :])
    normalised = _unpacked_masses(x, cu) if is_plain(stream, with_state) else x
    grads = _packed_backward(
        normalised, opt, (cu, cu), (None, None), (d_o, None, None), needs[: len(x)], True,
        views((*stream, d_state, *d_stream)),
    )  # fmt: skip
    _clear_slack(d_stream[0], cu)
    if d_stream[1] is not None and d_state is not None:  # a state without keys passes through as it is
        empty = cu[1:] == cu[:-1]
        d_stream[1][empty] = d_state[empty]
    return *grads, *d_stream
