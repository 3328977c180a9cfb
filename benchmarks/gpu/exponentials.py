"""A kernel that does little but exponentials."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_kernel(out, turns, BLOCK: tl.constexpr, CHAINS: tl.constexpr):
    """x ← 2^−x, CHAINS times a turn: every value stays in (0, 1]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(out + at)
    for _ in range(turns):
        for _ in tl.static_range(CHAINS):
            x = tl.exp2(-x)
    tl.store(out + at, x)
