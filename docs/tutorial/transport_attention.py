"""SeT attention from its formulas to a kernel, in one file.

    python docs/tutorial/transport_attention.py

Three steps: the formulas, the same in plain PyTorch, and a forward pass in Triton that never forms a matrix of length
S or L in memory.  The last lines hold it against the package's reference.  Without a GPU the kernel runs on Triton's
interpreter, tile by tile in Python: slow, and just as exact.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import triton
import triton.language as tl

from setformer_kernels.functional import set_attention

# --- 1. The formulas ------------------------------------------------------------------------------------------------
#
# A head has S keys k_s with values v_s, L queries q_i, and M learned references y_j.  M is small and fixed (64, say).
#
#   logits      ℓ(x, y) = (κ(x, y) − 1)/ε,   κ(x, y) = exp(β(⟨x̂, ŷ⟩ − 1)),   x̂ = x/‖x‖
#   transport   g_j = log b_j;   T times:   f_s = log a_s − LSE_j(ℓ_sj + g_j)      every key sends all its mass a_s
#                                           c_j = LSE_s(ℓ_sj + f_s)
#                                           g_j = log b_j − c_j                    every reference receives b_j
#   pool        z_j = Σ_s exp(ℓ_sj + f_s − c_j) v_s                                [M, E]
#   read        o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g_j) z_j                         [L, E]
#
# LSE is log Σ exp.  Keys meet queries only through the M references: nothing here has S·L entries.  Masses are uniform
# in this file: a_s = 1/S, b_j = 1/M.

# --- 2. The same in plain PyTorch -----------------------------------------------------------------------------------


def attention_in_torch(q: Tensor, k: Tensor, v: Tensor, y: Tensor, beta: float, epsilon: float, T: int) -> Tensor:
    """q [B, H, L, D], k [B, H, S, D], v [B, H, S, E], y [H, M, D] -> o [B, H, L, E]."""

    def logits(x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, M]
        cosine = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
        return (torch.exp(beta * (cosine - 1)) - 1) / epsilon

    l = logits(k)
    log_a, log_b = -math.log(k.shape[-2]), -math.log(y.shape[-2])
    g = torch.full_like(l[..., 0, :], log_b)  # [B, H, M]
    for _ in range(T):
        f = log_a - torch.logsumexp(l + g.unsqueeze(-2), -1)  # [B, H, S]
        c = torch.logsumexp(l + f.unsqueeze(-1), -2)  # [B, H, M]
        g = log_b - c
    w_k = torch.exp(l + f.unsqueeze(-1) - c.unsqueeze(-2))  # [B, H, S, M], columns sum to 1
    w_q = torch.softmax(logits(q) + g.unsqueeze(-2), -1)  # [B, H, L, M], rows sum to 1
    return w_q @ (w_k.mT @ v)


# --- 3. What a kernel can do better ---------------------------------------------------------------------------------
#
# The code above writes ℓ [S, M] to memory and reads it back 2T + 1 times.  Look at what an iteration needs:
#
#   - f_s needs row s of ℓ only.  M is small, so the whole row is in one tile: the row update is local.
#   - c_j needs a sum over all keys, which can be taken tile by tile: keep a running peak and a total per reference.
#     When a larger peak comes, what was summed so far fades by exp(old peak − new peak).
#
# So an iteration is ONE pass over the keys that keeps 2M numbers, and ℓ is computed again in every pass: D products
# are cheaper than a trip to memory.  The last pass pools the values as well, in the same running units.


@triton.jit
def load_unit(rows_of, rows, live, D: tl.constexpr):
    """The rows of a [N, D] tensor, normalised; zeros where not live."""
    d = tl.arange(0, D)
    x = tl.load(rows_of + rows[:, None] * D + d[None, :], mask=live[:, None], other=0.0)  # [BLOCK, D]
    squared = tl.sum(x * x, 1)
    return x * tl.where(squared > 0, tl.rsqrt(tl.where(squared > 0, squared, 1.0)), 0.0)[:, None]


@triton.jit
def logits(x, y, beta, epsilon):
    """x̂ [BLOCK, D], ŷ [M, D] -> ℓ [BLOCK, M]."""
    cosine = tl.dot(x, tl.trans(y), input_precision="ieee")
    return (tl.exp(beta * (cosine - 1.0)) - 1.0) / epsilon


@triton.jit
def one_pass(
    key, value, y, g, S, beta, epsilon,
    POOL: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One Sinkhorn iteration over the keys of a head: c [M], and (POOL) z [M, E]."""
    e = tl.arange(0, E)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)  # Σ_s exp(ℓ_sj + f_s) = total · exp(peak)
    sums = tl.zeros([M, E], tl.float32)  # the same with v_s under the sum
    for first in range(0, S, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        live = rows < S
        l = logits(load_unit(key, rows, live, D), y, beta, epsilon)  # [BLOCK, M]
        # the row update: f_s = log a_s − LSE_j(ℓ_sj + g_j), with the row's own peak
        u = l + g[None, :]
        top = tl.max(u, 1)
        f = -tl.log(S * 1.0) - (top + tl.log(tl.sum(tl.exp(u - top[:, None]), 1)))
        w = tl.where(live[:, None], l + f[:, None], -float("inf"))
        # the column sums: c_j = LSE_s(ℓ_sj + f_s), running
        new = tl.maximum(peak, tl.max(w, 0))
        fade = tl.exp(peak - new)
        p = tl.exp(w - new[None, :])
        total = total * fade + tl.sum(p, 0)
        if POOL:
            v = tl.load(value + rows[:, None] * E + e[None, :], mask=live[:, None], other=0.0)
            sums = sums * fade[:, None] + tl.dot(tl.trans(p), v, input_precision="ieee")
        peak = new
    return peak + tl.log(total), sums / total[:, None]


@triton.jit
def transport_kernel(
    key, value, references,  # [BH, S, D], [BH, S, E], [H, M, D], contiguous
    potential, pooled,  # g [BH, M], z [BH, M, E]
    H, S, beta, epsilon,
    T: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All T ≥ 1 iterations of one head in one program: g stays in registers from pass to pass."""
    bh = tl.program_id(0)
    j, e = tl.arange(0, M), tl.arange(0, E)
    key += bh * S * D
    value += bh * S * E
    y = load_unit(references + bh % H * M * D, j, j < M, D)
    log_b = -tl.log(M * 1.0)
    g = tl.zeros([M], tl.float32) + log_b
    for _ in range(T - 1):
        c, _z = one_pass(key, value, y, g, S, beta, epsilon, False, M, D, E, BLOCK)
        g = log_b - c
    c, z = one_pass(key, value, y, g, S, beta, epsilon, True, M, D, E, BLOCK)
    tl.store(potential + bh * M + j, log_b - c)
    tl.store(pooled + bh * M * E + j[:, None] * E + e[None, :], z)


# Reading is the easy half.  z and g of a head fit on the chip, every query is on its own, and a row's softmax over the
# references is again inside one tile.


@triton.jit
def read_kernel(
    query, references, potential, pooled,  # [BH, L, D], [H, M, D], [BH, M], [BH, M, E]
    output,  # [BH, L, E]
    H, L, beta, epsilon,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one head."""
    bh, rows = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = rows < L
    j, e = tl.arange(0, M), tl.arange(0, E)
    y = load_unit(references + bh % H * M * D, j, j < M, D)
    g = tl.load(potential + bh * M + j)
    u = logits(load_unit(query + bh * L * D, rows, live, D), y, beta, epsilon) + g[None, :]
    p = tl.exp(u - tl.max(u, 1)[:, None])
    z = tl.load(pooled + bh * M * E + j[:, None] * E + e[None, :])
    o = tl.dot(p / tl.sum(p, 1)[:, None], z, input_precision="ieee")
    tl.store(output + bh * L * E + rows[:, None] * E + e[None, :], o, mask=live[:, None])


def attention_in_triton(q: Tensor, k: Tensor, v: Tensor, y: Tensor, beta: float, epsilon: float, T: int) -> Tensor:
    """As `attention_in_torch`, for contiguous float32 tensors and M, D, E that are powers of two from 16 on."""
    (B, H, L, D), S, E, M = q.shape, k.shape[-2], v.shape[-1], y.shape[-2]
    g, z, o = q.new_empty(B * H, M), q.new_empty(B * H, M, E), q.new_empty(B, H, L, E)
    block = 32
    transport_kernel[(B * H,)](k, v, y, g, z, H, S, beta, epsilon, T, M, D, E, block)
    read_kernel[(B * H, triton.cdiv(L, block))](q, y, g, z, o, H, L, beta, epsilon, M, D, E, block)
    return o


# --- 4. Held against the reference ----------------------------------------------------------------------------------


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, H, L, S, M, D, E, T, beta, epsilon = 1, 2, 75, 200, 32, 32, 32, 3, 1.0, 0.05
    q, k, v = (torch.randn(B, H, n, d, device=device) for n, d in ((L, D), (S, D), (S, E)))
    y = torch.randn(H, M, D, device=device)

    wide = [t.double() for t in (q, k, v, y)]
    exact = set_attention(*wide, bandwidth=beta, epsilon=epsilon, num_iters=T, backend="reference")
    plain = relative_error(attention_in_torch(q, k, v, y, beta, epsilon, T), exact)
    kernel = relative_error(attention_in_triton(q, k, v, y, beta, epsilon, T), exact)
    print(f"plain PyTorch against reference: relative error {plain:.1e}")
    print(f"kernel against reference:        relative error {kernel:.1e}")
    assert max(plain, kernel) < 1e-5

    print(f"logits that plain PyTorch keeps for a head: {(L + S) * M} numbers; the kernels': {M + M * E} (g and z)")


if __name__ == "__main__":
    main()
