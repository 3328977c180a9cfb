"""From tokens and prepared references to logits ℓ [BN, M]."""

import triton
import triton.language as tl

from .head import load_references_t
from .places import squared_distance
from .primitives import inverse_norm, tokens_by
from .rows import load_rows


@triton.jit
def products(x, rows, live, head, sizes, cut):
    """(⟨x_i, y_j⟩ [BN, MP], ‖x_i‖² [BN], x's first DEPTH columns) of tokens."""
    columns = tl.arange(0, cut.DEPTH)
    first = load_rows(x, rows, live, columns, sizes.D)
    wide = first.to(tl.float32)
    square = tl.sum(wide * wide, 1)
    product = tokens_by(first, head.y_t, cut.PRECISION, cut.ACROSS)
    if sizes.DP > cut.DEPTH:
        # Not unrolled: the compiler would keep every part of the references in shared memory through the outer loop.
        for start in range(cut.DEPTH, sizes.DP, cut.DEPTH):
            chunk = load_rows(x, rows, live, start + columns, sizes.D)
            wide = chunk.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            y_t = load_references_t(head.y, start, sizes.MP, sizes.DP, cut.DEPTH)
            product += tokens_by(chunk, y_t, cut.PRECISION, cut.ACROSS)
    return product, square, first


@triton.jit
def kernel_value(product, inverse, beta, DOT: tl.constexpr):
    """κ [BN, M] from products ⟨x, ŷ⟩ and 1/‖x‖ [BN] (rbf: e^{β(ĉ − 1)} in one multiply-add and one exponential)."""
    if DOT:
        return product
    else:
        return tl.exp2(product * (inverse * beta)[:, None] - beta)


@triton.jit
def token_logits(x, rows, live, places, head, DOT: tl.constexpr, sizes, cut):
    """(ℓ, κ, ĉ [BN, MP], 1/‖x‖ [BN], the first columns of x) of tokens; for `dot` ĉ is the product and 1/‖x‖ is 1."""
    product, square, first = products(x, rows, live, head, sizes, cut)
    inverse = square * 0.0 + 1.0 if DOT else inverse_norm(square)
    cosine = product if DOT else product * inverse[:, None]
    kappa = kernel_value(product, inverse, head.beta, DOT)
    l = kappa * head.scale - head.scale
    if sizes.P > 0:
        l -= head.tau * squared_distance(places, rows, live, sizes)
    return l, kappa, cosine, inverse, first
