"""The sums of each chunk's keys, and how a call is worked on in parts; `scan` makes what comes before each chunk.

Log gates sum to Γ from the first key of a chunk on: a chunk's sums are those at its end, Σ e^{ω_s + Γ − Γ_s}, and what
the scan passes through a chunk fades by its whole Γ.

Sums and means of every chunk take memory; so a call is worked on in parts, one after another (`parts`): some heads, and
a stretch of their length.  Kernels get the tensors of the whole call, and count heads and chunks from the part's first:
so no address, whose alignment Triton compiles for, depends on the part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from .chunk import chunk_log_weights, chunk_of, gate_sums, place
from .segments import Ends, Pack

WORKSPACE_SHARE = 0.23  # of the bytes of q, k, v and o: what a part may take, so that all workspaces stay within 1/4
# With as many tokens of all heads, the share of 64 dims in 16 bits fills a device with chunks, if not well: forward and
# backward at H16 L16384 take 4260 µs in it, 3000 in 0.5 of the tokens' bytes, 2680 in 1.0 (H200).  With fewer, launches
# take longer than what they launch: a part may take as many bytes as the backward pass at B1 H8 L4096, M = D = E = 64.
FEW_TOKENS, FEW_BYTES = 32 * 4096, 96 << 20
# Tokens whose sums `scan` adds up apart, counted from the first of a call: pieces of a sequence that are multiples of
# it have the bits of one call, and so has a call of any number of heads, on any number of multiprocessors.
BUNDLE = 192


class Scalars(NamedTuple):
    """Numbers that no kernel is compiled for: those of `Dropout`, and of the masses."""

    seed: Tensor | None  # [] int64, None without dropout
    keep_scale: float  # 1/(1 − p)
    uniform: float  # log2 of a key's mass where none is given
    gates: (
        Tensor | None
    )  # [BH, chunks · BC, 2] Γ in base 2 after each key, from the first of its chunk on, as two numbers
    firsts: Tensor | None = None  # of a packed batch [chunks] int64: the first row of the segment that has the chunk
    lengths: Tensor | None = None  # [chunks] int32: how many rows that has; 0 where there is no such chunk
    numbers: Tensor | None = None  # [chunks] int32: which of the segment's chunks it is


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
    rest: Tensor | None  # [heads, chunks, MP] what its rounding has left of C; None but for tokens of float32
    log_end: Tensor | None  # [heads, chunks, MP] log2 C after each chunk
    rest_end: Tensor | None  # [heads, chunks, MP] likewise
    kept: Tensor | None  # [heads, chunks, MP] which part of the latter the former is, after it faded
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
    at, number, slot = place(chunks, first_head, first_chunk)
    b, h, length, chunk = chunk_of(scalars, number, slot, H, L)
    if scalars.lengths is not None:
        if length == 0:
            return
    keys = rows_of(key, b, h, stride_kb, stride_kh, stride_kn, length, cut.STEP)
    values = rows_of(value, b, h, stride_vb, stride_vh, stride_vn, length, cut.STEP)
    masses = rows_of(log_a, b, h, stride_ab, stride_ah, stride_an, length, 1) if log_a is not None else None
    places = places_of(position, references, b, h, stride_pb, stride_ph, stride_pn, sizes) if sizes.P > 0 else None
    head = head_of(references, h, sizes, cut)
    j = tl.arange(0, sizes.MP)
    rows = chunk * cut.ROWS + tl.arange(0, cut.ROWS)
    log_b = tl.load(head.log_b + j)
    live, omega = chunk_log_weights(keys, masses, places, head, log_b, rows, scalars.uniform, rule, sizes, cut)
    if scalars.gates is not None:
        gamma, fine, whole, to_end = gate_sums(scalars.gates, number, slot, L, cut.ROWS)
        omega += to_end[:, None]
    peak = tl.ceil(tl.max(omega, 0))
    e = tl.exp2(omega - finite_or_zero(peak)[None, :])
    tl.store(sums.peaks + at * sizes.MP + j, peak)
    tl.store(sums.totals + at * sizes.MP + j, tl.sum(e, 0))
    weights = tl.trans(rounded(e, value.dtype.element_ty))
    for first in tl.static_range(0, sizes.EP, cut.VDEPTH):
        columns = first + tl.arange(0, cut.VDEPTH)
        v = load_rows(values, rows, live, columns, sizes.E)
        # As `state_at` has it, but for one number of 64 bits: one for each reference spills on sm_100.
        pooled = sums.pooled + at * (sizes.MP * sizes.EP) + (j[:, None] * sizes.EP + columns[None, :])
        tl.store(pooled, dot(weights, v, cut.PRECISION))


class Gates(NamedTuple):
    """What a call's scan goes on from, and how it fades."""

    sums: Tensor | None  # [BH, chunks · BC, 2] as in Scalars
    decay: Tensor | None  # [BH, chunks, 2] Γ of each chunk, and from the first of its bundle on
    initial: Tensor | None  # [BH, M, 2E + 3]
    chunks: int  # of a head
    follows: int = 0  # 1 where the final state has a gradient


class Backward(NamedTuple):
    """What the backward pass's own kernels are compiled for, and their tiles, of as many rows as the others'."""

    queries: tuple[dict[str, Any], Tile]
    keys: tuple[dict[str, Any], Tile]
    gates: tuple[dict[str, Any], Tile]


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
    tile: Tile
    bundle: int  # chunks of one
    multiprocessors: int
    pack: Pack | None = None
    ends: Ends | None = None  # of the pack's segments
    backward: Backward | None = None

    @property
    def exact(self) -> bool:
        """Whether logarithms have rests."""
        return self.tokens[0].element_size() == 4

    def counts(self, part: Part) -> tuple[int, ...]:
        """H, L (of a packed batch, rows of all chunks), and which chunks of which heads."""
        return self.heads, self.length, part.chunks, part.first_head, part.first_chunk


def sums_of(part: Part, arguments: Arguments, z: Tensor) -> Sums:
    """The sums of each chunk, those of values in `z`."""
    peaks, totals = z.new_empty((2, *z.shape[:3])).unbind()
    sums = Sums(peaks, totals, z)
    args = (*arguments.keys, arguments.references, arguments.scalars, sums, *arguments.counts(part))
    launch(causal_sums_kernel, part.heads * part.chunks, args, arguments.constants, arguments.tile)
    return sums


def new_passed(part: Part, arguments: Arguments, states: int) -> Tensor:
    """The states after the last stretches of the same heads [heads, states, M, 2E + 3]."""
    sizes = arguments.sizes
    return arguments.references.log_b.new_empty((part.heads, states, sizes.M, 2 * sizes.E + 3))


@functools.cache
def chunks_of(rows: int) -> int:
    """How many chunks of so many tokens are a bundle."""
    return max(1, BUNDLE // rows)


def parts(x: Operands, rows: int, length: int, numbers: int, heads: int) -> Iterator[list[Part]]:
    """Groups of heads as stretches of `length`; their workspaces, `numbers` float32 a chunk, take WORKSPACE_SHARE.

    With fewer than FEW_TOKENS they may always take FEW_BYTES.  As many heads as fit whole, but `heads` at least, whose
    scans then are as much shorter as they are more; stretches end where bundles do.
    """
    b, h, s, d = x.key.shape
    tokens = b * h * s * 2 * (d + x.value.shape[-1]) * x.key.element_size()
    allowed = max(int(WORKSPACE_SHARE * tokens), FEW_BYTES if b * h * s < FEW_TOKENS else 0)
    at_once, bundle = max(1, allowed // (4 * numbers)), chunks_of(rows)
    chunks = max(1, math.ceil(length / rows))
    heads = min(b * h, max(1, at_once // chunks, min(heads, at_once // bundle)))
    heads = math.ceil(b * h / math.ceil(b * h / heads)) if b * h else 1
    fit = at_once // heads
    most = fit if fit >= chunks else max(1, fit // bundle) * bundle
    stretch = math.ceil(math.ceil(chunks / math.ceil(chunks / most)) / bundle) * bundle
    firsts, chunks = range(0, chunks, stretch), math.ceil(length / rows)
    for head in range(0, b * h, heads):
        some = min(heads, b * h - head)
        yield [Part(head, some, c, min(stretch, chunks - c), n, len(firsts)) for n, c in enumerate(firsts)]
