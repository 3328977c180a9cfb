"""From the sums of each chunk to what comes before it: bundles of chunks, which may be walked side by side.

What comes before a chunk is S ⊕ A: S the state that its bundle began with, A the sums of the bundle's chunks before it.
S ⊕ the A of all its chunks is what the next bundle begins with.  S carries what rounding took from it; A, of BUNDLE
tokens at most, does not.  That is the definition, whoever works it out:

    one program for a head's columns walks all chunks, in one launch; or
    a program for each bundle sums its A, one for a head's columns adds these up, and one for each bundle walks again

which is two launches more and reads the sums twice, but takes as many steps as there are bundles, not chunks.  Both
give the same bits: what is multiplied, but for the fading by gates, is multiplied by powers of two.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device.primitives import INF, finite_or_zero, log_and_rest
from ..host.groups import Sizes
from ..host.launch import kernel, launch
from ..host.tiles import Tile
from .carried import begun, fading, power_of_two, store_state, with_bundle
from .segments import causal_segments_kernel
from .state import Arguments, Part, States, sums_of

SCAN = Tile(rows=0, depth=256, warps=2, stages=4)  # 4 numbers a thread: one wide load; many programs hide the steps
# By the machine code for sm_90: 360 cycles of latency a step, of which 92 issue, 0.7 of that to sum up alone, 1.2 of it
# to add a bundle.  So the programs of a multiprocessor that walk as fast as one, and steps that two launches more take.
AT_ONCE, LAUNCHES = 4, 16
ALONE, CARRY = 0.7, 1.2


class Bundles(NamedTuple):
    """Of each bundle the sums A of its chunks, and what it begins with, S."""

    n: Tensor  # [heads, bundles, MP, EP] of e^ω v, of A and then of S
    c: Tensor  # [heads, bundles, MP] of e^ω, of A, in units of 2^k
    k: Tensor  # [heads, bundles, MP]
    before_c: Tensor  # [heads, bundles, MP] of S
    before_k: Tensor  # [heads, bundles, MP]


@triton.jit
def _store_log(logs, rests, at, c, k):
    """log2 of c·2^k, and where there is room for it what rounding has left of that."""
    log, rest = log_and_rest(k, c)
    tl.store(logs + at, log)
    if rests is not None:
        tl.store(rests + at, rest)


@triton.jit
def _walk(
    sums, states, decay, gate, first, count, s_n, s_c, s_k, column, e,
    WRITE: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(N [COLUMNS, EP], C, k [COLUMNS]) of A, `count` chunks from slot `first` on; the first has the gate `gate`.

    May WRITE what comes before each, for an S of (s_n, s_c) 2^{s_k}.
    """
    a_n, a_c, a_k = tl.zeros_like(s_n), tl.zeros_like(s_c), tl.zeros_like(s_c) - INF
    c, top = s_c, tl.where(s_c > 0, s_k, 0.0)
    of_s, of_a = tl.zeros_like(s_c) + 1.0, tl.zeros_like(s_c)
    since = 0.0  # what S has faded by beside whole turns
    for step in tl.range(0, count, num_stages=STAGES):
        at = (first + step) * MP + column
        numbers = at[:, None] * EP + e[None, :]
        peak, mass, pooled = tl.load(sums.peaks + at), tl.load(sums.totals + at), tl.load(sums.pooled + numbers)
        kept, before_k = c, tl.where(c > 0, top, -INF)
        if WRITE:
            held = s_n
            if decay is not None:
                held += s_n * since
            n = held * of_s[:, None] + a_n * of_a[:, None]
            tl.store(states.z + numbers, n * tl.where(c > 0, 1.0 / tl.where(c > 0, c, 1.0), 0.0)[:, None])
            _store_log(states.log_c, states.rest, at, c, top)
        if decay is not None:
            turns, fade = fading(tl.load(decay + 2 * (gate + step)))
            a_n, a_c, a_k = a_n + a_n * fade, a_c + a_c * fade, a_k + turns
            kept, before_k = kept + kept * fade, before_k + turns
        unit = tl.maximum(a_k, peak)
        old, new = power_of_two(a_k - finite_or_zero(unit)), power_of_two(peak - finite_or_zero(unit))
        a_n, a_c, a_k = a_n * old[:, None] + pooled * new[:, None], a_c * old + mass * new, unit
        if WRITE:
            held_c, held_k = s_c, tl.where(s_c > 0, s_k, -INF)
            if decay is not None:
                turns, since = fading(tl.load(decay + 2 * (gate + step) + 1))
                held_c, held_k = s_c + s_c * since, held_k + turns
            top = finite_or_zero(tl.maximum(held_k, a_k))
            of_s, of_a = power_of_two(held_k - top), power_of_two(a_k - top)
            c = held_c * of_s + a_c * of_a
            if states.kept is not None:
                tl.store(states.kept + at, kept * power_of_two(before_k - top) / tl.where(c > 0, c, 1.0))
                _store_log(states.log_end, states.rest_end, at, c, top)
    return a_n, a_c, a_k


@kernel
def causal_scan_kernel(
    sums, states,  # Sums; States, the means in place of the pooled values
    decay, initial, passed,  # [BH, chunks of a head, 2] or None, [BH, M, 2E + 3] or None, [heads, stretches, M, 2E + 3]
    first_head, first_chunk, all_chunks, chunks, stretch, stretches,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of each chunk become what comes before it, in COLUMNS columns of a head, bundle after bundle.

    A stretch begins with the state that the one before passed on, the first with the initial one; it passes on its own,
    in a place of its own or in one of two.
    """
    blocks: tl.constexpr = MP // COLUMNS
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    # Compared in vectors: an interpreter's bool of numbers would make no mask.
    real, follows = column < M, (tl.zeros_like(column) + stretch) > 0
    handed, given = (bh * stretches + (stretch + stretches - 1) % stretches) * M, (bh + first_head) * M
    n, n_lost, c, c_lost, k = begun(passed, handed + column, initial, given + column, follows, real, e, E)
    gate = (bh + first_head) * all_chunks + first_chunk
    for first in range(0, chunks, BUNDLE):
        count = tl.minimum(chunks - first, BUNDLE)
        a_n, a_c, a_k = _walk(
            sums, states, decay, gate + first, bh * chunks + first, count, n + n_lost, c + c_lost, k, column, e,
            True, MP, EP, STAGES,
        )  # fmt: skip
        n, n_lost, c, c_lost, k = with_bundle(n, n_lost, c, c_lost, k, a_n, a_c, a_k, decay, gate + first + count - 1)
    store_state(passed, (bh * stretches + stretch % stretches) * M + column, n, n_lost, c, c_lost, k, real, e, E)


@kernel
def causal_bundles_kernel(
    sums, states, bundles, decay,  # Sums, States, Bundles; as above
    counts,  # of a packed batch [bundles of a head] int32: chunks of each; else None
    first_head, first_chunk, all_chunks, chunks,
    WRITE: tl.constexpr, MP: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One bundle's A in COLUMNS columns; or, to WRITE, what comes before its chunks, from what it begins with."""
    blocks: tl.constexpr = MP // COLUMNS
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    many = tl.cdiv(chunks, BUNDLE)
    bh, first = slot // many, slot % many * BUNDLE
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    at = slot * MP + column
    numbers = at[:, None] * EP + e[None, :]
    s_n, s_c = tl.zeros([COLUMNS, EP], tl.float32), tl.zeros([COLUMNS], tl.float32)
    s_k = s_c
    if WRITE:
        s_n, s_c, s_k = tl.load(bundles.n + numbers), tl.load(bundles.before_c + at), tl.load(bundles.before_k + at)
    gate, count = (bh + first_head) * all_chunks + first_chunk + first, tl.minimum(chunks - first, BUNDLE)
    if counts is not None:
        count = tl.load(counts + (first_chunk + first) // BUNDLE)
    a_n, a_c, a_k = _walk(
        sums, states, decay, gate, bh * chunks + first, count, s_n, s_c, s_k, column, e,
        WRITE, MP, EP, STAGES,
    )  # fmt: skip
    if not WRITE:
        tl.store(bundles.n + numbers, a_n)
        tl.store(bundles.c + at, a_c)
        tl.store(bundles.k + at, a_k)


@kernel
def causal_carry_kernel(
    bundles, decay, initial, passed,  # as above
    first_head, first_chunk, all_chunks, chunks, stretch, stretches,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    COLUMNS: tl.constexpr, BUNDLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of each bundle become what it begins with, in COLUMNS columns of a head; stretches as in the scan."""
    blocks: tl.constexpr = MP // COLUMNS
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    column, e = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, EP)
    # Compared in vectors: an interpreter's bool of numbers would make no mask.
    real, follows = column < M, (tl.zeros_like(column) + stretch) > 0
    handed, given = (bh * stretches + (stretch + stretches - 1) % stretches) * M, (bh + first_head) * M
    n, n_lost, c, c_lost, k = begun(passed, handed + column, initial, given + column, follows, real, e, E)
    many = tl.cdiv(chunks, BUNDLE)
    gate = (bh + first_head) * all_chunks + first_chunk - 1
    for bundle in tl.range(0, many, num_stages=STAGES):
        at = (bh * many + bundle) * MP + column
        numbers = at[:, None] * EP + e[None, :]
        a_n, a_c, a_k = tl.load(bundles.n + numbers), tl.load(bundles.c + at), tl.load(bundles.k + at)
        tl.store(bundles.n + numbers, n + n_lost)
        tl.store(bundles.before_c + at, c + c_lost)
        tl.store(bundles.before_k + at, k)
        last = gate + tl.minimum((bundle + 1) * BUNDLE, chunks)
        n, n_lost, c, c_lost, k = with_bundle(n, n_lost, c, c_lost, k, a_n, a_c, a_k, decay, last)
    store_state(passed, (bh * stretches + stretch % stretches) * M + column, n, n_lost, c, c_lost, k, real, e, E)


class Way(NamedTuple):
    """How a part is scanned."""

    blocks: int  # programs of a head
    bundle: int  # chunks
    side_by_side: bool  # whether bundles are
    constants: dict[str, int]  # what all scanning kernels are compiled for


@functools.cache
def heads_at_once(sizes: Sizes, multiprocessors: int) -> int:
    """How many heads are scanned as fast as one."""
    return math.ceil(AT_ONCE * multiprocessors / (sizes.MP // _columns(sizes)))


def _columns(sizes: Sizes) -> int:
    """Columns of a program."""
    return max(1, min(SCAN.depth // sizes.EP, sizes.MP))


@functools.lru_cache(1024)
def way_of(heads: int, chunks: int, bundle: int, sizes: Sizes, multiprocessors: int, packed: bool = False) -> Way:
    """Bundles go side by side where steps of one program take longer than all programs' steps and the launches do.

    Those of a packed batch always do: nobody knows how long its segments are.
    """
    blocks, many, at_once = sizes.MP // _columns(sizes), math.ceil(chunks / bundle), AT_ONCE * multiprocessors
    turns, all_turns = (max(1.0, heads * blocks * n / at_once) for n in (1, many))
    apart = (1 + ALONE) * all_turns * min(bundle, chunks) + CARRY * turns * many + LAUNCHES
    constants = {"MP": sizes.MP, "EP": sizes.EP, "COLUMNS": _columns(sizes), "BUNDLE": bundle, "STAGES": SCAN.stages}
    return Way(blocks, bundle, packed or apart < turns * chunks, constants)


def new_bundles(part: Part, way: Way, z: Tensor) -> Bundles:
    """Room for the bundles of a part; z [heads, chunks, MP, EP]."""
    shape = (part.heads, math.ceil(part.chunks / way.bundle), z.shape[2])
    return Bundles(z.new_empty((*shape, z.shape[3])), *z.new_empty((4, *shape)).unbind())


def scan(part: Part, arguments: Arguments, passed: Tensor, z: Tensor, backward: bool) -> States:
    """What comes before each chunk, the means in `z`, after the stretches before were scanned.

    passed [heads, n, M, 2E + 3]: the states after n stretches, or after the last two of them.  States that only the
    backward pass reads are None without it.
    """
    sizes, gates = arguments.sizes, arguments.gates
    way = way_of(
        part.heads,
        part.chunks,
        arguments.bundle,
        arguments.sizes,
        arguments.multiprocessors,
        arguments.pack is not None,
    )
    log_c, *ends = z.new_empty((3 if backward else 1, *z.shape[:3])).unbind()
    log_end, kept = ends if backward else (None, None)
    rest, rest_end = (torch.empty_like(t) if t is not None and arguments.exact else None for t in (log_c, log_end))
    sums, states = sums_of(part, arguments, z), States(log_c, rest, log_end, rest_end, kept, z)
    at, constants = (part.first_head, part.first_chunk, gates.chunks, part.chunks), way.constants
    whole = constants | {"M": sizes.M, "E": sizes.E}
    begins = (gates.decay, gates.initial, passed, *at, part.stretch, passed.shape[1])
    programs = part.heads * way.blocks if part.chunks else 0
    if not way.side_by_side:
        launch(causal_scan_kernel, programs, (sums, states, *begins), whole, SCAN)
        return states
    bundles, pack = new_bundles(part, way, z), arguments.pack
    many = programs * bundles.n.shape[1]
    walk = (sums, states, bundles, gates.decay, None if pack is None else pack.counts, *at)
    launch(causal_bundles_kernel, many, walk, {"WRITE": False} | constants, SCAN)
    if pack is None:
        launch(causal_carry_kernel, programs, (bundles, *begins), whole, SCAN)
    else:
        args = (bundles, pack, arguments.ends, *begins, arguments.heads, pack.segments)
        launch(causal_segments_kernel, programs * pack.segments, args, whole, SCAN)
    launch(causal_bundles_kernel, many, walk, {"WRITE": True} | constants, SCAN)
    return states
