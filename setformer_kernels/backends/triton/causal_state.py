"""What comes before each chunk: sums of the chunks' keys, scanned along the length.

Sums and means of every chunk take memory; so the heads are worked on in parts, one after another, each with enough
programs to fill the device (`parts`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Operands, Options
from .config import Tile, padded
from .launch import launch
from .prepare import Prepared
from .primitives import INF, finite_or_zero, log_sum
from .transport import Split, column_sums

WORKSPACE_SHARE = 0.2  # of the bytes of q, k, v and o: what the states of one part may take
SCAN = Tile(rows=0, depth=256, warps=2, stages=4)  # 4 numbers a thread: one wide load; many programs hide the steps


class Part(NamedTuple):
    """Some heads of one call."""

    x: Operands
    prepared: Prepared
    batch: slice
    heads: slice
    all_heads: int  # H of the call: dropout counts heads from its first

    @property
    def first_head(self) -> int:
        """b·H + h of the part's first head."""
        return self.batch.start * self.all_heads + self.heads.start


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    peaks, totals, pooled, log_c, chunks, MP: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Sums of each chunk (units 2^peak) become what comes before it: log C in log_c, means in place of `pooled`."""
    blocks: tl.constexpr = MP * EP // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = index // EP
    first = index % EP == 0  # one number of each column also writes log C
    peak = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        at = (bh * chunks + chunk) * MP
        here, mass = tl.load(peaks + at + column), tl.load(totals + at + column)
        sums = tl.load(pooled + at * EP + index)
        tl.store(pooled + at * EP + index, tl.where(total > 0, value / tl.where(total > 0, total, 1.0), 0.0))
        tl.store(log_c + at + column, log_sum(peak, total), mask=first)
        new = tl.maximum(peak, here)
        safe = finite_or_zero(new)
        fade, weight = tl.exp2(peak - safe), tl.exp2(here - safe)
        total = total * fade + mass * weight
        value = value * fade + sums * weight
        peak = new


def states(x: Operands, opt: Options, prepared: Prepared, rows: int) -> tuple[Tensor, Tensor]:
    """(log2 C [BH, chunks, MP], z [BH, chunks, MP, EP]) of all keys before each chunk of `rows`."""
    b, h, s, _ = x.key.shape
    chunks = math.ceil(s / rows)
    c = x.references.new_empty((b, h, 1, x.references.shape[1]))
    _, (peaks, totals, pooled) = column_sums(x, opt, prepared, c, Split(rows, chunks))
    log_c = peaks.new_empty(peaks.shape)
    mp, ep = pooled.shape[-2:]
    block = min(SCAN.depth, mp * ep)
    constants = {"MP": mp, "EP": ep, "BLOCK": block, "STAGES": SCAN.stages}
    launch(scan_kernel, b * h * mp * ep // block, (peaks, totals, pooled, log_c, chunks), constants, SCAN)
    return log_c, pooled


def parts(x: Operands, prepared: Prepared, chunks: int, numbers: int, multiprocessors: int) -> Iterator[Part]:
    """Heads in parts whose states, `numbers` float32 a chunk, stay within WORKSPACE_SHARE, or just fill the device."""
    b, h, s, d = x.key.shape
    tokens = b * h * s * 2 * (d + x.value.shape[-1]) * x.key.element_size()
    at_once = int(WORKSPACE_SHARE * tokens) // max(1, 4 * chunks * numbers)
    at_once = max(1, at_once, math.ceil(multiprocessors / max(1, chunks)))
    batches, heads = max(1, at_once // h), min(h, at_once)
    for b0 in range(0, b, batches):
        for h0 in range(0, h, heads):
            yield _part(x, prepared, slice(b0, min(b, b0 + batches)), slice(h0, min(h, h0 + heads)))


def _part(x: Operands, prepared: Prepared, batch: slice, heads: slice) -> Part:
    """Views of some batch elements and heads."""
    both = ("query", "key", "value", "log_a", "query_position", "key_position")
    cut = {name: t if (t := getattr(x, name)) is None else t[batch, heads] for name in both}
    per_head = {
        name: t if (t := getattr(x, name)) is None else t[heads] for name in ("references", "reference_position")
    }
    fewer = Prepared(*[None if t is None else t[heads] for t in prepared])
    return Part(x._replace(**cut, **per_head), fewer, batch, heads, x.key.shape[1])
