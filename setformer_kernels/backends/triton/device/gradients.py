"""What every backward pass shares: from dℓ to the gradients of tokens and to a program's sums for the parameters.

With ĉ_ij = ⟨x̂_i, ŷ_j⟩, dĉ = β κ dℓ/ε (rbf) or dκ = dℓ/ε (dot):

    dx_i = (Σ_j dĉ_ij ŷ_j − x̂_i Σ_j dĉ_ij ĉ_ij)/‖x_i‖,   dŷ_j = Σ_i dĉ_ij x̂_i,   dy_j = (dŷ_j − ŷ_j⟨ŷ_j, dŷ_j⟩)/‖y_j‖
    dβ = Σ dℓ κ (ĉ − 1)/ε,   dε = −Σ dℓ (κ − 1)/ε²,   dτ = −2τ Σ dℓ ‖p − π‖²,   dπ_j = 2τ² Σ_i dℓ_ij (p_i − π_j)

A program leaves its part of every sum in a slot of its own (`parameters.gradients.Partials`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..host.launch import Device, device_of
from ..host.tiles import Tile, padded, tile
from .plan import range_known
from .primitives import dot, exact_scale, rounded

# What a slot holds for the hyperparameters, in the order of HYPER:
# Σ dℓ κ (ĉ − 1),  Σ dℓ (κ − 1),  Σ df LSE_j(ℓ + g),  Σ dg c,  Σ dℓ ‖p − π‖²
BETA_SUM, EPSILON_SUM, KEY_RELAXATION_SUM, REFERENCE_RELAXATION_SUM, TAU_SUM = map(tl.constexpr, range(5))
SUMS = tl.constexpr(8)  # numbers in a slot


def across(device: Device, tokens: Tensor) -> bool:
    """Whether warps share the references (see `tokens_by`): with few tokens a tile, sharing these would repeat work.

    Not for float32 on Hopper and Blackwell, whose wide products would hold three parts of the references in registers.
    """
    return tokens.element_size() == 2 or device.family not in ("sm_90", "sm_100")


def gradient_tile(x: Operands, opt: Options) -> Tile:
    """The tile of the passes over queries and keys."""
    m, d, e = x.references.shape[1], x.key.shape[-1], x.value.shape[-1]
    kind = "gradient" if range_known(x, opt) == "always" else "gradient_log"
    return tile(kind, device_of(x.key).family, padded(max(m, d, e)), x.key.element_size())


@triton.jit
def tokens_by(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BN, K] · b [K, J] with a tokens' row per row of a; ACROSS: as (bᵀ aᵀ)ᵀ, so that warps share the columns."""
    return tl.trans(dot(tl.trans(b), tl.trans(a), PRECISION)) if ACROSS else dot(a, b, PRECISION)


@triton.jit
def token_gradient(
    dl, kappa, cosine, inverse, x, y, factor,
    WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr = False,
):  # fmt: skip
    """(dĉ [BN, MP], x̂ [BN, depth] as operands of dŷ = dĉᵀ x̂, dx [BN, depth]) for columns x, y of the head dim.

    `factor` is β/ε (dot: 1/ε).  x̂ is never rounded: 1/‖x‖ moves into dĉ, in float16 but for a power of two that x can
    take.  dĉ is rounded once, and ĉ came from the rounded ŷ: so dx is orthogonal to x̂ to float32, whether x holds the
    WHOLE head dim and ⟨x̂, dx̂⟩ can be taken from it, or a part of it.
    """
    rest, scaled = inverse, x
    if x.dtype == tl.float16:
        scaled, rest = exact_scale(x, inverse)
    d = dl * (factor * rest)[:, None]
    if not DOT:
        d *= kappa
    operand = rounded(d, x.dtype)
    dx = tokens_by(operand, y, PRECISION, ACROSS)
    if not DOT:
        wide = x.to(tl.float32)
        along = tl.sum(wide * dx, 1) * inverse if WHOLE else tl.sum(operand.to(tl.float32) * cosine, 1)
        dx -= wide * (along * inverse)[:, None]
        if x.dtype == tl.float16:
            dx *= tl.where(rest > 0, inverse / tl.where(rest > 0, rest, 1.0), 0.0)[:, None]
    return operand, scaled, dx


@triton.jit
def kernel_sums(dl, kappa, cosine, DOT: tl.constexpr):
    """(Σ_j dℓ κ (ĉ − 1), Σ_j dℓ (κ − 1)) [BN]: the rows' parts of dβ·ε and −dε·ε²."""
    d_epsilon = tl.sum(dl * (kappa - 1.0), 1)
    d_beta = d_epsilon * 0.0 if DOT else tl.sum(dl * (kappa * (cosine - 1.0)), 1)
    return d_beta, d_epsilon


@triton.jit
def position_sums(dl, p, rows, live, stride, pi, M_TRUE: tl.constexpr, P: tl.constexpr, PP: tl.constexpr):
    """(Σ_j dℓ ‖p_i − π_j‖² [BN], Σ_i dℓ_ij (p_i − π_j) [MP, PP]); a token whose position is NaN adds nothing."""
    M: tl.constexpr = dl.shape[1]
    j, axes = tl.arange(0, M), tl.arange(0, PP)
    whole = tl.zeros([dl.shape[0]], tl.float32)
    for axis in tl.static_range(P):
        whole += tl.load(p + rows.to(tl.int64) * stride + axis, mask=live, other=0.0)
    placed = whole == whole
    squares = tl.zeros([dl.shape[0]], tl.float32)
    sums = tl.zeros([M, PP], tl.float32)
    for axis in tl.static_range(P):
        at = tl.load(p + rows.to(tl.int64) * stride + axis, mask=live & placed, other=0.0)
        difference = at[:, None] - tl.load(pi + j * P + axis, mask=j < M_TRUE, other=0.0)[None, :]
        weighted = tl.where(placed[:, None], dl * difference, 0.0)
        squares += tl.sum(weighted * difference, 1)
        sums += tl.where(axes[None, :] == axis, tl.sum(weighted, 0)[:, None], 0.0)
    return squares, sums


@triton.jit
def store_sum(sums, slot, number: tl.constexpr, value):
    """One of a program's sums for the hyperparameters."""
    tl.store(sums + slot * SUMS + number, value)


@triton.jit
def load_sum(sums, slot, number: tl.constexpr):
    """What `store_sum` left."""
    return tl.load(sums + slot * SUMS + number)


@triton.jit
def store_sums(sums, slot, d_beta, d_epsilon, d_key_relaxation, d_reference_relaxation, d_tau):
    """One program's sums for the hyperparameters."""
    store_sum(sums, slot, BETA_SUM, d_beta)
    store_sum(sums, slot, EPSILON_SUM, d_epsilon)
    store_sum(sums, slot, KEY_RELAXATION_SUM, d_key_relaxation)
    store_sum(sums, slot, REFERENCE_RELAXATION_SUM, d_reference_relaxation)
    store_sum(sums, slot, TAU_SUM, d_tau)


@triton.jit
def sum_slots(parts, first, step, batch, slots, used, size, index, inside):
    """Σ parts [BH, slots, size] at `index` [BLOCK], over `used` slots of `batch` heads first, first + step, .."""
    i = tl.arange(0, 16)
    total = tl.zeros([index.shape[0]], tl.float32)
    for start in range(0, batch * used, 16):
        r = start + i
        slot = (first + (r // used) * step).to(tl.int64) * slots + r % used
        some = (r < batch * used)[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts + slot[:, None] * size + index[None, :], mask=some, other=0.0), 0)
    return total
