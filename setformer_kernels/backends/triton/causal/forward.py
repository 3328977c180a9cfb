"""Causal attention for T ≤ 1, linear in the length: sums of chunks of keys, a scan over chunks, queries in their chunk.

    ω_sj = ℓ_sj + f̂_s + log a_s,   f̂_s = −λ_a LSE_j(ℓ_sj + log b_j)   (T = 0: 0)
    C_ij = Σ_{s≤i} e^{ω_sj},   z_ij = Σ_{s≤i} e^{ω_sj} v_s / C_ij
    W_ij = softmax_j(ℓ(q_i, y_j) + log b_j − λ_b log C_ij)   (T = 0: without C),   o_i = Σ_j W_ij z_ij

With C⁰, z⁰ the sums and means of all keys before a chunk,

    o_i = Σ_j W_ij (C⁰_j / C_ij) z⁰_j + Σ_{s≤i in the chunk} A_is v_s,   A_is = Σ_j W_ij e^{ω_sj} / C_ij

Defined by `reference.attention.causal`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options, Stream, replaced
from ....reference.state import empty_like
from ..device.head import head_of
from ..device.logits import token_logits
from ..device.places import places_of
from ..device.primitives import dot, rounded
from ..device.rows import load_rows, rows_of, store_rows
from ..device.softmax import dropout_constants, kept_weights
from ..host.groups import Dropout, cut_of, rule_of, sizes_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import rows_like, stride_step, strided, unit_rows
from ..host.tiles import Tile, tile
from ..parameters.prepare import References, prepare
from .chunk import chunk_keys, chunk_of, chunk_weights, place, query_weights, state_at
from .gates import gates_of
from .scan import heads_at_once, scan
from .segments import Ends, Pack, pack_of
from .state import Arguments, Backward, Gates, Part, Scalars, chunks_of, new_passed, parts


@kernel
def causal_kernel(
    query, stride_qb, stride_qh, stride_qn,  # [B, H, L, D], strides in units of cut.STEP
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], likewise
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    query_position, stride_sb, stride_sh, stride_sn,  # [B, H, L, P] or None
    key_position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    output, stride_ob, stride_oh, stride_on,  # [B, H, L, E], as the queries
    references, scalars, states,  # References, Scalars, States
    H, L, chunks, first_head, first_chunk, threshold,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk of one head."""
    token: tl.constexpr = value.dtype.element_ty
    FACTOR: tl.constexpr = tl.float32 if token == tl.float16 else token
    at, number, slot = place(chunks, first_head, first_chunk)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    queries = rows_of(query, b, h, stride_qb, stride_qh, stride_qn, length, cut.STEP)
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, length, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, length, cut.STEP)
    outputs = rows_of(output, b, h, stride_ob, stride_oh, stride_on, length, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    asking = (
        places_of(query_position, references, b, h, stride_sb, stride_sh, stride_sn, sizes) if sizes.P > 0 else None
    )
    places = places_of(key_position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    rows, asked, log_b, known = chunk_keys(
        keys, masses, places, head, states.log_c, states.rest, at, number, chunk, slot, L, scalars, rule, sizes, cut
    )
    l, kappa, cosine, inverse, first_columns = token_logits(queries, rows, asked, asking, head, rule.DOT, sizes, cut)
    w = query_weights(l, log_b, known.log_c, head.lam_b, rule.UPDATE_ROWS)
    # b·H + h is `number`, but written anew: carried along, it makes 8 bytes of registers spill (sm_80, bfloat16, D 64).
    stream, counter = scalars, b.to(tl.int64) * H + h
    if scalars.lengths is not None:  # a segment of a packed batch has a seed of its own
        counter = h.to(tl.int64)
        if scalars.seed is not None:
            stream = Dropout(scalars.seed + slot, scalars.keep_scale)
    w, normaliser = kept_weights(w, stream, counter, length, rows, threshold, sizes)
    a, carried = chunk_weights(w, known, FACTOR, cut.PRECISION)
    a, carried = rounded(a, token), rounded(carried, token)
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        e = first + tl.arange(0, cut.VDEPTH)
        v = load_rows(values, rows, known.live, e, sizes.E)
        means = rounded(tl.load(state_at(states.z, at, e, sizes)), token)
        o = (dot(carried, means, cut.PRECISION) + dot(a, v, cut.PRECISION)) * normaliser[:, None]
        store_rows(outputs, rows, asked, e, sizes.E, o)


def causal(
    x: Operands, opt: Options, stream: Stream, with_state: bool, cu: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, H, L, E] in the dtype and memory order of the queries, for T ≤ 1, and the state after the last key.

    cu: the offsets [N + 1], N ≥ 1, of a packed batch; states then are [N, H, M, 2E + 3].
    """
    assert x.query is not None
    output = rows_like(x.query, x.value.shape[-1])
    state = empty_like(x, with_state, None if cu is None else cu.shape[0] - 1)
    sizes = sizes_of(x)
    t = tile("chunk", device_of(x.key).family, max(sizes.MP, sizes.DP, sizes.EP), x.key.element_size(), sizes.MP)
    pack, ends, length = None, Ends(None), x.key.shape[2]
    if cu is not None:
        output.rows.zero_()
        if with_state:  # those of segments without tokens stay
            state.zero_() if stream.initial_state is None else state.copy_(stream.initial_state)
        if length == 0 or cu.shape[0] < 2:
            return output.delivered(), state
        pack, ends = pack_of(cu, length, t.rows, chunks_of(t.rows)), Ends(state if with_state else None)
        length = pack.rows.shape[0]
    x, gates = with_unit_rows(x), gates_of(stream, length, t.rows, False, pack)
    arguments = chunk_arguments(x, prepare(x, opt), opt, t, output.rows, gates, pack, ends)
    bundle = (sizes.EP + 4) / arguments.bundle  # numbers of one, shared by its chunks
    numbers = math.ceil(sizes.MP * (sizes.EP + 3 + arguments.exact + bundle))
    for stretches in parts(x, t.rows, length, numbers, heads_at_once(sizes, arguments.multiprocessors)):
        passed = _heads(stretches, arguments)
        if with_state and pack is None:
            first, last = stretches[0].first_head, (len(stretches) - 1) % passed.shape[1]
            state.flatten(0, 1)[first : first + passed.shape[0]].copy_(passed[:, last])
    return output.delivered(), state


def _heads(stretches: list[Part], arguments: Arguments) -> Tensor:
    """Writes the rows of some heads; the states after the last two stretches, which take turns in two places."""
    passed = new_passed(stretches[0], arguments, min(2, len(stretches)))
    for part in stretches:
        _part(part, arguments, passed)
    return passed


def _part(part: Part, arguments: Arguments, passed: Tensor) -> None:
    """One stretch of some heads."""
    sizes = arguments.sizes
    room = passed.new_empty((part.heads, part.chunks, sizes.MP, sizes.EP))
    states = scan(part, arguments, passed, room, backward=False)
    tensors = (*arguments.tokens, *arguments.output, arguments.references, arguments.scalars, states)
    args = (*tensors, *arguments.counts(part), arguments.threshold)
    launch(causal_kernel, part.heads * part.chunks, args, arguments.constants, arguments.tile)


def with_unit_rows(x: Operands) -> Operands:
    """Token tensors with unit stride along their last dimension."""
    names = ("query", "key", "value", "query_position", "key_position")
    return replaced(x, **{name: unit_rows(getattr(x, name)) for name in names})


def chunk_arguments(
    x: Operands,
    prepared: References,
    opt: Options,
    t: Tile,
    output: Tensor,
    gates: Gates,
    pack: Pack | None,
    ends: Ends,
    own: tuple[Tile, Tile] | None = None,
) -> Arguments:
    """What the kernels on chunks share; `output` is o, or the gradient that arrives there.

    own: of the backward pass, the tiles of its kernels on queries and on gates.
    """
    assert x.query is not None
    (_, h, l, _), sizes, packed = x.key.shape, sizes_of(x), pack is not None
    device = device_of(x.key)
    if x.key.dtype == torch.float16:  # with too few exponents for factors
        device = device.in_parts
    step = stride_step(x.query, x.key, x.value, output)
    query, key = strided(x.query, step, packed), strided(x.key, step, packed)
    value, log_a = strided(x.value, step, packed), strided(x.log_a, packed=packed)
    asking, places = strided(x.query_position, packed=packed), strided(x.key_position, packed=packed)
    tokens, keys = (*query, *key, *value, *log_a, *asking, *places), (*key, *value, *log_a, *places)
    threshold, keep_scale = dropout_constants(opt.dropout_p)
    # A mass is 1 where none is given: a state must not depend on L.
    scalars = Scalars(x.seed, keep_scale, 0.0, gates.sums)
    if pack is not None:
        l, seeds = pack.rows.shape[0], None if x.seed is None else x.seed + pack.firsts
        scalars = Scalars(seeds, keep_scale, 0.0, gates.sums, pack.firsts, pack.lengths, pack.numbers)
    across = 16 * t.warps <= sizes.MP
    rule, compiled = rule_of(opt).compiled, sizes.compiled

    def constants(by: Tile, across: bool) -> dict[str, Any]:
        return {"rule": rule, "sizes": compiled, "cut": cut_of(by, sizes, device, step, across).compiled}

    backward = None
    if own is not None:
        # The pass on keys has more operands: with warps across the references it takes 255 registers and spills, else
        # 150 to 170; but for the three parts of float32 on Hopper and Blackwell.
        others = across and x.key.element_size() == 4 and device.family in ("sm_90", "sm_100")
        cuts = ((own[0], across), (t, others), (own[1], others))
        backward = Backward(*((constants(*cut), cut[0]) for cut in cuts))
    written = strided(output, step, packed)
    return Arguments(
        tokens, keys, written, prepared, scalars, gates, h, l, threshold, sizes, across, constants(t, across),
        t, chunks_of(t.rows), device.multiprocessors, pack, ends, backward,
    )  # fmt: skip
