"""From tokens and prepared references to logits ℓ [BN, M], and the masses of the keys."""

import triton
import triton.language as tl

from .primitives import INF, LOG2E, dot, inverse_norm


@triton.jit
def load_rows(x, rows, live, stride, columns, D: tl.constexpr):
    """Rows of a token matrix with unit stride along D: [BN, depth]; 0 where a row is not live or a column padding."""
    mask = live[:, None] & (columns < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_references(y, start, M: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr):
    """Columns start.. of the prepared references of one head: [M, DEPTH]; padded in memory, so no mask."""
    return tl.load(y + tl.arange(0, M)[:, None] * DP + start + tl.arange(0, DEPTH)[None, :])


@triton.jit
def load_references_t(y, start, M: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr):
    """The same as [DEPTH, M], the form products take: transposed before a loop, it is laid out for the product once."""
    return tl.trans(load_references(y, start, M, DP, DEPTH))


@triton.jit
def reference_product(x, y_t, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """x · y_t [BN, M]; ACROSS: its tile is cut among warps along the references, not along the tokens."""
    if ACROSS:
        return tl.trans(dot(tl.trans(y_t), tl.trans(x), PRECISION))
    else:
        return dot(x, y_t, PRECISION)


@triton.jit
def products(
    x, rows, live, stride, y, y_t, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr = False,
):  # fmt: skip
    """(⟨x_i, y_j⟩ [BN, M], ‖x_i‖² [BN], x's first DEPTH columns) of tokens; y_t: the references' first columns."""
    M: tl.constexpr = y_t.shape[1]
    columns = tl.arange(0, DEPTH)
    first = load_rows(x, rows, live, stride, columns, D)
    wide = first.to(tl.float32)
    square = tl.sum(wide * wide, 1)
    product = reference_product(first, y_t, PRECISION, ACROSS)
    if DP > DEPTH:
        # Not unrolled: the compiler would keep every part of the references in shared memory through the outer loop.
        for start in range(DEPTH, DP, DEPTH):
            chunk = load_rows(x, rows, live, stride, start + columns, D)
            wide = chunk.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            product += reference_product(chunk, load_references_t(y, start, M, DP, DEPTH), PRECISION, ACROSS)
    return product, square, first


@triton.jit
def kernel_value(product, inverse, beta, DOT: tl.constexpr):
    """κ [BN, M] from products ⟨x, ŷ⟩ and 1/‖x‖ [BN] (rbf: e^{β(ĉ − 1)} in one multiply-add and one exponential)."""
    if DOT:
        return product
    else:
        return tl.exp2(product * (inverse * beta)[:, None] - beta)


@triton.jit
def squared_distance(p, rows, live, stride, pi, M_TRUE: tl.constexpr, M: tl.constexpr, P: tl.constexpr):
    """‖p_i − π_j‖² [BN, M] of positions with unit stride along P; 0 for a token that has none (its position is NaN)."""
    j = tl.arange(0, M)
    distance = tl.zeros([rows.shape[0], M], tl.float32)
    for axis in tl.static_range(P):
        at = tl.load(p + rows.to(tl.int64) * stride + axis, mask=live, other=0.0)
        difference = at[:, None] - tl.load(pi + j * P + axis, mask=j < M_TRUE, other=0.0)[None, :]
        distance += difference * difference
    return tl.where(distance == distance, distance, 0.0)


@triton.jit
def key_mass(log_a, rows, last, stride, uniform):
    """(which rows hold a key that takes part, log2 a) [BN]; −∞ where there is none."""
    live = rows < last
    if log_a is None:
        return live, tl.where(live, uniform, -INF)
    else:
        mass = tl.load(log_a + rows.to(tl.int64) * stride, mask=live, other=-INF) * LOG2E
        return mass > -INF, mass


@triton.jit
def token_logits(
    x, rows, live, stride, position, stride_p, pi, y, y_t, beta, scale, tau,
    M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr = False,
):  # fmt: skip
    """(ℓ, κ, ĉ [BN, MP], 1/‖x‖ [BN], the first columns of x) of tokens; for `dot` ĉ is the product and 1/‖x‖ is 1."""
    product, square, first = products(x, rows, live, stride, y, y_t, D, DP, DEPTH, PRECISION, ACROSS)
    inverse = square * 0.0 + 1.0 if DOT else inverse_norm(square)
    cosine = product if DOT else product * inverse[:, None]
    kappa = kernel_value(product, inverse, beta, DOT)
    l = kappa * scale - scale
    if P > 0:
        l -= tau * squared_distance(position, rows, live, stride_p, pi, M, y_t.shape[1], P)
    return l, kappa, cosine, inverse, first
