"""The softmax over references with which queries read: dropout of its weights, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_constants(p: float) -> tuple[int, float]:
    """(⌊p·2³²⌋, 1/(1 − p)): p = 1 keeps nothing, by a factor 0."""
    return (min(int(p * 2**32), 2**32 - 1), 1 / (1 - p)) if p < 1 else (0, 0.0)


@triton.jit
def keep_mask(seed, head, length, rows, M_TRUE: tl.constexpr, M: tl.constexpr, threshold):
    """Which entries of W^q survive dropout: [BN, M], word 0 of Philox4x32-10 at n = (head·L + i)·M + j."""
    n = (head * length + rows.to(tl.int64))[:, None] * M_TRUE + tl.arange(0, M)[None, :]
    low = (n & 0xFFFFFFFF).to(tl.uint32)
    high = (n >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(tl.load(seed), low, high, zero, zero)
    return word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def read_gradient(w, d_o_z, seed, bh, L, rows, threshold, keep_scale, M: tl.constexpr, DROPOUT: tl.constexpr):
    """(W^q after dropout, dS) [BL, MP] from the softmax's numerators w and ⟨do_i, z_j⟩."""
    normaliser = 1.0 / tl.sum(w, 1)
    if DROPOUT:
        keep = keep_mask(seed, bh, L, rows, M, w.shape[1], threshold)
        kept = tl.where(keep, w * (normaliser * keep_scale)[:, None], 0.0)
        d_p = tl.where(keep, d_o_z * keep_scale, 0.0)
    else:
        kept = w * normaliser[:, None]
        d_p = d_o_z
    # The same factor normalises W and the mean, so that a row of dS sums to 0 to rounding of its own terms.
    mean = tl.sum(w * d_p, 1) * normaliser
    d_s = w * normaliser[:, None] * (d_p - mean[:, None])
    return kept, d_s * 0.0 if M == 1 else d_s
