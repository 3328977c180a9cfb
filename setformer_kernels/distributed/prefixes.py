"""The op that makes of every piece's own sums the states before the pieces of a rank, by one all-gather each way.

    set_prefix     own [B, H, pieces · n], initial_state? -> prefixes [B, H, pieces, M, 2E + 3], the state after all

Of a pack there is an initial state of each segment, [N, H, M, 2E + 3], and no state after all: a segment's last piece
has that.

A piece gives n = M(E + 1) numbers: z_j, and log C_j less `offset`; with gates four more, the log of its masses' factor
and of what it leaves of earlier keys, each a float64 in two parts.  The states of all pieces, in the order of the
sequence, are added up in float64, in which logarithms of large sums keep the digits that float32 has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.eager import vjp
from ..ops.registration import TOKEN, Spec, register
from ..reference import lse
from ..reference.state import split, width
from .ranks import Communicator, of_name

EXTRA = 4
LN2 = math.log(2)


class Form(NamedTuple):
    """How sums are laid out, and the constants of the op."""

    m: int
    e: int
    pieces: int  # of a rank: 2 in "zigzag"
    gated: bool
    offset: float
    firsts: tuple[int, ...] = ()  # of a pack: the segment that each piece goes on with, −1 none; () goes on with all
    lasts: tuple[int, ...] = ()  # and the one that it leaves to the next, −1 none

    @property
    def numbers(self) -> int:
        return self.m * (self.e + 1) + EXTRA * self.gated


def in_two(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 [B, H] as two of dtype, [B, H, 2], the first with the gradient."""
    high = t.to(dtype)
    return torch.stack((high, (t - high.double()).detach().to(dtype)), -1)


def in_order(gathered: Tensor, form: Form) -> Tensor:
    """[R, B, H, pieces · n] -> [P, B, H, n], the pieces as the sequence has them."""
    pieces = gathered.unflatten(-1, (form.pieces, form.numbers)).movedim(-2, 0)
    return pieces[0] if form.pieces == 1 else torch.cat((pieces[0], pieces[1].flip(0)))


def places_of(rank: int, size: int, pieces: int) -> list[int]:
    """Which pieces are those of a rank."""
    return [rank] if pieces == 1 else [rank, 2 * size - 1 - rank]


def states_before(parts: Tensor, initial: Tensor | None, form: Form, targets: Sequence[int]) -> Tensor:
    """The states [.., B, H, M, 2E + 3] before the pieces `targets`, P for that after all, of parts [P, B, H, n].

    initial: the state before all [B, H, M, 2E + 3]; of a pack, that before each of its segments [N, H, M, 2E + 3]."""
    z, c, fade = _sums(parts, form)
    order, left = _with_states(initial, form, len(parts))
    if initial is not None:
        first = _logs(initial[_shared(form)].unsqueeze(1) if form.firsts else initial.unsqueeze(0))
        z, c = torch.cat((first[0], z))[order], torch.cat((first[1], c))[order]
        fade = torch.cat((fade.new_zeros((first[1].shape[0], *fade.shape[1:])), fade))[order]
    ends = {piece: i for i, piece in enumerate(order)} | {_states_of(initial, form) + len(parts): len(order)}
    at = torch.tensor([ends[_states_of(initial, form) + target] for target in targets], device=c.device)
    faded = torch.cat((torch.zeros_like(fade[:1]), fade.cumsum(0)))  # [P + 1, B, H], of all pieces before
    between = faded[at].unsqueeze(1) - faded[1:].unsqueeze(0)  # [targets, P, B, H]: what pieces after q leave of it
    before = (torch.arange(c.shape[0], device=c.device) < at.unsqueeze(-1))[:, :, None, None, None]
    if form.firsts:
        begun = torch.tensor([form.firsts[target] for target in targets], device=c.device).unsqueeze(-1)
        before = before & ((torch.tensor(left, device=c.device) == begun) & (begun >= 0))[:, :, None, None, None]
    weights = torch.where(before, c + torch.where(before, between.unsqueeze(-1), 0.0), -math.inf)
    log_c = lse(weights, 1)
    shares = (weights - torch.where(log_c > -math.inf, log_c, 0.0).unsqueeze(1)).exp()
    return _state(log_c, torch.einsum("tqbhm,qbhme->tbhme", shares, z)).to(parts.dtype)


def _sums(parts: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """z [P, B, H, M, E], log C [P, B, H, M] and the log of what each piece leaves of earlier keys [P, B, H]."""
    m, e = form.m, form.e
    z = parts[..., : m * e].unflatten(-1, (m, e)).double()
    c = parts[..., m * e : m * (e + 1)].double() + form.offset
    if not form.gated:
        return z, c, c.new_zeros(c.shape[:3])
    numbers = parts[..., m * (e + 1) :].double()
    return z, c + (numbers[..., 0] + numbers[..., 1]).unsqueeze(-1), numbers[..., 2] + numbers[..., 3]


def _shared(form: Form) -> list[int]:
    """The segments of a pack of which a piece leaves some to the next; of what is no pack the one that there is."""
    return list(dict.fromkeys(segment for segment in form.lasts if segment >= 0)) if form.firsts else [0]


def _states_of(initial: Tensor | None, form: Form) -> int:
    """How many states before keys are read."""
    return 0 if initial is None else len(_shared(form))


def _with_states(initial: Tensor | None, form: Form, pieces: int) -> tuple[list[int], list[int]]:
    """The rows of states and pieces, one after another, as the sequence has them, a segment's state before the first
    piece that leaves some of it; and of which segment of a pack each is."""
    states, shared = _states_of(initial, form), _shared(form)
    order: list[int] = []
    left: list[int] = []
    for piece, segment in enumerate(form.lasts or (0,) * pieces):
        if states and segment >= 0 and segment not in left:
            order, left = [*order, shared.index(segment)], [*left, segment]
        order, left = [*order, states + piece], [*left, segment]
    return order, left


def _logs(state: Tensor) -> tuple[Tensor, Tensor]:
    """z and log C of a state, in float64."""
    sums, lost, exponent = split(state.double())
    total = sums + lost
    seen = total[..., -1] > 0
    c = torch.where(seen, total[..., -1], 1.0)
    log_c = torch.where(seen, c.log() + exponent.squeeze(-1) * LN2, -math.inf)
    return torch.where(seen.unsqueeze(-1), total[..., :-1] / c.unsqueeze(-1), 0.0), log_c


def _state(log_c: Tensor, z: Tensor) -> Tensor:
    """The float64 state of z and log C, whose N and C fit a float32 and N' and C' are the rest."""
    seen = log_c > -math.inf
    log_c = torch.where(seen, log_c, 0.0)
    exponent = (log_c.detach() / LN2).floor()
    c = torch.where(seen, (log_c - exponent * LN2).exp(), 0.0).unsqueeze(-1)
    total = torch.cat((z * c, c), -1)
    rounded = total + (total.float().double() - total).detach()
    lost = (total - rounded).detach()
    return torch.cat((rounded, lost, torch.where(seen, exponent, 0.0).unsqueeze(-1)), -1)


def gathered_states(parts: Tensor, initial: Tensor | None, form: Form, ranks: Communicator, wanted: bool) -> Any:
    """Of gathered [R, B, H, pieces · n]: (prefixes [B, H, pieces, M, 2E + 3], state after all, or [B, H, 0, 0])."""
    targets = places_of(ranks.rank, ranks.size, form.pieces)
    found = states_before(
        in_order(parts, form), initial, form, [*targets, *[form.pieces * ranks.size] * wanted]
    )  # fmt: skip
    last = found[-1] if wanted else found.new_empty((*found.shape[1:3], 0, 0))
    return found[: form.pieces].movedim(0, 2), last


class _Gathered(torch.autograd.Function):
    """[...] of every rank, differentiable to any order: what arrives at a rank's own row, of all ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(t)

    @staticmethod
    def backward(ctx: Any, d_parts: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(d_parts, ctx.ranks)[:, ctx.ranks.rank].sum(0), None


def gathered(t: Tensor, ranks: Communicator) -> Tensor:
    """[...] of every rank: [R, ...]; the gradients that ranks have of it are added up."""
    return _Gathered.apply(t, ranks)


def plain_prefixes(own: Tensor, initial: Tensor | None, form: Form, ranks: Communicator, wanted: bool) -> Any:
    """`set_prefix` as PyTorch's own operations."""
    return gathered_states(gathered(own, ranks), initial, form, ranks, wanted)


def _form(args: Sequence[Any]) -> tuple[Form, bool, Communicator]:
    m, e, pieces, gated, offset, firsts, lasts, wanted, ranks, _ = args
    return Form(m, e, pieces, gated, offset, tuple(firsts), tuple(lasts)), wanted, of_name(ranks)


def _run(own: Tensor, initial: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    form, wanted, ranks = _form(args)
    parts = ranks.gather(own)
    prefixes, last = gathered_states(parts, initial, form, ranks, wanted)
    return prefixes.contiguous(), last.clone(), parts.movedim(0, 2).contiguous()


def _run_backward(
    d_prefixes: Tensor, d_last: Tensor, parts: Tensor, own: Tensor, initial: Tensor | None, *args: Any
) -> list[Tensor | None]:
    (form, wanted, ranks), needs = _form(args[:-1]), args[-1]
    of_last = [d_last.unsqueeze(2)] if wanted else []
    mine = torch.cat((d_prefixes, *of_last), 2)[..., : form.e + 1]  # [B, H, pieces (+ 1), M, E + 1]
    everybody = ranks.gather(mine).movedim(3, 0)  # [pieces (+ 1), R, B, H, M, E + 1]
    targets = [places_of(rank, ranks.size, form.pieces) for rank in range(ranks.size)]
    order = [target for piece in range(form.pieces) for target in [of_rank[piece] for of_rank in targets]]
    arriving = everybody[: form.pieces].flatten(0, 1)
    if wanted:
        order, arriving = [*order, form.pieces * ranks.size], torch.cat((arriving, everybody[-1:].sum(1)))
    parts = parts.movedim(2, 0)
    size = form.e + 1

    def of_all(own: Tensor) -> Tensor:
        rows = [own if rank == ranks.rank else parts[rank] for rank in range(ranks.size)]
        return states_before(in_order(torch.stack(rows), form), initial, form, order)[..., :size]

    (d_own,) = vjp(of_all, [own], needs[:1], [arriving])
    d_initial = None
    if needs[1] and initial is not None:
        here = [*targets[ranks.rank], *[form.pieces * ranks.size] * wanted]
        (d_initial,) = vjp(
            lambda initial: states_before(in_order(parts, form), initial, form, here)[..., :size],
            [initial], [True], [mine.movedim(2, 0)],
        )  # fmt: skip
    return [d_own, d_initial]


def _fake(own: Tensor, initial: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    form, wanted, ranks = _form(args)
    b, h, n = own.shape
    state = (form.m, width(form.e))
    last = state if wanted else (0, 0)
    return (own.new_empty((b, h, form.pieces, *state)), own.new_empty((b, h, *last)),
            own.new_empty((b, h, ranks.size, n)))  # fmt: skip


set_prefix = register(
    Spec(
        name="set_prefix",
        tensors={"own": (TOKEN, False), "initial_state": (TOKEN, True)},
        constants="int m, int e, int pieces, bool gated, float offset, int[] firsts, int[] lasts, bool with_state, "
        "str ranks, str backend",
        outputs={"prefixes": TOKEN, "last": TOKEN, "parts": TOKEN},
        differentiable=("prefixes", "last"),
        saved=("parts",),
        no_grad=(),
        run=_run,
        run_backward=_run_backward,
        fake=_fake,
        decomposition=None,
    )
)
