"""Device functions of the causal kernels on one chunk: BC queries and keys at the same places, everything in base 2.

    ω_sj log weights of the keys, 2^{before_j} the sum of those of all earlier chunks,
    2^{log C_ij} = 2^{before_j} + Σ_{s≤i} 2^{ω_sj},   e_sj = 2^{ω_sj − ref_j} with ref_j the column's largest

A ratio 2^{ω_sj − log C_ij}, s ≤ i, is at most 1.  As a product e_sj · 2^{ref_j − log C_ij} it is one matrix product for
all pairs (i, s), exact while no prefix sum that counts lies more than `SPAN` below ref.  Where one does, and this is
decided on the device, the pairs are formed one key at a time from differences of logarithms.

Log gates sum to Γ_i from the chunk's first key on, and a ratio is 2^{ω_sj − log C_ij + Γ_i − Γ_s}.  As long as Γ is
small it goes into ω: ω_sj − Γ_s, and all C of the chunk are 2^{−Γ_i} of what they are.  Else it stays beside it.

log C of thousands is off by up to 2^−13, and sums of ratios by as much from 1: so for tokens of float32 each log C has
a `rest`, C/2^{log C}, which divides ratios.  For others the rest is the number 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device.logits import token_logits
from ..device.plan import row_update
from ..device.primitives import INF, SPAN, again, dot, finite_or_zero, log_and_rest, log_sum, rounded, tokens_by
from ..device.rows import key_mass

FAINT = tl.constexpr(23.0)  # 16 in base 2: sums of gates up to which log weights keep their digits with them


class Chunk(NamedTuple):
    """What the keys of one chunk weigh."""

    live: Any  # [BC] which keys take part
    gamma: Any  # [BC] Γ, 0 where ω has it
    fine: Any  # [BC] the digits of Γ beyond float32
    to_end: Any  # [BC] what ω fades by until the chunk's end
    omega: Any  # [BC, MP]
    before: Any  # [MP]
    before_rest: Any  # [MP] what rounding has left of 2^before
    ref: Any  # [MP]
    narrow: Any  # whether products of factors are exact
    log_c: Any  # [BC, MP]
    rest: Any  # [BC, MP] what rounding has left of C
    count: Any  # keys of the chunk


@triton.jit
def place(chunks, first_head, first_chunk):
    """(slot in the part's workspaces, b·H + h, chunk of the whole length) of a program on one chunk."""
    slot = tl.program_id(0)
    return slot.to(tl.int64), slot // chunks + first_head, slot % chunks + first_chunk


@triton.jit
def chunk_of(scalars, number, slot, H, L):
    """(what stands for b, h, how many rows that has, which of its chunks) of a chunk of head `number`.

    Of a packed batch the first row of the chunk's segment stands for b, as the host passes the stride of rows for that
    of elements; a chunk that is not there has no rows.
    """
    if scalars.lengths is None:
        return number // H, number % H, L, slot
    else:
        length, chunk = tl.load(scalars.lengths + slot), tl.load(scalars.numbers + slot)
        return tl.load(scalars.firsts + slot), number, length, chunk


@triton.jit
def fine_product(a, b, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """a [BC, K] float32 · b [K, MP]; for b in half precision a is the sum of two such numbers.

    ⟨do_i, v_s⟩ meets every reference: its rounding error would not average out over them.
    """
    high = rounded(a, b.dtype)
    result = tokens_by(high, b, PRECISION, ACROSS)
    if b.dtype != tl.float32:
        result += tokens_by(rounded(a - high.to(tl.float32), b.dtype), b, PRECISION, ACROSS)
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
def at_key(x, s):
    """Entry s of x [BC]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == s, x, 0.0), 0)


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
def gate_sums(gates, number, chunk, length, ROWS: tl.constexpr):
    """(Γ [BC] and its further digits, Γ of the whole chunk, what is left of Γ from each key to the chunk's end [BC]).

    gates [BH, length padded to chunks, 2] in base 2, or None.
    """
    if gates is None:
        none = tl.zeros([ROWS], tl.float32)
        return none, none, 0.0, none
    else:
        first = number.to(tl.int64) * (tl.cdiv(length, ROWS) * ROWS) + chunk * ROWS
        at = gates + (first + tl.arange(0, ROWS)) * 2
        last = gates + (first + ROWS - 1) * 2
        gamma, fine = tl.load(at), tl.load(at + 1)
        whole = tl.load(last)
        return gamma, fine, whole, (whole - gamma) + (tl.load(last + 1) - fine)


@triton.jit
def prefix_log_sums(omega, gamma, fine, ref, before, before_rest, narrow, count, EXACT: tl.constexpr):
    """(log C [BC, MP], −∞ before the first key; its rest)."""
    log_c = omega
    rest = omega if EXACT else 1.0
    if narrow:
        total = tl.cumsum(tl.exp2(omega - ref[None, :]), 0) + (tl.exp2(before - ref) * before_rest)[None, :]
        if EXACT:
            log_c, rest = log_and_rest(ref[None, :], total)
        else:
            log_c = log_sum(ref[None, :], total)
    else:
        i = tl.arange(0, omega.shape[0])
        so_far, left = before, before_rest
        last, last_fine = 0.0, 0.0
        for s in range(count):
            key, here, here_fine = row_of(omega, s, -INF), at_key(gamma, s), at_key(fine, s)
            so_far += (here - last) + (here_fine - last_fine)
            last, last_fine = here, here_fine
            peak = finite_or_zero(tl.maximum(so_far, key))
            if EXACT:
                so_far, left = log_and_rest(peak, tl.exp2(so_far - peak) * left + tl.exp2(key - peak))
                rest = tl.where((i == s)[:, None], left[None, :], rest)
            else:
                so_far = log_sum(peak, tl.exp2(so_far - peak) + tl.exp2(key - peak))
            log_c = tl.where((i == s)[:, None], so_far[None, :], log_c)
    return log_c, rest


@triton.jit
def query_weights(l, log_b, log_c, relaxation, UPDATE_ROWS: tl.constexpr):
    """The numerators of W [BC, MP]."""
    u = l + log_b[None, :]
    if UPDATE_ROWS:
        u -= relaxation * finite_or_zero(log_c)
    return tl.exp2(u - tl.max(u, 1)[:, None])


@triton.jit
def chunk_weights(w, chunk, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """(A [BC, BC] lower triangular, weights of the means before the chunk [BC, MP]) from W or a multiple w [BC, MP]."""
    BC: tl.constexpr = w.shape[0]
    seen = chunk.log_c > -INF
    safe = finite_or_zero(chunk.log_c)
    carried = w
    a = tl.zeros([BC, BC], tl.float32)
    if chunk.narrow:
        scaled = tl.where(seen, w * tl.exp2(chunk.ref[None, :] - safe) / chunk.rest, 0.0)
        carried = scaled * (tl.exp2(chunk.before - chunk.ref) * chunk.before_rest)[None, :]
        e = tl.exp2(chunk.omega - chunk.ref[None, :])
        a = lower(dot(rounded(scaled, FACTOR), tl.trans(rounded(e, FACTOR)), PRECISION))
    else:
        carried = w * before_ratio(chunk, safe)
        i = tl.arange(0, BC)
        for s in range(chunk.count):
            a = tl.where((i == s)[None, :], tl.sum(w * _ratio(chunk, safe, s), 1)[:, None], a)
    return a, carried


@triton.jit
def before_ratio(chunk, log_c):
    """C⁰/C [BC, MP] of what came before the chunk; log_c: finite, where that is not 0."""
    ratio = tl.exp2(again(chunk.before)[None, :] + chunk.gamma[:, None] - log_c)
    return ratio * (chunk.before_rest / chunk.rest)


@triton.jit
def chunk_log_weights(keys, masses, places, head, log_b, rows, uniform, rule, sizes, cut):
    """(which keys take part [BC], ω) of a chunk."""
    live, mass = key_mass(masses, rows, keys.count, uniform)
    l, kappa, cosine, inverse, first_columns = token_logits(keys, rows, live, places, head, rule.DOT, sizes, cut)
    return live, log_weights(l, log_b, mass, head.lam_a, rule.UPDATE_ROWS, sizes.M)


@triton.jit
def chunk_keys(keys, masses, places, head, log_c, rests, at, bh, number, slot, length, scalars, rule, sizes, cut):
    """(the rows of chunk `number` of head bh [BC], which of them are tokens, log b [MP], what its keys weigh).

    slot, length: where its gates are, and how many the head has.
    """
    j = tl.arange(0, sizes.MP)
    before, log_b = tl.load(log_c + at * sizes.MP + j), tl.load(head.log_b + j)
    before_rest = 1.0
    if rests is not None:
        before_rest = tl.load(rests + at * sizes.MP + j)
    first = number * cut.ROWS
    rows, count = first + tl.arange(0, cut.ROWS), tl.minimum(keys.count - first, cut.ROWS)
    live, omega = chunk_log_weights(keys, masses, places, head, log_b, rows, scalars.uniform, rule, sizes, cut)
    gamma, fine, whole, to_end = gate_sums(scalars.gates, bh, slot, length, cut.ROWS)
    tilted = omega
    if scalars.gates is not None:
        tilted = omega - gamma[:, None]
    ref, narrow = column_units(tilted, before)
    if scalars.gates is not None:
        narrow = narrow & (whole >= -FAINT)
        omega = tl.where(narrow, tilted, omega)
        gamma, fine = tl.where(narrow, 0.0, gamma), tl.where(narrow, 0.0, fine)
        to_end = tl.where(narrow, whole, to_end)
    so_far, rest = prefix_log_sums(omega, gamma, fine, ref, before, before_rest, narrow, count, rests is not None)
    known = Chunk(live, gamma, fine, to_end, omega, before, before_rest, ref, narrow, so_far, rest, count)
    return rows, rows < keys.count, log_b, known


@triton.jit
def pooled_products(d, from_means, chunk, FACTOR: tl.constexpr, GAINED: tl.constexpr, cut):
    """p = ⟨do_i, z_ij⟩ [BC, MP] from lower triangular ⟨do_i, v_s⟩ [BC, BC] and ⟨do_i, z⁰_j⟩ [BC, MP]; p − ⟨do_i, z⁰_j⟩.

    If GAINED, the latter is formed as Σ_s e^{ω_sj}/C_ij (⟨do_i, v_s⟩ − ⟨do_i, z⁰_j⟩), small where the chunk adds
    little to what came before; the difference of the products has their rounding errors.
    """
    seen = chunk.log_c > -INF
    safe = finite_or_zero(chunk.log_c)
    products = from_means
    gained = tl.zeros_like(from_means)
    if chunk.narrow:
        e = tl.exp2(chunk.omega - chunk.ref[None, :])
        inside = fine_product(d, rounded(e, FACTOR), cut.PRECISION, cut.ACROSS)
        if GAINED:
            more = inside - tl.cumsum(e, 0) * from_means
            gained = tl.where(seen, tl.exp2(chunk.ref[None, :] - safe) / chunk.rest * more, 0.0)
        inside += (tl.exp2(chunk.before - chunk.ref) * chunk.before_rest)[None, :] * from_means
        products = tl.where(seen, tl.exp2(chunk.ref[None, :] - safe) / chunk.rest * inside, 0.0)
    else:
        products = before_ratio(chunk, safe) * from_means
        for s in range(chunk.count):
            ratio = _ratio(chunk, safe, s)
            products += column_of(d, s)[:, None] * ratio
            if GAINED:
                gained += (column_of(d, s)[:, None] - from_means) * ratio
    if not GAINED:
        gained = products - from_means
    return products, gained


@triton.jit
def _ratio(chunk, log_c, s):
    """e^{ω_s + Γ_i − Γ_s}/C_i [BC, MP] of key s; 0 for earlier queries."""
    reached = tl.arange(0, chunk.omega.shape[0]) >= s
    fade = (chunk.gamma - at_key(chunk.gamma, s)) + (chunk.fine - at_key(chunk.fine, s))
    weight = row_of(chunk.omega, s, -INF)[None, :] + fade[:, None]
    return tl.exp2(tl.where(reached[:, None], weight - log_c, -INF)) / chunk.rest


@triton.jit
def key_gradient(weights, d_sums, d, chunk, FACTOR: tl.constexpr, cut):
    """(A [BC, BC], Σ_{i≥s} e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij) [BC, MP]) of the chunk's own queries."""
    seen = chunk.log_c > -INF
    safe = finite_or_zero(chunk.log_c)
    a = d
    d_omega = chunk.omega
    if chunk.narrow:
        e = tl.exp2(chunk.omega - chunk.ref[None, :])
        fade = tl.where(seen, tl.exp2(chunk.ref[None, :] - safe) / chunk.rest, 0.0)
        scaled = rounded(tl.load(weights) * fade, FACTOR)
        a = lower(dot(scaled, tl.trans(rounded(e, FACTOR)), cut.PRECISION))
        later = tl.cumsum(tl.load(d_sums) * fade, 0, reverse=True)
        d_omega = e * (fine_product(tl.trans(d), scaled, cut.PRECISION, cut.ACROSS) + later)
    else:
        i = tl.arange(0, d.shape[0])
        a = tl.zeros_like(d)
        d_omega = tl.zeros_like(chunk.omega)
        w, d_log_c = tl.load(weights), tl.load(d_sums)
        for s in range(chunk.count):
            ratio = _ratio(chunk, safe, s)
            a = tl.where((i == s)[None, :], tl.sum(w * ratio, 1)[:, None], a)
            row = tl.sum(ratio * (column_of(d, s)[:, None] * w + d_log_c), 0)
            d_omega = tl.where((i == s)[:, None], row[None, :], d_omega)
    return a, d_omega


@triton.jit
def crossings(weights, d_sums, d, chunk, crossing, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """What passes each key r of the chunk [BC]: from its earlier keys to its own later queries, and to later chunks.

    Σ_{i≥r>s} Σ_j e^{ω_sj}/C_ij (W_ij ⟨do_i, v_s⟩ + d log C_ij) + Σ_{s<r} from_keys_s, as sums over the pairs that
    cross: as a difference of sums over all pairs, it would have their rounding errors.
    """
    i = tl.arange(0, d.shape[0])
    seen = chunk.log_c > -INF
    safe = finite_or_zero(chunk.log_c)
    pairs = d
    if chunk.narrow:
        e = tl.trans(rounded(tl.exp2(chunk.omega - chunk.ref[None, :]), FACTOR))
        fade = tl.where(seen, tl.exp2(chunk.ref[None, :] - safe) / chunk.rest, 0.0)
        pairs = d * dot(rounded(tl.load(weights) * fade, FACTOR), e, PRECISION)
        pairs = lower(pairs + dot(rounded(tl.load(d_sums) * fade, FACTOR), e, PRECISION))
    else:
        pairs = tl.zeros_like(d)
        w, d_log_c = tl.load(weights), tl.load(d_sums)
        for s in range(chunk.count):
            column = tl.sum((column_of(d, s)[:, None] * w + d_log_c) * _ratio(chunk, safe, s), 1)
            pairs = tl.where((i == s)[None, :], column[:, None], pairs)
    later = tl.cumsum(pairs, 0, reverse=True)
    inside = tl.sum(tl.where(i[:, None] > i[None, :], later, 0.0), 1)
    from_keys = tl.load(crossing)
    return inside + tl.sum(tl.where(i[:, None] > i[None, :], from_keys[None, :], 0.0), 1)


@triton.jit
def tile_at(x, at, ROWS: tl.constexpr, sizes):
    """Where a chunk's [BC, MP] numbers lie."""
    return x + (at * ROWS + tl.arange(0, ROWS))[:, None] * sizes.MP + tl.arange(0, sizes.MP)[None, :]


@triton.jit
def state_at(z, at, columns, sizes):
    """Where columns of a chunk's [MP, EP] numbers lie."""
    return z + (at * sizes.MP + tl.arange(0, sizes.MP))[:, None] * sizes.EP + columns[None, :]
