"""Causal attention for T ≤ 1 over ranks: every piece goes on from the state that the pieces before it leave.

One pass over a rank's keys makes what they add to the state, one all-gather tells it to all, and the scan begins with
the sum of what came before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference, streaming
from ..grouping import repeated, repeated_stream
from ..problem import Operands, Options, Stream, replaced, with_an_absent_key
from ..reference.attention import reference_mass
from .prefixes import EXTRA, Form, in_two, plain_prefixes, set_prefix
from .ranks import Communicator
from .shares import Plain, share_of

TOKENS = ("query", "key", "value", "log_a", "query_position", "key_position")
Counters = Callable[[int, int], Tensor]  # of queries first .. last − 1: [B, Hk, G·l, M]


def cut(x: Operands, first: int, last: int) -> Operands:
    """The tokens first .. last − 1; none of keys is none, and no key without mass that stands for it."""
    rows = {}
    for name in TOKENS:  # not a comprehension that names its value: dynamo knows no cells of such
        t = getattr(x, name)
        if t is not None:
            rows[name] = t[:, :, first:last]
    return replaced(x, **rows)


def own_sums(
    x: Operands, opt: Options, gates: Tensor | None, offset: float, ranks: Communicator
) -> tuple[Tensor, bool]:  # fmt: skip
    """What the keys of one piece add, [B, H, n] as `Form` has it, and whether PyTorch's own operations made it."""
    extra = []
    if x.key.shape[2] == 0:
        x = with_an_absent_key(x)
        extra = [x.key.new_zeros((*x.key.shape[:2], EXTRA), dtype=x.references.dtype)] if gates is not None else []
    elif gates is not None:
        x, extra = _faded(x, gates)
    share = share_of(x, opt, 0.0 if gates is not None else offset, ranks)
    z, c = share.pool(reference_mass(x).expand(*x.key.shape[:2], -1))
    return torch.cat((z.flatten(2), c, *extra), -1), isinstance(share, Plain)


def _faded(x: Operands, gates: Tensor) -> tuple[Operands, list[Tensor]]:
    """The keys with what later gates of the piece leave of them, as masses that sum to 1, and `Form`'s four numbers."""
    wide = gates.double()
    since = wide.flip(-1).cumsum(-1).flip(-1)
    log_a = (since - wide) if x.log_a is None else (since - wide) + x.log_a
    total = log_a.detach().logsumexp(-1, keepdim=True)
    total = torch.where(total > -torch.inf, total, 0.0)
    numbers = [in_two(t, gates.dtype) for t in (total.squeeze(-1), since[..., 0])]
    return replaced(x, log_a=(log_a - total).to(gates.dtype)), numbers


def scan(
    x: Operands, opt: Options, stream: Stream, pieces: list[tuple[int, int]], offset: float, ranks: Communicator,
    wanted: bool, counters: Counters | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o of this rank's queries, and the state after the last key of all ranks where `wanted`.

    stream: this rank's gates, and the state before the first key of all ranks; pieces: the rows of each."""
    gates, initial = stream
    sums, parts, plain = [], [], False
    for first, last in pieces:
        part = cut(x, first, last)
        parts.append((part, None if gates is None else gates[:, :, first:last]))
        own, plain = own_sums(replaced(part, query=None, query_position=None), opt, parts[-1][1], offset, ranks)
        sums.append(own)
    form = form_of(x, len(pieces), gates, offset)
    prefixes, state = prefixes_of(torch.cat(sums, -1), plain, initial, form, opt, ranks, wanted)
    found = []
    for at, (part, fading) in enumerate(parts):
        numbers = None if counters is None else counters(*pieces[at])
        found.append(attended(part, opt, Stream(fading, prefixes[:, :, at]), numbers)[0])
    return torch.cat(found, 2) if len(found) > 1 else found[0], state if wanted else None


def form_of(x: Operands, pieces: int, gates: Tensor | None, offset: float) -> Form:
    return Form(x.references.shape[1], x.value.shape[-1], pieces, gates is not None, offset * (gates is None))


def prefixes_of(
    own: Tensor, plain: bool, initial: Tensor | None, form: Form, opt: Options, ranks: Communicator, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The states before a rank's pieces [B, H, pieces, M, 2E + 3], and after all."""
    if plain:
        return plain_prefixes(own, initial, form, ranks, wanted)
    prefixes, state, _ = set_prefix(own, initial, *form, wanted, ranks.name, opt.backend)
    return prefixes, state


def attended(
    x: Operands, opt: Options, stream: Stream, counters: Tensor | None, wanted: bool = False
) -> tuple[Tensor, Tensor | None]:
    """o of one piece, which goes on from the state of `stream`, and the state after it where that is wanted."""
    assert x.query is not None
    if x.query.shape[2] == 0:
        o, state = streaming.piece(x, opt, stream, wanted)
        used = [t for t in (x.query, *stream) if t is not None]  # every rank takes part in the backward pass
        return o + sum((0 * t.sum()).to(o.dtype) for t in used), state
    if counters is None:
        return streaming.piece(x, opt, stream, wanted)
    groups = x.query.shape[1] // x.key.shape[1]
    many = repeated(x) if groups > 1 else x
    o, state = reference.causal_with_state(
        many, opt, repeated_stream(stream, groups) if groups > 1 else stream, _of_heads(counters, x.query)
    )  # fmt: skip
    return o, state[:, ::groups].contiguous()


def _of_heads(counters: Tensor, query: Tensor) -> Tensor:
    """[B, Hk, G·l, M] -> [B, H, l, M]."""
    return counters.reshape(*query.shape[:3], counters.shape[-1])
