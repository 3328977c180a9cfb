"""The softmax over references with which queries read: dropout of its weights, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_constants(p: float) -> tuple[int, float]:
    """(⌊p·2³²⌋, 1/(1 − p)): p = 1 keeps nothing, by a factor 0."""
    return (min(int(p * 2**32), 2**32 - 1), 1 / (1 - p)) if p < 1 else (0, 0.0)


@triton.jit
def keep_mask(dropout, head, length, rows, threshold, sizes):
    """Which entries of W^q survive dropout, if there is any [BN, MP]: word 0 of Philox4x32-10.

    It is drawn at n = (head·L + i)·M + j.
    """
    if dropout.seed is None:
        return True
    else:
        n = (head * length + rows.to(tl.int64))[:, None] * sizes.M + tl.arange(0, sizes.MP)[None, :]
        low = (n & 0xFFFFFFFF).to(tl.uint32)
        high = (n >> 32).to(tl.uint32)
        zero = low * 0
        word, _, _, _ = tl.philox(tl.load(dropout.seed), low, high, zero, zero)
        return word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def below_top(g, scale):
    """g − 1/ε − max g [MP]: ℓ + g never exceeds the largest g, and ℓ is κ/ε − 1/ε without positions."""
    return g - scale - tl.max(g, 0)


@triton.jit
def numerators(l, kappa, g, shift, scale, RANGE: tl.constexpr):
    """The softmax's numerators [BN, MP] under potentials g [MP]; shift: `below_top`."""
    if RANGE == "always":
        return tl.exp2(kappa * scale + shift[None, :])
    else:
        u = l + g[None, :]
        return tl.exp2(u - tl.max(u, 1)[:, None])


@triton.jit
def kept_weights(w, dropout, head, length, rows, threshold, sizes):
    """(the numerators that survive dropout [BN, MP], what normalises them [BN])."""
    normaliser = 1.0 / tl.sum(w, 1)
    if dropout.seed is not None:
        w = tl.where(keep_mask(dropout, head, length, rows, threshold, sizes), w, 0.0)
        normaliser *= dropout.keep_scale
    return w, normaliser


@triton.jit
def read_gradient(w, d_o_z, keep, dropout, sizes):
    """(W^q after dropout, dS) [BN, MP] from the softmax's numerators w and ⟨do_i, z_j⟩; keep: `keep_mask`."""
    normaliser = 1.0 / tl.sum(w, 1)
    if dropout.seed is not None:
        kept = tl.where(keep, w * (normaliser * dropout.keep_scale)[:, None], 0.0)
        d_p = tl.where(keep, d_o_z * dropout.keep_scale, 0.0)
    else:
        kept = w * normaliser[:, None]
        d_p = d_o_z
    # The same factor normalises W and the mean, so that a row of dS sums to 0 to rounding of its own terms.
    mean = tl.sum(w * d_p, 1) * normaliser
    d_s = w * normaliser[:, None] * (d_p - mean[:, None])
    return kept, d_s * 0.0 if sizes.M == 1 else d_s
