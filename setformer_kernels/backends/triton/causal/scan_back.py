"""From what each chunk's queries leave to what all later ones leave, in units of C where the chunk ends.

What later chunks leave is B + P·R: R what reached the end of the chunk's bundle, B the sums of what the chunks between
leave, and P which part of C there C at the chunk's end is.  As in `scan`, one program walks all chunks of a head's
columns, from the last to the first, or one for each bundle does, and both give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..host.launch import kernel, launch
from .scan import SCAN, new_bundles, way_of
from .segments import causal_segments_backward_kernel
from .state import Arguments, Part, States


@triton.jit
def _walk_back(
    own_o, own_c, later_o, later_c, states, products, slot, blocks, first, count, r_o, r_c, column, e,
    WRITE: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(B [COLUMNS, EP], B of d log C [COLUMNS], P [COLUMNS]) of `count` chunks from slot `first` on.

    May WRITE what later chunks leave, for an R of (r_o, r_c); with products, the program's part (its slot of `blocks`)
    of what of this, in the carry's sum and in ⟨carry, z⟩, goes through each chunk.
    """
    b_o, b_c, p = tl.zeros_like(r_o), tl.zeros_like(r_c), tl.zeros_like(r_c) + 1.0
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = first + count - 1 - step
        at = chunk * MP + column
        numbers = at[:, None] * EP + e[None, :]
        kept, o, c = tl.load(states.kept + at), tl.load(own_o + numbers), tl.load(own_c + at)
        if WRITE:
            carry_o, carry_c = b_o + r_o * p[:, None], b_c + r_c * p
            tl.store(later_o + numbers, carry_o)
            tl.store(later_c + at, carry_c)
            if products is not None:
                through = tl.sum(carry_o * tl.load(states.z + numbers), 1) + carry_c
                tl.store(products + chunk * blocks + slot, tl.sum(through * kept, 0))
        b_o, b_c, p = o + b_o * kept[:, None], c + b_c * kept, p * kept
    return b_o, b_c, p


@kernel
def causal_scan_backward_kernel(
    own_o, own_c, later_o, later_c,  # [heads, chunks, MP, EP] and [heads, chunks, MP]: the former in place
    states, passed_o, passed_c,  # States, [heads, MP, EP], [heads, MP]
    products,  # [heads, chunks, programs of a head] or None
    chunks, more,
    MP: tl.constexpr, EP: tl.constexpr, COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of Σ W do and Σ d log C of a head, from the last chunk to the first.

    Where `more` follows, a stretch begins with what that passed on; it passes on the same, in its place.
    """
    blocks: tl.constexpr = MP // COLUMNS
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks
    column, e = slot * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    r_o, r_c = _received(passed_o, passed_c, bh, more, column, e, MP, EP)
    many = tl.cdiv(chunks, BUNDLE)
    for step in range(many):
        first = (many - 1 - step) * BUNDLE
        count = tl.minimum(chunks - first, BUNDLE)
        b_o, b_c, p = _walk_back(
            own_o, own_c, later_o, later_c, states, products, slot, blocks, bh * chunks + first, count, r_o, r_c,
            column, e, True, MP, EP, STAGES,
        )  # fmt: skip
        r_o, r_c = b_o + r_o * p[:, None], b_c + r_c * p
    _leave(passed_o, passed_c, r_o, r_c, bh, column, e, MP, EP)


@triton.jit
def _received(passed_o, passed_c, bh, more, column, e, MP: tl.constexpr, EP: tl.constexpr):
    """What reaches the end of the last chunk [COLUMNS, EP], [COLUMNS]; 0 where no more follows."""
    at, follows = bh * MP + column, (tl.zeros_like(column) + more) > 0
    numbers = at[:, None] * EP + e[None, :]
    r_o = tl.load(passed_o + numbers, mask=follows[:, None] & (e >= 0)[None, :], other=0.0)
    r_c = tl.load(passed_c + at, mask=follows, other=0.0)
    tl.debug_barrier()  # threads that share a number: all read it before one of them writes it
    return r_o, r_c


@triton.jit
def _leave(passed_o, passed_c, r_o, r_c, bh, column, e, MP: tl.constexpr, EP: tl.constexpr):
    at = bh * MP + column
    tl.store(passed_o + at[:, None] * EP + e[None, :], r_o)
    tl.store(passed_c + at, r_c)


@kernel
def causal_bundles_backward_kernel(
    own_o, own_c, later_o, later_c,  # as above
    states, bundles, products,  # States, Bundles: B, B of d log C, P, R of d log C, -; as above
    counts,  # of a packed batch [bundles of a head] int32: chunks of each; else None
    first_chunk, chunks,
    WRITE: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One bundle's B and P in COLUMNS columns; or, to WRITE, what later chunks leave, from what reaches its end."""
    blocks: tl.constexpr = MP // COLUMNS
    at_bundle, many = (tl.program_id(0) // blocks).to(tl.int64), tl.cdiv(chunks, BUNDLE)
    bh, first, slot = at_bundle // many, at_bundle % many * BUNDLE, tl.program_id(0) % blocks
    column, e = slot * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    at = at_bundle * MP + column
    numbers = at[:, None] * EP + e[None, :]
    r_o, r_c = tl.zeros([COLUMNS, EP], tl.float32), tl.zeros([COLUMNS], tl.float32)
    if WRITE:
        r_o, r_c = tl.load(bundles.n + numbers), tl.load(bundles.before_c + at)
    count = tl.minimum(chunks - first, BUNDLE)
    if counts is not None:
        count = tl.load(counts + (first_chunk + first) // BUNDLE)
    b_o, b_c, p = _walk_back(
        own_o, own_c, later_o, later_c, states, products, slot, blocks, bh * chunks + first, count, r_o, r_c,
        column, e, WRITE, MP, EP, STAGES,
    )  # fmt: skip
    if not WRITE:
        tl.store(bundles.n + numbers, b_o)
        tl.store(bundles.c + at, b_c)
        tl.store(bundles.k + at, p)


@kernel
def causal_carry_backward_kernel(
    bundles, passed_o, passed_c,  # as above
    chunks, more,
    MP: tl.constexpr, EP: tl.constexpr, COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what each bundle leaves to what reaches its end, in COLUMNS columns of a head."""
    blocks: tl.constexpr = MP // COLUMNS
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    r_o, r_c = _received(passed_o, passed_c, bh, more, column, e, MP, EP)
    many = tl.cdiv(chunks, BUNDLE)
    for step in tl.range(0, many, num_stages=STAGES):
        at = (bh * many + many - 1 - step) * MP + column
        numbers = at[:, None] * EP + e[None, :]
        b_o, b_c, p = tl.load(bundles.n + numbers), tl.load(bundles.c + at), tl.load(bundles.k + at)
        tl.store(bundles.n + numbers, r_o)
        tl.store(bundles.before_c + at, r_c)
        r_o, r_c = b_o + r_o * p[:, None], b_c + r_c * p
    _leave(passed_o, passed_c, r_o, r_c, bh, column, e, MP, EP)


def scan_back(
    part: Part,
    states: States,
    left: tuple[Tensor, Tensor, Tensor],
    passed: tuple[Tensor, Tensor],
    products: Tensor | None,
    arguments: Arguments,
) -> None:
    """What each chunk's queries leave becomes what all later ones leave; the stretches after it went first.

    `left`: [heads, chunks, MP, EP], in place, and [heads, chunks, MP], from the second to the third; `passed`, from
    stretch to stretch, without chunks, holds something before the first where the final state has a gradient;
    `products` [heads, chunks, programs].  Of a packed batch `passed` has two places, [2, heads, ..], which take turns.
    """
    way = way_of(
        part.heads,
        part.chunks,
        arguments.bundle,
        arguments.sizes,
        arguments.multiprocessors,
        arguments.pack is not None,
    )
    more = part.stretches - 1 - part.stretch + arguments.gates.follows
    constants, programs = way.constants, part.heads * way.blocks if part.chunks else 0
    own, later = left[:2], left[::2]
    if not way.side_by_side:
        every = (*own, *later, states, *passed, products, part.chunks, more)
        launch(causal_scan_backward_kernel, programs, every, constants, SCAN)
        return
    bundles, pack = new_bundles(part, way, own[0]), arguments.pack
    many, at = programs * bundles.n.shape[1], (None if pack is None else pack.counts, part.first_chunk, part.chunks)
    walk = (*own, *later, states, bundles, products, *at)
    launch(causal_bundles_backward_kernel, many, walk, {"WRITE": False} | constants, SCAN)
    if pack is None:
        launch(causal_carry_backward_kernel, programs, (bundles, *passed, part.chunks, more), constants, SCAN)
    else:
        first = part.first_head, part.first_chunk
        counts = (*first, part.heads, part.chunks, part.stretch, arguments.heads, pack.segments)
        whole = constants | {"M": arguments.sizes.M, "E": arguments.sizes.E}
        args = (bundles, pack, arguments.ends, *passed, *counts)
        launch(causal_segments_backward_kernel, programs * pack.segments, args, whole, SCAN)
    launch(causal_bundles_backward_kernel, many, walk, {"WRITE": True} | constants, SCAN)
