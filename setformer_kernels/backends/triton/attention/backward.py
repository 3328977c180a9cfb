"""Backward of attention and of pooling: the passes over queries and keys, then the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Operands, Options, replaced
from ..device.gradients import gradient_split, gradient_tile
from ..host.groups import Segments, sizes_of
from ..host.launch import Split
from ..host.rows import TOKENS, token_gradients
from ..host.tiles import padded
from ..parameters.gradients import new_partials, parameter_gradients, wants_parameters
from ..parameters.prepare import prepare
from .plan_backward import Cotangents
from .read import Pooled
from .read_backward import read_backward as read_backward_prepared
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


def packed_backward(
    x: Operands, opt: Options, at: tuple[Segments, Segments], state: tuple[Tensor, Tensor],
    incoming: tuple[Tensor | None, ...], needs: Sequence[bool],
) -> Operands:  # fmt: skip
    """As `attention_backward`, of a packed batch; at: the segments of queries and of keys; incoming: d_o, d_z, d_c."""
    return _backward(x, opt, state, incoming, needs, at)


def _backward(
    x: Operands, opt: Options, state: tuple[Tensor, Tensor], incoming: tuple[Tensor | None, ...], needs: Sequence[bool],
    at: tuple[Segments, Segments] | None = None,
) -> Operands:  # fmt: skip
    d_o, d_z, d_c = incoming
    need = dict(zip(Operands._fields, needs, strict=True))
    prepared = prepare(x, opt)
    out = token_gradients(x, need)
    rows = {name: out[name].rows if name in out else None for name in (*TOKENS, "log_a")}
    if at is not None:
        for gradient in out.values():  # rows that are no segment's
            gradient.rows.zero_()
    parameters = wants_parameters(x, needs)
    keys = parameters or any(rows[name] is not None for name in ("key", "value", "log_a"))
    packed = at is not None
    tiles = [gradient_tile(x, opt, kind) for kind in ("read_backward", "keys_backward")]
    queries = Split(0, 0) if x.query is None else gradient_split(x.query, tiles[0], packed)
    of_keys = gradient_split(x.key, tiles[1], packed)
    elements = state[1].shape[0]
    parts = new_partials(x, prepared, queries.programs + of_keys.programs, needs, elements)
    part_z = None
    if d_o is not None:
        if keys:
            (_, h, _, e), mp = x.value.shape, prepared.y.shape[1]
            part_z = x.references.new_empty((elements * h, queries.programs, mp, padded(e)))
        pooled = Pooled(state[0], None, state[1])
        read_backward_prepared(x, opt, prepared, pooled, d_o, queries, rows["query"], part_z, parts, at)
    if keys:
        given = Cotangents(part_z, queries.programs, *(None if t is None else t.contiguous() for t in (d_z, d_c)))
        of_rows = KeyGradients(rows["key"], rows["value"], rows["log_a"])
        log_b = need["log_b"] and x.log_b is not None
        transport_backward(x, opt, prepared, state, given, of_keys, of_rows, parts, log_b, at[1] if at else Segments())
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(x, opt, prepared, parts, needs)
    return Operands._make(found.get(name) for name in Operands._fields)


def read_backward(
    x: Operands, opt: Options, z: Tensor, g: Tensor, d_o: Tensor, needs: Sequence[bool]
) -> tuple[Operands, Tensor, Tensor]:
    """Gradients in the order of `Operands`, None where not needed; dz [B, H, M, E] and dg [B, H, M]."""
    assert x.query is not None
    need = dict(zip(Operands._fields, needs, strict=True))
    prepared, sizes = prepare(x, opt), sizes_of(x)
    out = token_gradients(x, need)
    queries = gradient_split(x.query, gradient_tile(x, opt, "read_backward"))
    parts = new_partials(x, prepared, queries.programs, needs)
    (b, h), e = x.query.shape[:2], sizes.E
    part_z = x.references.new_empty((b * h, queries.programs, sizes.MP, sizes.EP))
    rows = out["query"].rows if "query" in out else None
    pooled = Pooled(z.contiguous(), g.contiguous(), None)
    read_backward_prepared(x, opt, prepared, pooled, d_o, queries, rows, part_z, parts)
    d_z, d_g = part_z.sum(1)[:, : sizes.M, :e], parts.log_b.sum(1)[:, : sizes.M]
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(x, opt, prepared, parts, needs)
    shapes = (b, h, sizes.M, e), (b, h, sizes.M)
    d_z, d_g = (t.contiguous().view(shape) for t, shape in zip((d_z, d_g), shapes, strict=True))
    return Operands._make(found.get(name) for name in Operands._fields), d_z, d_g
