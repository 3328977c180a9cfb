"""Backward of attention and of pooling: the passes over queries and keys, then the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...problem import Operands, Options, empty_in_order, replaced
from .config import padded, tile
from .gradients import new_partials, parameter_gradients, wants_parameters
from .launch import Split, device_of, split_tokens
from .plan_backward import Cotangents
from .prepare import prepare
from .read_backward import read_backward
from .transport_backward import KeyGradients, transport_backward


def attention_backward(x: Operands, opt: Options, z: Tensor, c: Tensor, d_o: Tensor, needs: Sequence[bool]) -> Operands:
    """Gradients in the order of `Operands`, None where not needed."""
    return _backward(x, opt, (z, c), (d_o, None, None), needs)


def pool_backward(
    x: Operands, opt: Options, z: Tensor, c: Tensor, d_z: Tensor, d_c: Tensor | None, needs: Sequence[bool]
) -> Operands:
    """As `attention_backward`, from the gradients of z and (where given) c."""
    x = replaced(x, query=None, query_position=None)
    return _backward(x, opt, (z, c), (None, d_z, d_c), needs)


def _backward(
    x: Operands, opt: Options, state: tuple[Tensor, Tensor], incoming: tuple[Tensor | None, ...], needs: Sequence[bool]
) -> Operands:
    d_o, d_z, d_c = incoming
    need = dict(zip(Operands._fields, needs, strict=True))
    prepared = prepare(x, opt)
    rows = {name: _rows(getattr(x, name), need[name]) for name in ("query", "key", "value", "log_a")}
    parameters = wants_parameters(x, needs)
    keys = parameters or any(rows[name] is not None for name in ("key", "value", "log_a"))
    queries = Split(0, 0) if x.query is None else _split(x, x.query)
    of_keys = _split(x, x.key)
    parts = new_partials(x, prepared, queries.programs + of_keys.programs, needs)
    part_z = None
    if d_o is not None:
        if keys:
            (b, h, _, e), mp = x.value.shape, prepared.y.shape[1]
            part_z = x.references.new_empty((b * h, queries.programs, mp, padded(e)))
        read_backward(x, opt, prepared, state, d_o, queries, rows["query"], part_z, parts)
    if keys:
        given = Cotangents(part_z, queries.programs, *(None if t is None else t.contiguous() for t in (d_z, d_c)))
        out = KeyGradients(rows["key"], rows["value"], rows["log_a"])
        transport_backward(x, opt, prepared, state, given, of_keys, out, parts, need["log_b"] and x.log_b is not None)
    found = {name: _in_order_of(getattr(x, name), t) for name, t in rows.items()}
    found |= parameter_gradients(x, opt, prepared, parts, needs)
    return Operands._make(found.get(name) for name in Operands._fields)


def _split(x: Operands, tokens: Tensor) -> Split:
    """How the tokens of a head are shared among programs."""
    device, (b, h, n, d) = device_of(tokens), tokens.shape
    widest = max(padded(x.references.shape[1]), padded(d), padded(x.value.shape[-1]))
    cut = tile("gradient", device.family, widest, tokens.element_size())
    return split_tokens(n, cut.rows, b * h, device.multiprocessors)


def _rows(like: Tensor | None, wanted: bool) -> Tensor | None:
    """An empty gradient of a token tensor with unit stride along its last dimension."""
    if like is None or not wanted:
        return None
    out = empty_in_order(like, like.shape)
    return out if like.ndim == 3 or out.stride(-1) == 1 else like.new_empty(like.shape)


def _in_order_of(like: Tensor | None, t: Tensor | None) -> Tensor | None:
    """`t` in the memory order of `like`: a copy only where the last dimension of that one is not innermost."""
    if t is None or like is None or like.ndim == 3:
        return t
    out = t if like.stride(-1) <= 1 else empty_in_order(like, like.shape)
    return t if out.stride(-1) == 1 else out.copy_(t)
