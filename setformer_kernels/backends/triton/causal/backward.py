"""Backward of the causal scan, T ≤ 1: queries in their chunk, a scan from the end, keys in their chunk.

    P_ij = ⟨do_i, z_ij⟩,   dS_ij = W_ij (P_ij − Σ_j W_ij P_ij),   d log C_ij = −λ_b dS_ij − W_ij P_ij   (T = 0: λ_b = 0)
    dω_sj = Σ_{i≥s} e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij),   dv_s = Σ_j Σ_{i≥s} e^{ω_sj}/C_ij W_ij do_i
    df̂_s = Σ_j dω_sj,   dℓ_sj = dω_sj − λ_a R_sj df̂_s,   R = softmax_j(ℓ + log b)
    d log b_j = Σ_i dS_ij − λ_a Σ_s R_sj df̂_s

Queries of later chunks enter as two sums in units of C at the end of the key's chunk, where no factor exceeds 1:

    G_j = Σ_i W_ij do_i C_j/C_ij,   η_j = Σ_i d log C_ij C_j/C_ij
    dω_sj += e^{ω_sj}/C_j (⟨G_j, v_s⟩ + η_j),   dv_s += Σ_j e^{ω_sj}/C_j G_j
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....problem import Operands, Options, Stream, replaced
from ..host.groups import sizes_of
from ..host.launch import device_of, launch
from ..host.rows import TOKENS, strided, token_gradients, unit_rows
from ..host.tiles import tile
from ..parameters.gradients import Partials, new_partials, parameter_gradients, wants_parameters
from ..parameters.prepare import prepare
from .forward import chunk_arguments, with_unit_rows
from .gates import gate_gradient, gates_of, in_places, initial_gradient, state_gradient
from .gradients import Work, causal_gates_backward_kernel, causal_keys_backward_kernel, causal_queries_backward_kernel
from .scan import scan, way_of
from .scan_back import scan_back
from .segments import Ends, ends_of, pack_of
from .state import Arguments, Part, chunks_of, new_passed, parts
from .tokens import fold, tokens_backward


class Call(NamedTuple):
    """What all parts of one call share."""

    x: Operands
    arguments: Arguments
    out: dict[str, Tensor | None]  # gradients of tokens and log a, None where not needed
    whole: Partials  # [BH, 1, ..]
    d_state: Tensor | None  # [BH, M, 2E + 3] of the final state
    d_initial: Tensor | None  # [BH, M, 2E + 3] written, where needed
    d_gates: Tensor | None  # [BH, chunks, BC] of log γ, written, where needed


def causal_backward(
    x: Operands,
    opt: Options,
    d_o: Tensor,
    needs: Sequence[bool],
    stream: Stream,
    d_state: Tensor | None,
    cu: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Operands`, then of `Stream`, None where not needed, from d_o [B, H, L, E] and that of
    the final state; cu: the offsets of a packed batch."""
    if cu is not None and (x.key.shape[2] == 0 or cu.shape[0] < 2):
        return _of_nothing((*x, *stream), needs, d_state)
    n, wanted = len(x), dict(zip((*Operands._fields, *Stream._fields), needs, strict=False))
    gated = wanted.get("log_decay", False) and stream.log_decay is not None
    sizes = sizes_of(x)
    widest = max(sizes.MP, sizes.DP, sizes.EP)
    kinds, family = ("chunk_backward", "chunk_queries", "chunk_gates"), device_of(x.key).family
    t, of_queries, of_gates = (tile(kind, family, widest, x.key.element_size(), sizes.MP) for kind in kinds)
    out = token_gradients(x, wanted)
    pack = None if cu is None else pack_of(cu, x.key.shape[2], t.rows, chunks_of(t.rows))
    length = x.key.shape[2] if pack is None else pack.rows.shape[0]
    x, gates = with_unit_rows(x), gates_of(stream, length, t.rows, d_state is not None, pack)
    d_o = unit_rows(d_o)
    prepared = prepare(x, opt)
    whole = new_partials(x, prepared, 1, needs[:n])
    new, heads, d_initial = whole.log_b.new_empty, whole.log_b.shape[0], None
    if wanted.get("initial_state", False) and gates.initial is not None:
        d_initial = new(gates.initial.shape)
    ends = Ends(None) if cu is None else ends_of(cu, sizes, whole.log_b, d_state, d_initial)
    if pack is not None:
        for gradient in out.values():  # rows that are no segment's
            gradient.rows.zero_()
    arguments = chunk_arguments(x, prepared, opt, t, d_o, gates, pack, ends, (of_queries, of_gates))
    rows = {n: out[n].rows if n in out else None for n in (*TOKENS, "log_a")}
    call = Call(
        x, arguments, rows, whole, None if d_state is None else d_state.flatten(0, 1),
        None if d_initial is None else d_initial.flatten(0, 1),
        new((heads, gates.chunks, t.rows)) if gated else None,
    )  # fmt: skip
    bundle = math.ceil((sizes.EP + 4) / arguments.bundle)  # numbers of one, shared by its chunks
    numbers = sizes.MP * (max(sizes.DP, sizes.EP) + sizes.EP + 3 * t.rows + sizes.PP + 8 + 2 * arguments.exact + bundle)
    work = list(
        parts(x, t.rows, length, numbers, 0)
    )  # stretches of more heads would take another scan for the states between
    if x.key.shape[0] == 1 == len(work) == len(work[0]):  # one part: what adds batch elements adds its slots
        whole = _heads_backward(call, work[0], wanted=False)
    else:
        for stretches in work:
            _heads_backward(call, stretches, wants_parameters(x, needs[:n]))
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(x, opt, prepared, whole, needs[:n])
    d_decay = None
    if call.d_gates is not None:
        d_decay = call.d_gates.flatten(1).unflatten(0, x.key.shape[:2])
        d_decay = d_decay[..., :length].contiguous() if pack is None else in_places(d_decay, pack.places)
    if pack is not None and d_initial is not None:
        initial_gradient(pack, stream.initial_state, ends, d_initial)
    return (*[found.get(name) for name in Operands._fields], d_decay, d_initial)


def _of_nothing(
    given: tuple[Tensor | None, ...], needs: Sequence[bool], d_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a pack without tokens or segments, of which the last, of initial states, is the final ones'."""
    *found, d_initial = (
        torch.zeros_like(t) if n and t is not None else None for t, n in zip(given, needs, strict=True)
    )
    return *found, d_initial if d_initial is None or d_state is None else d_state.clone()


def _heads_backward(call: Call, stretches: list[Part], wanted: bool) -> Partials:
    """Some heads: forward for what comes before each stretch, then from the last stretch to the first.

    Slots of a stretch are folded into those of the whole call where these are `wanted`; those of the first come back.
    """
    sizes, passed = call.arguments.sizes, new_passed(stretches[0], call.arguments, len(stretches))
    shape = (stretches[0].heads, sizes.MP, sizes.EP)
    packed = call.arguments.pack is not None
    passed_back = (
        passed.new_empty((2, *shape) if packed else shape),
        passed.new_empty((2, *shape[:2]) if packed else shape[:2]),
    )
    for part in stretches[:-1]:
        scan(part, call.arguments, passed, _room(call, part)[0], backward=True)
    for part in reversed(stretches):
        slots = call.whole  # lets go of those of the part before, before this one allocates its own
        slots = _part_backward(call, part, passed, passed_back)
        if wanted:
            fold(part, slots, call.whole, call.arguments.sizes)
    if call.d_initial is not None and call.arguments.gates.initial is not None and not packed:
        mine = slice(stretches[0].first_head, stretches[0].first_head + shape[0])
        held = call.arguments.gates.initial.flatten(0, 1)[mine]
        state_gradient(held, passed_back, call.d_initial[mine])
    return slots


def _room(call: Call, part: Part) -> tuple[Tensor, Tensor]:
    """One piece of memory as means z [heads, chunks, MP, EP] and, once these are read, as slots of dŷ [.., MP, DP]."""
    sizes, slots = call.arguments.sizes, part.heads * part.chunks
    room = call.whole.log_b.new_empty(slots * sizes.MP * max(sizes.DP, sizes.EP))
    shape = (part.heads, part.chunks, sizes.MP)
    means, y = (room[: slots * sizes.MP * n].view(*shape, n) for n in (sizes.EP, sizes.DP))
    return means, y


def _slots(whole: Partials, part: Part, y: Tensor) -> Partials:
    """A slot for each chunk of a part, of the sums that `whole` has."""
    shape, others = (part.heads, part.chunks), replaced(whole, y=None)._asdict()
    found = {n: t.new_empty((*shape, *t.shape[2:])) for n, t in others.items() if t is not None}
    return replaced(whole, **(found if whole.y is None else found | {"y": y}))


def _final(call: Call, part: Part, state: Tensor, passed_back: tuple[Tensor, Tensor]) -> None:
    """What the gradient of the final state passes back, in units of C; state [heads, M, 2E + 3]."""
    if call.d_state is None or call.arguments.pack is not None or part.stretch < part.stretches - 1:
        return
    mine = slice(part.first_head, part.first_head + part.heads)
    d_state, e = call.d_state[mine], call.arguments.sizes.E
    sums = state[..., : e + 1] + state[..., e + 1 : -1]  # [heads, M, E + 1]
    for back, columns in zip(passed_back, (d_state[..., :e], d_state[..., e]), strict=True):
        units = sums[..., e:] if columns.ndim == 3 else sums[..., e]
        at = (slice(None), *[slice(n) for n in columns.shape[1:]])
        back.zero_()[at] = columns * units


def _part_backward(call: Call, part: Part, passed: Tensor, passed_back: tuple[Tensor, Tensor]) -> Partials:
    """All launches of a part: writes the tokens' gradients, and the slots of its chunks that it returns."""
    x, arguments, out, whole = call[:4]
    own = arguments.backward
    assert own is not None
    means, y = _room(call, part)
    states = scan(part, arguments, passed, means, backward=True)
    slots, new = _slots(whole, part, y), means.new_empty
    if arguments.pack is not None and slots.sums is not None:
        slots.sums.zero_()  # here, as the queries' kernel writes there
    own_c, later_c = new((2, *means.shape[:3])).unbind()
    later = new(means.shape), own_c, later_c
    shape = (part.heads, part.chunks, arguments.tile.rows, means.shape[2])
    crossing, incoming = (None if call.d_gates is None else new(shape[:3]) for _ in range(2))
    work = Work(*states, new(shape), new(shape), new(shape), *later, crossing, incoming, slots.sums)
    programs, groups, counts = (
        part.heads * part.chunks,
        (arguments.references, arguments.scalars, work),
        arguments.counts(part),
    )
    args = (*arguments.tokens, *arguments.output, *groups, *counts, arguments.threshold)
    launch(causal_queries_backward_kernel, programs, args, *own.queries)
    _final(call, part, passed[:, -1], passed_back)
    blocks = way_of(part.heads, part.chunks, arguments.bundle, arguments.sizes, arguments.multiprocessors).blocks
    products = None if call.d_gates is None else new((part.heads, part.chunks, blocks))
    scan_back(part, states, later, passed_back, products, arguments)
    if arguments.pack is not None:
        for t in (slots.log_b, slots.y, slots.position):  # the slots of chunks that are not there
            if t is not None:
                t.zero_()
    tokens_backward(x, part, "query", work.d_logits, out, slots, arguments)  # whose slots take the means' memory
    args = (
        *arguments.keys,
        *arguments.output,
        *strided(out["value"], packed=arguments.pack is not None),
        *groups,
        *counts,
    )
    launch(causal_keys_backward_kernel, programs, args, *own.keys)
    if call.d_gates is not None:
        args = (*arguments.keys, *arguments.output, *groups, *counts)
        launch(causal_gates_backward_kernel, programs, args, *own.gates)
        mine, chunks = slice(part.first_head, None), slice(part.first_chunk, None)
        found = gate_gradient(work.crossing, work.incoming, products)
        call.d_gates[mine, chunks][: part.heads, : part.chunks] = found
    tokens_backward(x, part, "key", work.d_logits, out, slots, arguments)
    return slots
