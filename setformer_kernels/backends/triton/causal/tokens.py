"""From the gradients of a chunk's logits to those of its tokens and of the parameters, and the sums over chunks."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands
from ..device.gradients import SUMS, kernel_sums, store_sums, sum_at, sum_slots, token_gradient
from ..device.head import gradient_factor, head_of, load_references
from ..device.logits import token_logits
from ..device.places import places_of, position_sums
from ..device.plan import row_update
from ..device.primitives import LN2, dot
from ..device.rows import key_mass, load_rows, row_starts, rows_of, store_rows
from ..host.groups import Sizes, cut_of
from ..host.launch import device_of, kernel, launch
from ..host.rows import stride_step, strided
from ..host.tiles import Tile
from ..parameters.gradients import Partials
from .chunk import chunk_of, place, tile_at
from .state import Arguments, Part


@triton.jit
def store_gradient(x, dl, kappa, cosine, inverse, rows, asked, live, out, y, part_y, at, factor, ADD, DOT, sizes, cut):
    """dx of one chunk's tokens and its part of dŷ [MP, DP], added to what stands there where ADD."""
    j = tl.arange(0, sizes.MP)
    for first in tl.static_range(0, sizes.DP, cut.DEPTH):
        columns = first + tl.arange(0, cut.DEPTH)
        tokens = load_rows(x, rows, live, columns, sizes.D)
        references = load_references(y, first, sizes.MP, sizes.DP, cut.DEPTH)
        operand, unit, gradient = token_gradient(
            dl, kappa, cosine, inverse, tokens, references, factor, sizes.DP == cut.DEPTH, DOT, cut.PRECISION, False
        )
        if out is not None:
            store_rows(out, rows, asked, columns, sizes.D, gradient)
        if part_y is not None:
            slot = part_y + (at * sizes.MP + j)[:, None] * sizes.DP + columns[None, :]
            d_y = dot(tl.trans(operand), unit, cut.PRECISION)
            if ADD:
                d_y += tl.load(slot)
            tl.store(slot, d_y)


@triton.jit
def store_parts(dl, total, kappa, cosine, beta, places, rows, live, parts, at, d_lam_a, ADD, BALANCED, DOT, sizes):
    """One chunk's parts of the hyperparameters and of the reference positions, added to what stands there where ADD."""
    d_tau = 0.0
    if sizes.P > 0:
        squares, pi_sums = position_sums(dl, total, places, rows, live, sizes)
        d_tau += tl.sum(squares)
        if parts.position is not None:
            j = tl.arange(0, sizes.MP)
            out = parts.position + (at * sizes.MP + j)[:, None] * sizes.PP + tl.arange(0, sizes.PP)[None, :]
            if ADD:
                pi_sums += tl.load(out)
            tl.store(out, pi_sums)
    if parts.sums is not None:
        beta_rows, epsilon_rows = kernel_sums(dl, kappa, cosine, beta, BALANCED, DOT)
        d_beta, d_epsilon = tl.sum(beta_rows), tl.sum(epsilon_rows)
        d_lam_b = tl.load(sum_at(parts.sums, at, "reference_relaxation"))  # of the query kernel
        if ADD:
            d_beta += tl.load(sum_at(parts.sums, at, "beta"))
            d_epsilon += tl.load(sum_at(parts.sums, at, "epsilon"))
            d_tau += tl.load(sum_at(parts.sums, at, "tau"))
        store_sums(parts.sums, at, d_beta, d_epsilon, d_lam_a, d_lam_b, d_tau)


@kernel
def causal_tokens_backward_kernel(
    x, stride_xb, stride_xh, stride_xn,  # [B, H, L, D] queries or keys, strides in units of cut.STEP
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] of keys, or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    d_x, stride_db, stride_dh, stride_dn,  # [B, H, L, D] or None
    d_log_a, stride_mb, stride_mh, stride_mn,  # [B, H, L] or None
    references, scalars, d_logits, parts,  # References, Scalars, [heads, chunks, BC, MP], Partials of the chunks
    H, L, chunks, first_head, first_chunk,
    KEYS: tl.constexpr, BALANCED: tl.constexpr, rule, sizes, cut,
):  # fmt: skip
    """One chunk's dq from dS; of KEYS dk and d log a from dω, and their parts added to those of the queries."""
    at, number, slot = place(chunks, first_head, first_chunk)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    tokens = rows_of(x, b, h, stride_xb, stride_xh, stride_xn, length, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    out = rows_of(d_x, b, h, stride_db, stride_dh, stride_dn, length, 1) if d_x is not None else None
    d_masses = rows_of(d_log_a, b, h, stride_mb, stride_mh, stride_mn, length, 1) if d_log_a is not None else None
    head = head_of(references, h, sizes, cut)
    j = tl.arange(0, sizes.MP)
    rows = chunk * cut.ROWS + tl.arange(0, cut.ROWS)
    asked = rows < length
    live, mass = key_mass(masses, rows, length, 0.0)
    l, kappa, cosine, inverse, first_columns = token_logits(tokens, rows, live, places, head, rule.DOT, sizes, cut)
    dl = tl.load(tile_at(d_logits, at, cut.ROWS, sizes))
    middle = 0.0 if rule.DOT else tl.exp2(-head.beta)
    part_log_b = parts.log_b + at * sizes.MP + j
    d_lam, row_sums = 0.0, tl.zeros([cut.ROWS], tl.float32)
    if KEYS:
        d_f = tl.sum(dl, 1)
        row_sums += (1.0 - head.lam_a) * d_f if rule.UPDATE_ROWS else d_f
        if d_log_a is not None:
            tl.store(row_starts(d_masses, rows), d_f, mask=asked)
        if rule.UPDATE_ROWS:
            p, top, total, f = row_update(l, tl.load(head.log_b + j), d_f, head.lam_a)
            from_rows = p * (head.lam_a * d_f / total)[:, None]
            dl -= from_rows
            shift = (middle - 1.0) * head.scale if BALANCED else 0.0  # Σ df = 0, as in `kernel_sums`
            d_lam += tl.sum(d_f * (top + tl.log2(total) - shift)) * LN2
            tl.store(part_log_b, tl.load(part_log_b) - tl.sum(from_rows, 0))
    else:
        tl.store(part_log_b, tl.sum(dl, 0))
    factor = gradient_factor(references.parameters, h, rule.DOT)
    store_gradient(
        tokens, dl, kappa, cosine, inverse, rows, asked, live, out, head.y, parts.y, at, factor, KEYS, rule.DOT, sizes,
        cut,
    )  # fmt: skip
    store_parts(
        dl, row_sums, kappa, cosine, head.beta, places, rows, live, parts, at, d_lam, KEYS, BALANCED, rule.DOT, sizes
    )


@triton.jit
def _fold(parts, out, bh, first_head, chunks, size, index, more):
    """The sum of a head's slots [chunks, size] at `index` into its one slot of the whole call, on what stands there.

    Stretches go from the last to the first: before the last, with no `more` after it, nothing stands there.
    """
    if parts is not None:
        inside = index < size
        out += (bh + first_head) * size + index
        before = tl.load(out, mask=index < tl.where(more > 0, size, 0), other=0.0)
        tl.store(out, before + sum_slots(parts, bh, 0, 1, chunks, chunks, size, index, inside), mask=inside)


@kernel
def causal_fold_backward_kernel(
    parts, whole,  # Partials of the chunks, of the call
    chunks, first_head, more,
    MP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one head's parts of dŷ, or in its last programs of everything else, summed over chunks."""
    blocks: tl.constexpr = MP * DP // BLOCK + MP * PP // BLOCK + 1
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    index = tl.arange(0, BLOCK)
    if block < MP * DP // BLOCK:
        _fold(parts.y, whole.y, bh, first_head, chunks, MP * DP, block * BLOCK + index, more)
    else:
        block -= MP * DP // BLOCK
        _fold(parts.position, whole.position, bh, first_head, chunks, MP * PP, block * BLOCK + index, more)
        if block == 0:
            _fold(parts.log_b, whole.log_b, bh, first_head, chunks, MP, index, more)
            _fold(parts.sums, whole.sums, bh, first_head, chunks, SUMS, index, more)


FOLD = Tile(rows=16, depth=256, warps=4, stages=1)  # a [16 slots, 256] tile is 32 numbers a thread


def tokens_backward(
    x: Operands,
    part: Part,
    name: str,
    d_logits: Tensor,
    out: Mapping[str, Tensor | None],
    slots: Partials,
    arguments: Arguments,
) -> None:
    """Launches the gradients of "query" or "key" from those of their logits."""
    keys, tokens = name == "key", getattr(x, name)
    log_a, d_log_a = (x.log_a, out["log_a"]) if keys else (None, None)
    step, packed = stride_step(tokens), arguments.pack is not None
    rows = (*strided(tokens, step, packed), *strided(log_a, packed=packed))
    rows += strided(getattr(x, name + "_position"), packed=packed)
    written = (*strided(out[name], packed=packed), *strided(d_log_a, packed=packed))
    args = (*rows, *written, arguments.references, arguments.scalars, d_logits, slots)
    cut = cut_of(arguments.tile, arguments.sizes, device_of(tokens), step, arguments.across)
    # What the gradients of all keys' logits sum to, a state takes or gives a share of.
    balanced = not keys or (arguments.gates.initial is None and not arguments.gates.follows)
    constants = arguments.constants | {"KEYS": keys, "BALANCED": balanced, "cut": cut.compiled}
    programs = part.heads * part.chunks
    launch(causal_tokens_backward_kernel, programs, (*args, *arguments.counts(part)), constants, arguments.tile)


def fold(part: Part, slots: Partials, whole: Partials, sizes: Sizes) -> None:
    """Sums the slots of a part, one per chunk, into their heads' one slot of the whole call."""
    blocks = sizes.MP * sizes.DP // FOLD.depth + sizes.MP * sizes.PP // FOLD.depth + 1
    args = (slots, whole, part.chunks, part.first_head, part.stretches - 1 - part.stretch)
    constants = {"SUMS": SUMS, "BLOCK": FOLD.depth} | {"MP": sizes.MP, "DP": sizes.DP, "PP": sizes.PP}
    launch(causal_fold_backward_kernel, part.heads * blocks, args, constants, FOLD)
