"""What comes before each chunk: sums of the chunks' keys, scanned along the length.

Log gates sum to Γ from the first key of a chunk on: a chunk's sums are those at its end, Σ e^{ω_s + Γ − Γ_s}, and what
the scan passes through a chunk fades by its whole Γ.

Sums and means of every chunk take memory; so the heads are worked on in parts, one after another (`parts`), and where
one head alone would take too much, its length in stretches.  Kernels get the tensors of the whole call, and count heads
and chunks from the part's first: so no address, whose alignment Triton compiles for, depends on the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands
from ..device.head import head_of
from ..device.places import places_of
from ..device.primitives import dot, finite_or_zero, rounded
from ..device.rows import load_rows, rows_of
from ..host.groups import Sizes
from ..host.launch import kernel, launch
from ..host.tiles import Tile
from ..parameters.prepare import References
from .carried import common_units, faded, fading, floor_log2, log_of, mean, power_of_two, taken_in
from .chunk import chunk_log_weights, gate_sums, place, state_at

WORKSPACE_SHARE = 0.23  # of the bytes of q, k, v and o: what a part may take, so that all workspaces stay within 1/4
# With as many tokens of all heads, the share of 64 dims in 16 bits fills a device with chunks.  With fewer, launches
# take longer than what they launch: a part may take as many bytes as the backward pass at B1 H8 L4096, M = D = E = 64.
FEW_TOKENS, FEW_BYTES = 32 * 4096, 96 << 20
SCAN = Tile(rows=0, depth=256, warps=2, stages=4)  # 4 numbers a thread: one wide load; many programs hide the steps


class Scalars(NamedTuple):
    """Numbers that no kernel is compiled for: those of `Dropout`, and of the masses."""

    seed: Tensor | None  # [] int64, None without dropout
    keep_scale: float  # 1/(1 − p)
    uniform: float  # log2 of a key's mass where none is given
    gates: (
        Tensor | None
    )  # [BH, chunks · BC, 2] Γ in base 2 after each key, from the first of its chunk on, as two numbers


class Part(NamedTuple):
    """Some heads of one call, counted by b·H + h, and some chunks of their length."""

    first_head: int
    heads: int
    first_chunk: int
    chunks: int
    stretch: int  # number of the part among those of the same heads
    stretches: int  # how many these are


class Sums(NamedTuple):
    """Of each chunk at its end Σ e^ω = totals · 2^peaks, Σ e^ω v = pooled · 2^peaks; peaks are integers or −∞."""

    peaks: Tensor  # [heads, chunks, MP]
    totals: Tensor  # [heads, chunks, MP]
    pooled: Tensor  # [heads, chunks, MP, EP]


class States(NamedTuple):
    """What comes before the chunks of a part."""

    log_c: Tensor  # [heads, chunks, MP] log2 C before each chunk
    log_end: Tensor  # [heads, chunks, MP] and after it
    kept: Tensor  # [heads, chunks, MP] which part of the latter the former is, after it faded
    z: Tensor  # [heads, chunks, MP, EP] means before each chunk


@kernel
def causal_sums_kernel(
    key, stride_kb, stride_kh, stride_kn,  # [B, H, L, D], strides in units of cut.STEP
    value, stride_vb, stride_vh, stride_vn,  # [B, H, L, E], likewise
    log_a, stride_ab, stride_ah, stride_an,  # [B, H, L] or None
    position, stride_pb, stride_ph, stride_pn,  # [B, H, L, P] or None
    references, scalars, sums,  # References, Scalars, Sums
    H, L, chunks, first_head, first_chunk,
    rule, sizes, cut,
):  # fmt: skip
    """One chunk's sums."""
    at, number, chunk = place(chunks, first_head, first_chunk)
    b, h = number // H, number % H
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, L, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, L, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, L, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    j = tl.arange(0, sizes.MP)
    rows = chunk * cut.ROWS + tl.arange(0, cut.ROWS)
    log_b = tl.load(head.log_b + j)
    live, omega = chunk_log_weights(keys, masses, places, head, log_b, rows, scalars.uniform, rule, sizes, cut)
    if scalars.gates is not None:
        gamma, fine, whole, to_end = gate_sums(scalars.gates, number, chunk, L, cut.ROWS)
        omega += to_end[:, None]
    peak = tl.ceil(tl.max(omega, 0))
    e = tl.exp2(omega - finite_or_zero(peak)[None, :])
    tl.store(sums.peaks + at * sizes.MP + j, peak)
    tl.store(sums.totals + at * sizes.MP + j, tl.sum(e, 0))
    weights = tl.trans(rounded(e, value.dtype.element_ty))
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        v = load_rows(values, rows, live, columns, sizes.E)
        tl.store(state_at(sums.pooled, at, columns, sizes), dot(weights, v, cut.PRECISION))


@triton.jit
def _begun(handed, given, at, mask, column, stretch):
    """What a stretch begins with: what the one before passed on; the first with the given state, or with zeros."""
    # Compared in vectors: an interpreter's bool of numbers would make no mask of `mask`.
    follows = column < tl.where(stretch > 0, column + 1, 0)
    x = tl.load(handed + at, mask=mask & follows, other=0.0)
    if given is not None:
        x += tl.load(given + at, mask=mask & (column >= tl.where(stretch > 0, column + 1, 0)), other=0.0)
    return x


@kernel
def causal_scan_kernel(
    sums, states,  # Sums; States, the means in place of the pooled values
    decay, initial, passed,  # [BH, chunks of a head] Γ of each or None, [BH, M, 2E + 3] or None, [heads, stretches, ..]
    first_head, first_chunk, all_chunks, chunks, stretch, stretches,
    M: tl.constexpr, MP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of each chunk become what comes before it.

    A stretch begins with the state that the one before passed on, the first with the initial one; it passes on its own.
    """
    blocks: tl.constexpr = MP * EP // BLOCK
    WIDTH: tl.constexpr = 2 * E + 3
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column, e = index // EP, index % EP
    first = e == 0  # one number of each column also writes log C
    real, inside = column < M, (column < M) & (e < E)
    out = passed + ((bh * stretches + stretch) * M + column) * WIDTH
    handed, given = out - M * WIDTH, None
    if initial is not None:
        given = initial + ((bh + first_head) * M + column) * WIDTH
    k = _begun(handed, given, 2 * E + 2, real, column, stretch)
    c, c_lost = _begun(handed, given, E, real, column, stretch), _begun(handed, given, 2 * E + 1, real, column, stretch)
    n = _begun(handed, given, e, inside, column, stretch)
    n_lost = _begun(handed, given, E + 1 + e, inside, column, stretch)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        at = (bh * chunks + chunk) * MP
        here, mass = tl.load(sums.peaks + at + column), tl.load(sums.totals + at + column)
        pooled = tl.load(sums.pooled + at * EP + index)
        tl.store(states.z + at * EP + index, mean(n, n_lost, c, c_lost))
        tl.store(states.log_c + at + column, log_of(k, c, c_lost), mask=first)
        if decay is not None:
            turns, fade = fading(tl.load(decay + (bh + first_head) * all_chunks + first_chunk + chunk))
            c, c_lost = faded(c, c_lost, fade)
            n, n_lost = faded(n, n_lost, fade)
            k += turns
        units, before = common_units(k, c, here), c + c_lost
        c, c_lost = taken_in(c, c_lost, mass, units.scale, units.weight)
        n, n_lost = taken_in(n, n_lost, pooled, units.scale, units.weight)
        k, total = units.k, c + c_lost
        kept = units.scale * before / tl.where(total > 0, total, 1.0)
        tl.store(states.kept + at + column, kept, mask=first)
        tl.store(states.log_end + at + column, log_of(k, c, c_lost), mask=first)
        shift = floor_log2(c)
        unit = power_of_two(-shift)
        c, c_lost, n, n_lost, k = c * unit, c_lost * unit, n * unit, n_lost * unit, tl.where(c > 0, k + shift, 0.0)
    tl.store(out + e, n, mask=inside)
    tl.store(out + E + 1 + e, n_lost, mask=inside)
    tl.store(out + E, c, mask=first & real)
    tl.store(out + 2 * E + 1, c_lost, mask=first & real)
    tl.store(out + 2 * E + 2, k, mask=first & real)


@triton.jit
def _scan_back(
    states, later, passed, products, means, slot, programs, more, bh, chunks, index, column, size,
    MP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of each chunk become the sums of all later ones, in units of C where it ends; own ones where it begins.

    With products, what of their part of ⟨carry, z⟩ (means), or of the carry's sum, goes through each chunk.
    """
    passed += bh * size + index
    carry = tl.load(passed, mask=index < tl.where(more > 0, size, 0), other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        at = bh * chunks + chunks - 1 - step
        own = tl.load(later + at * size + index)
        tl.store(later + at * size + index, carry)
        through = carry * tl.load(states.kept + at * MP + column)
        carry = own + through
        if products is not None:
            if means is not None:
                through *= tl.load(means + at * size + index)
            tl.store(products + at * programs + slot, tl.sum(through, 0))
    tl.store(passed, carry)


@kernel
def causal_scan_backward_kernel(
    states,  # States
    later_o, later_c,  # [heads, chunks, MP, EP] and [heads, chunks, MP]
    passed_o, passed_c,  # the same without chunks
    products,  # [heads, chunks, programs of a head] or None: parts of what goes through each chunk, see `gate_gradient`
    chunks, more,
    MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of Σ W do, or in the head's last program Σ d log C, from the last chunk to the first.

    Where `more` follows, a stretch begins with what that passed on; it passes on the same, in its place.
    """
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // (blocks + 1)).to(tl.int64)
    block = tl.program_id(0) % (blocks + 1)
    if block < blocks:
        index = block * BLOCK + tl.arange(0, BLOCK)
        _scan_back(
            states, later_o, passed_o, products, states.z, block, blocks + 1, more, bh, chunks, index, index // EP,
            MP * EP, MP, STAGES,
        )  # fmt: skip
    else:
        j = tl.arange(0, MP)
        _scan_back(states, later_c, passed_c, products, None, block, blocks + 1, more, bh, chunks, j, j, MP, MP, STAGES)


NOTHING: Mapping[str, int] = {}


class Gates(NamedTuple):
    """What a call's scan goes on from, and how it fades."""

    sums: Tensor | None  # [BH, chunks · BC, 2] as in Scalars
    decay: Tensor | None  # [BH, chunks] Γ of each chunk
    initial: Tensor | None  # [BH, M, 2E + 3]
    chunks: int  # of a head
    follows: int = 0  # 1 where the final state has a gradient


class Arguments(NamedTuple):
    """What the kernels on the chunks of one call are launched with; tensors with their strides."""

    tokens: tuple[Any, ...]  # queries, keys, values, log a, positions of queries and of keys
    keys: tuple[Any, ...]  # keys, values, log a, positions of keys
    output: tuple[Any, ...]
    references: References
    scalars: Scalars
    gates: Gates
    heads: int  # H
    length: int  # L
    threshold: int
    sizes: Sizes
    across: bool
    constants: dict[str, Any]
    of_keys: dict[str, Any]  # those of the backward pass's kernel on keys
    tile: Tile

    def counts(self, part: Part) -> tuple[int, ...]:
        """H, L, and which chunks of which heads."""
        return self.heads, self.length, part.chunks, part.first_head, part.first_chunk


def new_passed(part: Part, arguments: Arguments) -> Tensor:
    """The state after each stretch of the same heads [heads, stretches, M, 2E + 3]."""
    sizes = arguments.sizes
    return arguments.references.log_b.new_empty((part.heads, part.stretches, sizes.M, 2 * sizes.E + 3))


def scan(part: Part, arguments: Arguments, passed: Tensor, z: Tensor) -> States:
    """What comes before each chunk, the means in `z`, after the stretches before were scanned."""
    peaks, totals, log_c, log_end, kept = z.new_empty((5, *z.shape[:3])).unbind()
    sums, states, sizes = Sums(peaks, totals, z), States(log_c, log_end, kept, z), arguments.sizes
    args = (*arguments.keys, arguments.references, arguments.scalars, sums, *arguments.counts(part))
    launch(causal_sums_kernel, part.heads * part.chunks, args, arguments.constants, arguments.tile)
    gates = arguments.gates
    counts = (part.first_head, part.first_chunk, gates.chunks, part.chunks, part.stretch, part.stretches)
    args = (sums, states, gates.decay, gates.initial, passed, *counts)
    _launch_scan(causal_scan_kernel, args, z, sizes, extra={"M": sizes.M, "E": sizes.E})
    return states


def scan_back(
    part: Part,
    states: States,
    later: tuple[Tensor, Tensor],
    passed: tuple[Tensor, Tensor],
    products: Tensor | None,
    arguments: Arguments,
) -> None:
    """In place: what each chunk's queries leave becomes what all later ones leave; the stretches after it went first.

    `later` [heads, chunks, MP, EP] and [heads, chunks, MP]; `passed`, from stretch to stretch, without chunks, holds
    something before the first where the final state has a gradient; `products` [heads, chunks, programs].
    """
    more = part.stretches - 1 - part.stretch + arguments.gates.follows
    args = (states, *later, *passed, products, part.chunks, more)
    _launch_scan(causal_scan_backward_kernel, args, later[0], arguments.sizes, further=1)


def scan_programs(sizes: Sizes) -> int:
    """How many programs of a head scan back."""
    return sizes.MP * sizes.EP // min(SCAN.depth, sizes.MP * sizes.EP) + 1


def _launch_scan(
    kernel: Any, args: tuple[Any, ...], z: Tensor, sizes: Sizes, further: int = 0, extra: Mapping[str, int] = NOTHING
) -> None:
    """A program for each BLOCK of a head's [MP, EP] numbers, and `further` ones; z [heads, chunks, MP, EP]."""
    (heads, chunks), numbers = z.shape[:2], sizes.MP * sizes.EP
    block = min(SCAN.depth, numbers)
    constants = {"BLOCK": block, "STAGES": SCAN.stages, "MP": sizes.MP, "EP": sizes.EP, **extra}
    programs = heads * (numbers // block + further) if chunks else 0
    launch(kernel, programs, args, constants, SCAN)


def parts(x: Operands, rows: int, numbers: int) -> Iterator[list[Part]]:
    """Groups of heads as their stretches, whose workspaces, `numbers` float32 a chunk, stay within WORKSPACE_SHARE.

    With fewer than FEW_TOKENS they may always take FEW_BYTES.
    """
    b, h, s, d = x.key.shape
    tokens = b * h * s * 2 * (d + x.value.shape[-1]) * x.key.element_size()
    allowed = max(int(WORKSPACE_SHARE * tokens), FEW_BYTES if b * h * s < FEW_TOKENS else 0)
    at_once = max(1, allowed // (4 * numbers))
    chunks = math.ceil(s / rows)
    stretch = max(1, math.ceil(chunks / max(1, math.ceil(chunks / at_once))))
    firsts = range(0, max(1, chunks), stretch)
    heads = max(1, at_once // max(1, chunks))
    for head in range(0, b * h, heads):
        some = min(heads, b * h - head)
        yield [Part(head, some, c, min(stretch, chunks - c), n, len(firsts)) for n, c in enumerate(firsts)]
