"""Device functions shared by the kernels: products, norms, logits, log sums and dropout on tiles.

Inside kernels everything exponential is in base 2 (exp2 is the hardware's instruction): ℓ, f, g, c and masses are
carried times log2(e), and only what leaves a kernel is in natural units.  Names in tiles: BN tokens (queries or keys),
M references padded to a power of two.
"""

import triton
import triton.language as tl

from ..host.tiles import INTERPRETED

# Under the interpreter tl.dot multiplies bfloat16 as raw bits (Triton 3.7), and leaves its sums to numpy's BLAS, whose
# rounding differs among processors and, unlike a GPU's, among equal rows of a product: there its sums are in float64.
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NORM_FLOOR = tl.constexpr(1e-24)  # ‖x‖² at or below which x̂ = 0
SPAN = tl.constexpr(115.0)  # 80 in base 2: logits this close keep every product of two exponentials above underflow
# 44 in base 2: this close, e^{ℓ+g}, a row's mass ≥ 1/S, the row sum and the tokens' own spread leave 35 bits to spare.
NARROW = tl.constexpr(64.0)
INF = tl.constexpr(float("inf"))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_in_parts(a, b):
    """The same of float32 or bfloat16, float32 as the sum of two bfloat16: to 2^−17 of each, in half the registers and
    half the products of tf32x3, and less where one operand is bfloat16."""
    high_a, high_b = rounded(a, tl.bfloat16), rounded(b, tl.bfloat16)
    product = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if a.dtype == tl.float32:
        product += _dot(rounded(a - high_a.to(tl.float32), tl.bfloat16), high_b, "ieee")
    if b.dtype == tl.float32:
        product += _dot(high_a, rounded(b - high_b.to(tl.float32), tl.bfloat16), "ieee")
    return product + _dot(high_a, high_b, "ieee")


@triton.jit
def in_parts(x):
    """float32 x as the sum of two bfloat16, to 2^−17."""
    high = rounded(x, tl.bfloat16)
    return high, rounded(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def dot_of_parts(high_a, rest_a, high_b, rest_b):
    """The product of two such sums, less what is smallest in it."""
    return _dot(rest_a, high_b, "ieee") + _dot(high_a, rest_b, "ieee") + _dot(high_a, high_b, "ieee")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [I, K] · b [K, J] -> float32 [I, J]; float32 operands as IEEE or tf32x3, or bf16x3, where the other operand may
    be bfloat16."""
    if PRECISION != "bf16x3":
        return _dot(a, b, PRECISION)
    elif a.dtype == tl.float32 or b.dtype == tl.float32:
        return _dot_in_parts(a, b)
    else:
        return _dot(a, b, "ieee")


@triton.jit
def tokens_by(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BN, K] · b [K, J] with a tokens' row per row of a; ACROSS: as (bᵀ aᵀ)ᵀ, so that warps share the columns."""
    return tl.trans(dot(tl.trans(b), tl.trans(a), PRECISION)) if ACROSS else dot(a, b, PRECISION)


@triton.jit
def again(x):
    """x as something the compiler knows nothing of: what is computed from it is computed anew, instead of being held
    in registers since the first time."""
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    if _INTERPRETED:
        return x
    elif tl.target_info.is_hip():
        return tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x [float32] to the nearest number of a token dtype."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype != dtype:  # the interpreter (Triton 3.6 to 3.9) truncates
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x rounded, to be an operand of products alone: where it is, or Triton takes it to each product's layout first, in
    float32, which is twice the registers and four times the reads of shared memory."""
    return x if x.dtype == dtype else again(rounded(x, dtype))


@triton.jit
def leading(x, dtype: tl.constexpr):
    """A number of a token dtype near x, in float32: x less it is small.  Cut off where that takes one instruction, as
    rounding alone is one of those that exponentials wait for."""
    if dtype == tl.float32:
        return x
    elif dtype == tl.bfloat16:
        return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def expm1(x):
    """e^x − 1 to float32's last places also where x is small: there the series, elsewhere exp2."""
    tail = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320)))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * tail))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def column_sum(x):
    """Σ over tokens of x [BN, M].  A GPU adds in a tree; numpy, and so the interpreter, one row after the other."""
    if _INTERPRETED:
        return tl.sum(tl.sum(tl.reshape(x, [8, x.shape[0] // 8, x.shape[1]]), 1), 0)
    else:
        return tl.sum(x, 0)


@triton.jit
def inverse_norm(square):
    """1/‖x‖ from ‖x‖² [BN], and 0 where ‖x‖ ≤ 1e-12."""
    positive = square > NORM_FLOOR
    safe = tl.where(positive, square, 1.0)
    guess = tl.rsqrt(safe)
    # One Newton step brings the hardware's approximation to rounding, in fewer instructions than a root and a division.
    return tl.where(positive, guess * (1.5 - (0.5 * safe) * guess * guess), 0.0)


@triton.jit
def exact_scale(x, inverse):
    """(x·2^e, inverse·2^−e) with 2^e ≤ inverse < 2^(e+1): x̂ as a product whose first factor is exact in x's dtype."""
    power = tl.exp2(tl.floor(tl.log2(tl.where(inverse > 0, inverse, 1.0))))  # [BN]
    return (x.to(tl.float32) * power[:, None]).to(x.dtype), inverse / power


@triton.jit
def finite_or_zero(x):
    """x with −∞ replaced by 0: the safe amount to subtract before exp2."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def log_sum(peak, total):
    """log2 of total·2^peak, −∞ where the total is 0."""
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), -INF)


@triton.jit
def log_and_rest(peak, total):
    """(log2 of total·2^peak, −∞ where the total is 0; what its rounding has left of that, 1 where the total is 0)."""
    held = total > 0
    log = peak + tl.log2(tl.where(held, total, 1.0))
    return tl.where(held, log, -INF), tl.where(held, total * tl.exp2(peak - log), 1.0)


@triton.jit
def potential(log_mass, relaxation, log_total):
    """log mass − λ·log total; −∞ where nothing can be sent."""
    reached = log_total > -INF
    return tl.where(reached, log_mass - relaxation * tl.where(reached, log_total, 0.0), -INF)


@triton.jit
def distance(x, y):
    """|x − y|, 0 where both are −∞."""
    same = x == y
    return tl.abs(tl.where(same, 0.0, x) - tl.where(same, 0.0, y))


@triton.jit
def merged_log_sum(peaks, totals, splits, M: tl.constexpr):
    """log2 Σ over splits of totals·2^peaks, both [splits, M]: [M], in a fixed order."""
    j, i = tl.arange(0, M), tl.arange(0, 16)
    peak = tl.full([M], -INF, tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, splits, 16):
        index = (start + i)[:, None] * M + j[None, :]
        some = (start + i < splits)[:, None]
        part = tl.load(peaks + index, mask=some, other=-INF)
        new = tl.maximum(peak, tl.max(part, 0))
        safe = finite_or_zero(new)
        parts = tl.load(totals + index, mask=some, other=0.0) * tl.exp2(part - safe[None, :])
        total = total * tl.exp2(peak - safe) + tl.sum(parts, 0)
        peak = new
    return log_sum(peak, total)
