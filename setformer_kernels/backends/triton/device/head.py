"""What kernels read of a head: its references and hyperparameters; only this module knows where in a row these lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import LOG2E

NUMBERS = 8  # in a row: β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e, as the logits take them; then β, ε, τ themselves
# Their places are literals in the three functions below: Triton compares every global of a kernel at each launch.


class Numbers(NamedTuple):
    """One head without its references."""

    log_b: Any  # [MP] in memory
    lam_a: Any
    lam_b: Any


class Head(NamedTuple):
    """One head; numbers as `head_parameters` gives them."""

    y: Any  # [MP, DP] in memory
    y_t: Any  # [DEPTH, MP] the first columns, transposed
    log_b: Any  # [MP] in memory
    beta: Any
    scale: Any
    lam_a: Any
    lam_b: Any
    tau: Any


@triton.jit
def store_parameters(parameters, h, beta, epsilon, key_relaxation, reference_relaxation, tau):
    """The row of head h."""
    row = parameters + h * 8
    tl.store(row, beta * LOG2E)
    tl.store(row + 1, (1.0 / epsilon) * LOG2E)
    tl.store(row + 2, key_relaxation)
    tl.store(row + 3, reference_relaxation)
    tl.store(row + 4, tau * tau * LOG2E)
    tl.store(row + 5, beta)
    tl.store(row + 6, epsilon)
    tl.store(row + 7, tau)


@triton.jit
def head_parameters(parameters, h):
    """(β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e) of head h."""
    row = parameters + h * 8
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def plain_parameters(parameters, h):
    """(β, ε, τ) of head h."""
    row = parameters + h * 8 + 5
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def gradient_factor(parameters, h, DOT: tl.constexpr):
    """dĉ/dℓ without κ: β/ε (rbf) or 1/ε (dot)."""
    beta, epsilon, tau = plain_parameters(parameters, h)
    return 1.0 / epsilon if DOT else beta / epsilon


@triton.jit
def load_references(y, start, M: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr):
    """Columns start.. of the prepared references of one head: [M, DEPTH]; padded in memory, so no mask."""
    return tl.load(y + tl.arange(0, M)[:, None] * DP + start + tl.arange(0, DEPTH)[None, :])


@triton.jit
def load_references_t(y, start, M: tl.constexpr, DP: tl.constexpr, DEPTH: tl.constexpr):
    """The same as [DEPTH, M], the form products take: transposed before a loop, it is laid out for the product once."""
    return tl.trans(load_references(y, start, M, DP, DEPTH))


@triton.jit
def numbers_of(references, h, sizes):
    """What iterations take of head h of the prepared references (`parameters.prepare.References`)."""
    beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h.to(tl.int64))
    return Numbers(references.log_b + h.to(tl.int64) * sizes.MP, lam_a, lam_b)


@triton.jit
def head_of(references, h, sizes, cut):
    """Head h of the prepared references (`parameters.prepare.References`)."""
    h = h.to(tl.int64)
    y = references.y + h * (sizes.MP * sizes.DP)
    y_t = load_references_t(y, 0, sizes.MP, sizes.DP, cut.DEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h)
    return Head(y, y_t, references.log_b + h * sizes.MP, beta, scale, lam_a, lam_b, tau)
