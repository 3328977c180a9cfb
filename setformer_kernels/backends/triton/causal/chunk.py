"""Device functions of the causal kernels on one chunk: BC queries and keys at the same places, everything in base 2.

    ω_sj log weights of the keys, 2^{before_j} the sum of those of all earlier chunks,
    2^{log C_ij} = 2^{before_j} + Σ_{s≤i} 2^{ω_sj},   e_sj = 2^{ω_sj − ref_j} with ref_j the column's largest

A ratio 2^{ω_sj − log C_ij}, s ≤ i, is at most 1.  As a product e_sj · 2^{ref_j − log C_ij} it is one matrix product for
all pairs (i, s), exact while no prefix sum that counts lies more than `SPAN` below ref.  Where one does, and this is
decided on the device, the pairs are formed one key at a time from differences of logarithms.
"""

import triton
import triton.language as tl

from ..device.logits import key_mass, token_logits
from ..device.plan import row_update
from ..device.primitives import INF, SPAN, dot, finite_or_zero, log_sum, rounded


@triton.jit
def at_head(x, b, h, stride_b, stride_h):
    """Where the tokens of one head begin."""
    if x is None:
        return x
    else:
        return x + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h)


@triton.jit
def place(chunks, first_head, first_chunk):
    """(slot in the part's workspaces, b·H + h, chunk of the whole length) of a program on one chunk."""
    slot = tl.program_id(0)
    return slot.to(tl.int64), slot // chunks + first_head, slot % chunks + first_chunk


@triton.jit
def product(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BC, K] · b [K, MP], its references shared among warps where ACROSS."""
    return tl.trans(dot(tl.trans(b), tl.trans(a), PRECISION)) if ACROSS else dot(a, b, PRECISION)


@triton.jit
def fine_product(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BC, K] float32 · b [K, MP]; for b in half precision a is the sum of two such numbers.

    ⟨do_i, v_s⟩ meets every reference: its rounding error would not average out over them.
    """
    high = rounded(a, b.dtype)
    result = product(high, b, PRECISION, ACROSS)
    if b.dtype != tl.float32:
        result += product(rounded(a - high.to(tl.float32), b.dtype), b, PRECISION, ACROSS)
    return result


@triton.jit
def log_weights(l, log_b, mass, relaxation, UPDATE_ROWS: tl.constexpr, M_TRUE: tl.constexpr):
    """ω [BC, MP]; −∞ in padded columns and for absent keys."""
    f = mass
    if UPDATE_ROWS:
        p, m, r, f = row_update(l, log_b, mass, relaxation)
    omega = l + f[:, None]
    if omega.shape[1] != M_TRUE:
        omega = tl.where((tl.arange(0, omega.shape[1]) < M_TRUE)[None, :], omega, -INF)
    return omega


@triton.jit
def column_units(omega, before):
    """(ref [MP], whether every prefix sum that is not empty lies within SPAN of it)."""
    ref = finite_or_zero(tl.maximum(before, tl.max(omega, 0)))
    floor = tl.maximum(before, tl.min(tl.where(omega == -INF, INF, omega), 0))  # ∞ in an empty column
    return ref, tl.min(tl.minimum(floor - ref, 0.0)) >= -SPAN


@triton.jit
def row_of(x, s, empty):
    """Row s of x [BC, N], whose entries are at least `empty`: [N]."""
    return tl.max(tl.where((tl.arange(0, x.shape[0]) == s)[:, None], x, empty), 0)


@triton.jit
def column_of(x, s):
    """Column s of x [N, BC]: [N]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == s)[None, :], x, 0.0), 1)


@triton.jit
def lower(x):
    """x [BC, BC] where the column's key is not later than the row's query, else 0."""
    i = tl.arange(0, x.shape[0])
    return tl.where(i[:, None] >= i[None, :], x, 0.0)


@triton.jit
def prefix_log_sums(omega, ref, before, narrow, count):
    """log C [BC, MP]; −∞ before the first key."""
    log_c = omega
    if narrow:
        total = tl.cumsum(tl.exp2(omega - ref[None, :]), 0) + tl.exp2(before - ref)[None, :]
        log_c = log_sum(ref[None, :], total)
    else:
        log_c = _prefix_key_by_key(omega, before, count)
    return log_c


@triton.jit
def _prefix_key_by_key(omega, before, count):
    """log C [BC, MP] of the first `count` rows without units."""
    i = tl.arange(0, omega.shape[0])
    log_c = omega
    so_far = before
    for s in range(count):
        key = row_of(omega, s, -INF)
        peak = finite_or_zero(tl.maximum(so_far, key))
        so_far = log_sum(peak, tl.exp2(so_far - peak) + tl.exp2(key - peak))
        log_c = tl.where((i == s)[:, None], so_far[None, :], log_c)
    return log_c


@triton.jit
def query_weights(l, log_b, log_c, relaxation, UPDATE_ROWS: tl.constexpr):
    """The numerators of W [BC, MP]."""
    u = l + log_b[None, :]
    if UPDATE_ROWS:
        u -= relaxation * finite_or_zero(log_c)
    return tl.exp2(u - tl.max(u, 1)[:, None])


@triton.jit
def chunk_weights(w, omega, ref, before, log_c, narrow, count, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """(A [BC, BC] lower triangular, weights of the means before the chunk [BC, MP]) from W or a multiple w [BC, MP]."""
    BC: tl.constexpr = omega.shape[0]
    seen = log_c > -INF
    safe = finite_or_zero(log_c)
    carried = w
    a = tl.zeros([BC, BC], tl.float32)
    if narrow:
        scaled = tl.where(seen, w * tl.exp2(ref[None, :] - safe), 0.0)
        carried = scaled * tl.exp2(before - ref)[None, :]
        e = tl.exp2(omega - ref[None, :])
        a = lower(dot(rounded(scaled, FACTOR), tl.trans(rounded(e, FACTOR)), PRECISION))
    else:
        carried = w * tl.exp2(before[None, :] - safe)
        i = tl.arange(0, BC)
        for s in range(count):
            a = tl.where((i == s)[None, :], tl.sum(w * _ratio(omega, safe, s), 1)[:, None], a)
    return a, carried


@triton.jit
def chunk_log_weights(
    key, log_a, position, pi, y, y_t, log_b, rows, last, stride_n, stride_an, stride_pn,
    beta, scale, relaxation, tau, uniform, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """(which keys take part [BC], ω) of a chunk."""
    live, mass = key_mass(log_a, rows, last, stride_an, uniform)
    l, kappa, cosine, inverse, first_columns = token_logits(
        key, rows, live, stride_n, position, stride_pn, pi, y, y_t, beta, scale, tau,
        M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    return live, log_weights(l, log_b, mass, relaxation, UPDATE_ROWS, M)


@triton.jit
def chunk_keys(
    key, log_a, position, pi, y, y_t, log_b, before, rows, count, last, stride_n, stride_an, stride_pn,
    beta, scale, relaxation, tau, uniform, UPDATE_ROWS: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DEPTH: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """(which keys take part [BC], ω, ref, whether products of factors are exact, log C) of a chunk of `count` keys."""
    live, omega = chunk_log_weights(
        key, log_a, position, pi, y, y_t, log_b, rows, last, stride_n, stride_an, stride_pn,
        beta, scale, relaxation, tau, uniform, UPDATE_ROWS, M, D, DP, DEPTH, P, DOT, PRECISION, ACROSS,
    )  # fmt: skip
    ref, narrow = column_units(omega, before)
    return live, omega, ref, narrow, prefix_log_sums(omega, ref, before, narrow, count)


@triton.jit
def pooled_products(
    d, from_means, omega, ref, before, log_c, narrow, count,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """⟨do_i, z_ij⟩ [BC, MP] from lower triangular ⟨do_i, v_s⟩ [BC, BC] and ⟨do_i, z⁰_j⟩ [BC, MP]."""
    seen = log_c > -INF
    safe = finite_or_zero(log_c)
    products = from_means
    if narrow:
        e = tl.exp2(omega - ref[None, :])
        inside = fine_product(d, rounded(e, FACTOR), PRECISION, ACROSS) + tl.exp2(before - ref)[None, :] * from_means
        products = tl.where(seen, tl.exp2(ref[None, :] - safe) * inside, 0.0)
    else:
        products = tl.exp2(before[None, :] - safe) * from_means
        for s in range(count):
            products += column_of(d, s)[:, None] * _ratio(omega, safe, s)
    return products


@triton.jit
def _ratio(omega, log_c, s):
    """e^{ω_s}/C_i [BC, MP] of key s; 0 for earlier queries."""
    reached = tl.arange(0, omega.shape[0]) >= s
    return tl.exp2(tl.where(reached[:, None], row_of(omega, s, -INF)[None, :] - log_c, -INF))


@triton.jit
def key_gradient(
    w, d_log_c, d, omega, ref, log_c, narrow, count,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """(A [BC, BC], Σ_{i≥s} e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij) [BC, MP]) of the chunk's own queries."""
    BC: tl.constexpr = omega.shape[0]
    seen = log_c > -INF
    safe = finite_or_zero(log_c)
    a = d
    d_omega = omega
    if narrow:
        e = tl.exp2(omega - ref[None, :])
        fade = tl.where(seen, tl.exp2(ref[None, :] - safe), 0.0)
        scaled = rounded(w * fade, FACTOR)
        a = lower(dot(scaled, tl.trans(rounded(e, FACTOR)), PRECISION))
        later = tl.cumsum(d_log_c * fade, 0, reverse=True)
        d_omega = e * (fine_product(tl.trans(d), scaled, PRECISION, ACROSS) + later)
    else:
        i = tl.arange(0, BC)
        a = tl.zeros_like(d)
        d_omega = tl.zeros_like(omega)
        for s in range(count):
            ratio = _ratio(omega, safe, s)
            a = tl.where((i == s)[None, :], tl.sum(w * ratio, 1)[:, None], a)
            row = tl.sum(ratio * (column_of(d, s)[:, None] * w + d_log_c), 0)
            d_omega = tl.where((i == s)[:, None], row[None, :], d_omega)
    return a, d_omega


@triton.jit
def tile_at(x, at, BC: tl.constexpr, MP: tl.constexpr):
    """Where a chunk's [BC, MP] numbers lie."""
    return x + (at * BC + tl.arange(0, BC))[:, None] * MP + tl.arange(0, MP)[None, :]


@triton.jit
def load_state(z, at, first, MP: tl.constexpr, EP: tl.constexpr, DEPTH: tl.constexpr):
    """Columns first.. of a chunk's [MP, EP] numbers: [MP, DEPTH]."""
    j, e = tl.arange(0, MP), first + tl.arange(0, DEPTH)
    return tl.load(z + (at * MP + j)[:, None] * EP + e[None, :])
