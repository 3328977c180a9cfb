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

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, Stream, replaced
from ..device.gradients import sum_at
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import INF, LN2, dot, finite_or_zero, rounded, tokens_by
from ..device.rows import load_rows, rows_of, store_rows
from ..device.softmax import read_gradient
from ..host.groups import sizes_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import TOKENS, strided, token_gradients, unit_rows
from ..host.tiles import tile
from ..parameters.gradients import Partials, new_partials, parameter_gradients, wants_parameters
from ..parameters.prepare import prepare
from .chunk import chunk_keys, crossings, key_gradient, lower, place, pooled_products, query_weights, state_at, tile_at
from .forward import chunk_arguments, with_unit_rows
from .gates import gate_gradient, gates_of, state_gradient
from .scan import scan, way_of
from .scan_back import scan_back
from .state import Arguments, Part, new_passed, parts
from .tokens import fold, tokens_backward


@triton.jit
def first_key(live, before, seed):
    """Which queries [BC] see one key, the first: z_ij = v for all j, and so dS and their part of dω vanish exactly.

    Leaving ⟨do_i, v_s⟩ out leaves its rounding errors out.  Dropout weighs the j differently.
    """
    if seed is not None:
        return live != live
    else:
        seen = tl.cumsum(live.to(tl.int32), 0)
        return tl.where(tl.max(before, 0) == -INF, seen, 0) == 1


@triton.jit
def pair_products(gradients, values, rows, asked, known, seed, sizes, cut):
    """⟨do_i, v_s⟩ [BC, BC] lower triangular; 0 for the queries that are alone with the first key."""
    alone = first_key(known.live, known.before, seed)
    d = tl.zeros([cut.ROWS, cut.ROWS], tl.float32)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, columns, sizes.E)
        d += dot(do, tl.trans(load_rows(values, rows, known.live, columns, sizes.E)), cut.PRECISION)
    return tl.where(alone[:, None], 0.0, lower(d))


@triton.jit
def mean_products(gradients, means, at, rows, asked, sizes, cut):
    """⟨do_i, z⁰_j⟩ [BC, MP]."""
    p = tl.zeros([cut.ROWS, sizes.MP], tl.float32)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, columns, sizes.E)
        z = rounded(tl.load(state_at(means, at, columns, sizes)), do.dtype)
        p += tokens_by(do, tl.trans(z), cut.PRECISION, cut.ACROSS)
    return p


class Work(NamedTuple):
    """The workspaces of a part, a slot for each of its chunks."""

    log_c: Tensor  # [heads, chunks, MP] as in States
    log_end: Tensor | None
    kept: Tensor | None
    means: Tensor  # [heads, chunks, MP, EP]
    weights: Tensor  # [heads, chunks, BC, MP] W
    d_sums: Tensor  # [heads, chunks, BC, MP] d log C
    d_logits: Tensor  # [heads, chunks, BC, MP] dS, then dω
    later_o: Tensor  # [heads, chunks, MP, EP] what the chunk's queries leave, then in its place G
    own_c: Tensor  # [heads, chunks, MP] what they leave of d log C
    later_c: Tensor  # [heads, chunks, MP] η
    crossing: Tensor | None  # [heads, chunks, BC] what each key gives to later chunks, then `crossings` with it
    incoming: Tensor | None  # [heads, chunks, BC] what each query gets from earlier chunks; both where gates need them
    sums: Tensor | None  # [heads, chunks, SUMS] as in Partials


@kernel
def causal_queries_backward_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], likewise
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    query_position, stride_sb, stride_sh, stride_sn,  # [B, H, L, P] or None
    key_position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the queries
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk, threshold,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's W, d log C and dS, its part of dλ_b, and its terms of G and η."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, chunk = place(chunks, first_head, first_chunk)
    b, h = number // H, number % H
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, L, cut.STEP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, L, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, L, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, L, 1) if log_a is not None else None
    asking = (
        places_of(query_position, references, b, h, stride_sb, stride_sh, stride_sn, sizes) if sizes.P > 0 else None
    )
    places = places_of(key_position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, at, number, chunk, scalars, rule, sizes, cut
    )
    j = tl.arange(0, sizes.MP)
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    from_means = mean_products(gradients, work.means, at, rows, asked, sizes, cut)
    # Without λ_b dS beside it, what a query gets from earlier chunks is −w(p − ⟨do_i, z⁰⟩) alone.
    GAINED: tl.constexpr = work.incoming is not None and not rule.UPDATE_ROWS
    p, gained = pooled_products(d, from_means, known, FACTOR, GAINED, cut)
    l, kappa, cosine, inverse, first_columns = token_logits(queries, rows, asked, asking, head, rule.DOT, sizes, cut)
    w = query_weights(l, log_b, known.log_c, head.lam_b, rule.UPDATE_ROWS)
    w, d_s = read_gradient(w, p, scalars, number.to(tl.int64), L, rows, threshold, sizes)
    d_c = -w * p - head.lam_b * d_s if rule.UPDATE_ROWS else -w * p
    tl.store(tile_at(work.weights, at, cut.ROWS, sizes), w)
    tl.store(tile_at(work.d_sums, at, cut.ROWS, sizes), d_c)
    tl.store(tile_at(work.d_logits, at, cut.ROWS, sizes), d_s)
    fade = tl.exp2(known.before[None, :] + known.gamma[:, None] - finite_or_zero(known.log_c))
    tl.store(work.own_c + at * sizes.MP + j, tl.sum(d_c * fade, 0))
    if work.incoming is not None:
        incoming = -w * gained if GAINED else w * from_means + d_c
        tl.store(work.incoming + at * cut.ROWS + tl.arange(0, cut.ROWS), tl.sum(incoming * fade, 1))
    faded = tl.trans(rounded(w * fade, token))
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, e, sizes.E)
        tl.store(state_at(work.later_o, at, e, sizes), dot(faded, do, cut.PRECISION))
    if work.sums is not None:
        d_lam = tl.sum(d_s * finite_or_zero(known.log_c)) * LN2 if rule.UPDATE_ROWS else 0.0
        tl.store(sum_at(work.sums, at, "reference_relaxation"), d_lam)


@kernel
def causal_keys_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the keys
    d_value, stride_db, stride_dh, stride_dn,  # [B, H, L, E] or None
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's dω (d_logits) and dv."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, chunk = place(chunks, first_head, first_chunk)
    number = number.to(tl.int64)  # divided in 32 bits, 24 more bytes of registers spill (sm_80, float32, D 128)
    b, h = number // H, number % H
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, L, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, L, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    d_values = rows_of(d_value, b, h, stride_db, stride_dh, stride_dn, L, 1) if d_value is not None else None
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, L, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, at, number, chunk, scalars, rule, sizes, cut
    )
    j = tl.arange(0, sizes.MP)
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    w, d_c = (tl.load(tile_at(work.weights, at, cut.ROWS, sizes)), tl.load(tile_at(work.d_sums, at, cut.ROWS, sizes)))
    a, d_omega = key_gradient(w, d_c, d, known, FACTOR, cut)
    end = tl.load(work.log_end + at * sizes.MP + j)
    carried = tl.exp2(known.omega + known.to_end[:, None] - finite_or_zero(end)[None, :])
    from_later = tl.zeros_like(known.omega) + tl.load(work.later_c + at * sizes.MP + j)[None, :]
    to_values, carried_operand = tl.trans(rounded(a, token)), rounded(carried, token)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        do = load_rows(gradients, rows, asked, e, sizes.E)
        v = load_rows(values, rows, known.live, e, sizes.E)
        later = rounded(tl.load(state_at(work.later_o, at, e, sizes)), token)
        from_later += tokens_by(v, tl.trans(later), cut.PRECISION, cut.ACROSS)
        if d_value is not None:
            dv = dot(to_values, do, cut.PRECISION) + dot(carried_operand, later, cut.PRECISION)
            store_rows(d_values, rows, asked, e, sizes.E, dv)
    tl.store(tile_at(work.d_logits, at, cut.ROWS, sizes), d_omega + carried * from_later)
    if work.crossing is not None:
        tl.store(work.crossing + at * cut.ROWS + tl.arange(0, cut.ROWS), tl.sum(carried * from_later, 1))


@kernel
def causal_gates_backward_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_o, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the keys
    references, scalars, work,  # References, Scalars, Work
    H, L, chunks, first_head, first_chunk,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's sums over the pairs of its tokens and over what its keys give to later chunks, for each key between.

    Apart from the keys' kernel, whose registers it would take.
    """
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, chunk = place(chunks, first_head, first_chunk)
    number = number.to(tl.int64)
    b, h = number // H, number % H
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, L, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, L, cut.STEP)
    gradients = rows_of(d_o, b, h, stride_ob, stride_oh, stride_on, L, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, L, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, work.log_c, at, number, chunk, scalars, rule, sizes, cut
    )
    d = pair_products(gradients, values, rows, asked, known, scalars.seed, sizes, cut)
    w, d_c = (tl.load(tile_at(work.weights, at, cut.ROWS, sizes)), tl.load(tile_at(work.d_sums, at, cut.ROWS, sizes)))
    crossing = work.crossing + at * cut.ROWS + tl.arange(0, cut.ROWS)
    tl.store(crossing, crossings(w, d_c, d, known, tl.load(crossing), FACTOR, cut.PRECISION))


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
    x: Operands, opt: Options, d_o: Tensor, needs: Sequence[bool], stream: Stream, d_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Operands`, then of `Stream`, None where not needed, from d_o [B, H, L, E] and that of
    the final state."""
    n, wanted = len(x), dict(zip((*Operands._fields, *Stream._fields), needs, strict=False))
    gated = wanted.get("log_decay", False) and stream.log_decay is not None
    sizes = sizes_of(x)
    t = tile("chunk_backward", device_of(x.key).family, max(sizes.MP, sizes.DP, sizes.EP), x.key.element_size())
    out = token_gradients(x, wanted)
    x, gates = with_unit_rows(x), gates_of(stream, x.key.shape[2], t.rows, d_state is not None)
    d_o = unit_rows(d_o)
    prepared = prepare(x, opt)
    whole = new_partials(x, prepared, 1, needs[:n])
    arguments = chunk_arguments(x, prepared, opt, t, d_o, gates)
    new, heads = whole.log_b.new_empty, whole.log_b.shape[0]
    d_initial = None
    if wanted.get("initial_state", False) and gates.initial is not None:
        d_initial = new(gates.initial.shape)
    rows = {n: out[n].rows if n in out else None for n in (*TOKENS, "log_a")}
    call = Call(
        x, arguments, rows, whole, None if d_state is None else d_state.flatten(0, 1),
        None if d_initial is None else d_initial.flatten(0, 1),
        new((heads, gates.chunks, t.rows)) if gated else None,
    )  # fmt: skip
    bundle = math.ceil((sizes.EP + 4) / arguments.bundle)  # numbers of one, shared by its chunks
    numbers = sizes.MP * (max(sizes.DP, sizes.EP) + sizes.EP + 3 * t.rows + sizes.PP + 8 + bundle)
    work = list(parts(x, t.rows, numbers, 0))  # stretches of more heads would take another scan for the states between
    if x.key.shape[0] == 1 == len(work) == len(work[0]):  # one part: what adds batch elements adds its slots
        whole = _heads_backward(call, work[0], wanted=False)
    else:
        for stretches in work:
            _heads_backward(call, stretches, wants_parameters(x, needs[:n]))
    found: dict[str, Tensor | None] = {name: gradient.delivered() for name, gradient in out.items()}
    found |= parameter_gradients(x, opt, prepared, whole, needs[:n])
    d_decay = None
    if call.d_gates is not None:
        d_decay = call.d_gates.flatten(1).unflatten(0, x.key.shape[:2])[..., : x.key.shape[2]].contiguous()
    return (*[found.get(name) for name in Operands._fields], d_decay, d_initial)


def _heads_backward(call: Call, stretches: list[Part], wanted: bool) -> Partials:
    """Some heads: forward for what comes before each stretch, then from the last stretch to the first.

    Slots of a stretch are folded into those of the whole call where these are `wanted`; those of the first come back.
    """
    sizes, passed = call.arguments.sizes, new_passed(stretches[0], call.arguments, len(stretches))
    shape = (stretches[0].heads, sizes.MP, sizes.EP)
    passed_back = passed.new_empty(shape), passed.new_empty(shape[:2])
    for part in stretches[:-1]:
        scan(part, call.arguments, passed, _room(call, part)[0], backward=True)
    for part in reversed(stretches):
        slots = call.whole  # lets go of those of the part before, before this one allocates its own
        slots = _part_backward(call, part, passed, passed_back)
        if wanted:
            fold(part, slots, call.whole, call.arguments.sizes)
    if call.d_initial is not None and call.arguments.gates.initial is not None:
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
    if call.d_state is None or part.stretch < part.stretches - 1:
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
    means, y = _room(call, part)
    states = scan(part, arguments, passed, means, backward=True)
    slots, new = _slots(whole, part, y), means.new_empty
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
    launch(causal_queries_backward_kernel, programs, args, arguments.constants, arguments.tile)
    _final(call, part, passed[:, -1], passed_back)
    blocks = way_of(part.heads, part.chunks, arguments.bundle, arguments.sizes, arguments.multiprocessors).blocks
    products = None if call.d_gates is None else new((part.heads, part.chunks, blocks))
    scan_back(part, states, later, passed_back, products, arguments)
    tokens_backward(x, part, "query", work.d_logits, out, slots, arguments)  # whose slots take the means' memory
    args = (*arguments.keys, *arguments.output, *strided(out["value"]), *groups, *counts)
    launch(causal_keys_backward_kernel, programs, args, arguments.of_keys, arguments.tile)
    if call.d_gates is not None:
        args = (*arguments.keys, *arguments.output, *groups, *counts)
        launch(causal_gates_backward_kernel, programs, args, arguments.of_keys, arguments.tile)
        mine, chunks = slice(part.first_head, None), slice(part.first_chunk, None)
        found = gate_gradient(work.crossing, work.incoming, products)
        call.d_gates[mine, chunks][: part.heads, : part.chunks] = found
    tokens_backward(x, part, "key", work.d_logits, out, slots, arguments)
    return slots
