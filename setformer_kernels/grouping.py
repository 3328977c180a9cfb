"""Grouped queries: H = G·Hk query heads on Hk key heads, head h on that of h // G, as `enable_gqa` of torch has it.

Queries of a group read the same pooled keys: they are G·L queries of one head.  Where every query has keys of its own
(causal, masked), its heads are elements of a batch that share their keys, or the keys are repeated where there is a
batch already.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .problem import HYPER, Operands, Options, Stream, replaced


def folded(x: Operands) -> Operands:
    """Queries [B, H, L, D] as [B, Hk, G·L, D], and their positions: a view where the strides allow."""
    assert x.query is not None
    (b, heads, length, d), h = x.query.shape, x.key.shape[1]
    groups, position = heads // h, x.query_position
    if position is not None:
        position = position.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)
    return replaced(x, query=x.query.view(b, h, groups, length, d).flatten(2, 3), query_position=position)


def unfolded(o: Tensor, query: Tensor) -> Tensor:
    """[B, Hk, G·L, E] of folded queries [B, H, L, D] -> [B, H, L, E].

    In two steps, for what tracers of unknown lengths make of the strides: a split, then a merge of whole heads.
    """
    (b, h, _, e), (_, heads, length, _) = o.shape, query.shape
    return o.view(b, h, heads // h, length, e).flatten(1, 2)


def is_alone(x: Operands, opt: Options) -> bool:
    """Whether `by_element` stands for `repeated`: of one batch element, without dropout, which counts heads."""
    return x.key.shape[0] == 1 and opt.dropout_p == 0.0


def by_element(x: Operands) -> Operands:
    """The heads [1, H, L, D] of queries as G elements of a batch [G, Hk, L, D] that share keys: nothing is copied."""
    assert x.query is not None
    h = x.key.shape[1]
    groups = x.query.shape[1] // h
    at = ("key", "value", "log_a", "key_position", "query_position")
    shared = {name: shared_by(t, groups) for name in at if (t := getattr(x, name)) is not None}
    return replaced(x, query=heads_by_element(x.query, h), **shared)


def heads_by_element(t: Tensor, h: int) -> Tensor:
    """[1, H, ...] -> a view [G, Hk, ...]."""
    return t.squeeze(0).unflatten(0, (h, t.shape[1] // h)).transpose(0, 1)


def shared_by(t: Tensor, groups: int) -> Tensor:
    """[1, Hk, ...] -> a view [G, Hk, ...]."""
    return t.expand(groups, *t.shape[1:])


def elements_as_heads(o: Tensor) -> Tensor:
    """[G, Hk, L, E] -> [1, H, L, E], a view of what lies in memory as its queries do."""
    return o.transpose(0, 1).flatten(0, 1).unsqueeze(0)


def with_own_keys(
    run: Callable[[Operands, Tensor | None], Tensor], x: Operands, opt: Options, mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """o [B, H, L, E] by `run`, which takes as many heads of keys as of queries, and a mask [B or 1, H or 1, L, S]."""
    assert x.query is not None
    h = x.key.shape[1]
    if x.query.shape[1] == h:
        return run(x, mask)
    if not is_alone(x, opt):
        return run(repeated(x), mask)
    mask = mask if mask is None or mask.shape[1] == 1 else heads_by_element(mask, h)
    return elements_as_heads(run(by_element(x), mask))


def repeated(x: Operands) -> Operands:
    """Every key head, and what belongs to it, once for each of its query heads."""
    assert x.query is not None
    groups = x.query.shape[1] // x.key.shape[1]
    at = dict.fromkeys(("key", "value", "log_a", "key_position", "query_position"), 1)
    at |= dict.fromkeys(("references", "log_b", "reference_position", *HYPER), 0)
    given = {}
    for name, dim in at.items():  # not a comprehension that names its value: dynamo knows no cells of such
        t = getattr(x, name)
        if t is not None:
            given[name] = repeated_heads(t, dim, groups)
    return replaced(x, **given)


def repeated_stream(stream: Stream, groups: int) -> Stream:
    return Stream(*(t if t is None else repeated_heads(t, 1, groups) for t in stream))


def repeated_heads(t: Tensor, dim: int, groups: int) -> Tensor:
    """`t.repeat_interleave(groups, dim)`, which exports as two views and a copy."""
    expanded = t.unsqueeze(dim + 1).expand(*t.shape[: dim + 1], groups, *t.shape[dim + 1 :])
    return expanded.flatten(dim, dim + 1)
