"""What every backward pass shares: from dℓ to the gradients of tokens and to a program's sums for the parameters.

With ĉ_ij = ⟨x̂_i, ŷ_j⟩, dĉ = β κ dℓ/ε (rbf) or dκ = dℓ/ε (dot):

    dx_i = (Σ_j dĉ_ij ŷ_j − x̂_i Σ_j dĉ_ij ĉ_ij)/‖x_i‖,   dŷ_j = Σ_i dĉ_ij x̂_i,   dy_j = (dŷ_j − ŷ_j⟨ŷ_j, dŷ_j⟩)/‖y_j‖
    dβ = Σ dℓ κ (ĉ − 1)/ε,   dε = −Σ dℓ (κ − 1)/ε²,   dτ = −2τ Σ dℓ ‖p − π‖²,   dπ_j = 2τ² Σ_i dℓ_ij (p_i − π_j)

A program leaves its part of every sum in a slot of its own (`parameters.gradients.Partials`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Operands, Options
from ..host.launch import Split, device_of, split_tokens
from ..host.tiles import Tile, tile
from .places import position_sums
from .plan import range_known
from .primitives import dot, exact_scale, rounded, tokens_by
from .rows import store_rows

SUMS = 8  # numbers that a slot holds for the hyperparameters, see `sum_of`


def gradient_tile(x: Operands, opt: Options, kind: str) -> Tile:
    """The tile of a pass over queries or keys."""
    m, d, e = x.references.shape[1], x.key.shape[-1], x.value.shape[-1]
    if range_known(x, opt) != "always":
        kind += "_log" if x.reference_position is None else "_placed"
    return tile(kind, device_of(x.key).family, max(m, d, e), x.key.element_size(), m)


def gradient_split(tokens: Tensor, t: Tile, packed: bool = False) -> Split:
    """How the tokens of a head are shared among programs of a pass; those of a segment are not."""
    b, h, n, _ = tokens.shape
    return Split(max(n, 1), 1) if packed else split_tokens(n, t, b * h, device_of(tokens).multiprocessors)


@triton.jit
def token_gradient(
    dl, kappa, cosine, inverse, x, y, factor,
    WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
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
def kernel_sums(dl, kappa, cosine, beta, BALANCED: tl.constexpr, DOT: tl.constexpr):
    """(Σ_j dℓ κ (ĉ − 1), Σ_j dℓ (κ − 1)) [BN]: the rows' parts of dβ·ε and −dε·ε²; beta is β·log2 e.

    BALANCED: all dℓ of the queries, and all of the keys, sum to 0.  Moving κ by its value `middle` between orthogonal
    vectors then changes nothing but the weight of their rounding errors.
    """
    middle = 0.0 if DOT else tl.exp2(-beta)
    d_epsilon = tl.sum(dl * (kappa - (middle if BALANCED else 1.0)), 1)
    d_beta = d_epsilon * 0.0 if DOT else tl.sum(dl * (kappa * (cosine - 1.0) + (middle if BALANCED else 0.0)), 1)
    return d_beta, d_epsilon


@triton.jit
def sum_of(name: tl.constexpr):
    """Which of a slot's SUMS numbers it is, in the order of HYPER.

    Σ dℓ κ (ĉ − 1),  Σ dℓ (κ − 1),  Σ df LSE_j(ℓ + g),  Σ dg c,  Σ dℓ ‖p − π‖²
    """
    if name == "beta":
        return 0
    elif name == "epsilon":
        return 1
    elif name == "key_relaxation":
        return 2
    elif name == "reference_relaxation":
        return 3
    else:
        tl.static_assert(name == "tau")
        return 4


@triton.jit
def sum_at(sums, slot, name: tl.constexpr):
    """Where one of a slot's sums for the hyperparameters lies."""
    return sums + slot * 8 + sum_of(name)


@triton.jit
def store_sums(sums, slot, d_beta, d_epsilon, d_key_relaxation, d_reference_relaxation, d_tau):
    """One program's sums for the hyperparameters."""
    tl.store(sum_at(sums, slot, "beta"), d_beta)
    tl.store(sum_at(sums, slot, "epsilon"), d_epsilon)
    tl.store(sum_at(sums, slot, "key_relaxation"), d_key_relaxation)
    tl.store(sum_at(sums, slot, "reference_relaxation"), d_reference_relaxation)
    tl.store(sum_at(sums, slot, "tau"), d_tau)


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


class TileSums(NamedTuple):
    """A program's sums over its tokens."""

    y: Any  # [MP, DEPTH] of dŷ
    position: Any  # [MP, PP] Σ_i dℓ_ij (p_i − π_j)
    beta: Any  # [BN] and the following: by the row of the tile
    epsilon: Any
    tau: Any


@triton.jit
def no_sums(sizes, cut):
    """The sums before the first tile."""
    rows = tl.zeros([cut.ROWS], tl.float32)
    y = tl.zeros([sizes.MP, cut.DEPTH], tl.float32)
    return TileSums(y, tl.zeros([sizes.MP, sizes.PP], tl.float32), rows, rows, rows)


@triton.jit
def leave_tile(
    sums, dl, total, kappa, cosine, inverse, x, y, factor, beta, out, rows, inside, live, columns, writes, places,
    parts, BALANCED: tl.constexpr, DOT: tl.constexpr, sizes, cut,
):  # fmt: skip
    """From a tile's dℓ, whose rows sum to `total`: writes dx (`out`: its rows, or None), and adds terms to the sums."""
    operand, x_hat, d_x = token_gradient(
        dl, kappa, cosine, inverse, x, y, factor, sizes.DP == cut.DEPTH, DOT, cut.PRECISION, cut.ACROSS
    )
    if out is not None:
        if writes:
            store_rows(out, rows, inside, columns, sizes.D, d_x)
    d_y, d_pi, d_beta, d_epsilon, d_tau = sums
    if parts.y is not None:
        d_y += dot(tl.trans(operand), x_hat, cut.PRECISION)
    if parts.sums is not None:
        beta_rows, epsilon_rows = kernel_sums(dl, kappa, cosine, beta, BALANCED, DOT)
        d_beta += beta_rows
        d_epsilon += epsilon_rows
    if sizes.P > 0:
        if parts.sums is not None or parts.position is not None:
            tau_rows, pi_sums = position_sums(dl, total, places, rows, live, sizes)
            d_tau += tau_rows
            d_pi += pi_sums
    return TileSums(d_y, d_pi, d_beta, d_epsilon, d_tau)


@triton.jit
def store_tile_sums(parts, slot, sums, columns, d_lam_a, d_lam_b, writes, first, sizes):
    """A program's sums into its slot: its columns of dŷ where it `writes` them, the rest where it is the `first`."""
    j = tl.arange(0, sizes.MP)
    if parts.y is not None:
        if writes:
            tl.store(parts.y + (slot * sizes.MP + j)[:, None] * sizes.DP + columns[None, :], sums.y)
    if first:
        if parts.position is not None:
            at = parts.position + (slot * sizes.MP + j)[:, None] * sizes.PP + tl.arange(0, sizes.PP)[None, :]
            tl.store(at, sums.position)
        if parts.sums is not None:
            d_beta, d_epsilon, d_tau = tl.sum(sums.beta), tl.sum(sums.epsilon), tl.sum(sums.tau)
            store_sums(parts.sums, slot, d_beta, d_epsilon, d_lam_a, d_lam_b, d_tau)
