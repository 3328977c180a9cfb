"""What kernels read of a head: its references and hyperparameters; only this module knows where in a row these lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import LOG2E

# β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e, as the logits take them; then β, ε, τ themselves.
LOG_BETA, SCALE, KEY_RELAXATION, REFERENCE_RELAXATION, SQUARED_TAU, BETA, EPSILON, TAU = map(tl.constexpr, range(8))
NUMBERS = tl.constexpr(8)  # in a row


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
    row = parameters + h * NUMBERS
    tl.store(row + LOG_BETA, beta * LOG2E)
    tl.store(row + SCALE, (1.0 / epsilon) * LOG2E)
    tl.store(row + KEY_RELAXATION, key_relaxation)
    tl.store(row + REFERENCE_RELAXATION, reference_relaxation)
    tl.store(row + SQUARED_TAU, tau * tau * LOG2E)
    tl.store(row + BETA, beta)
    tl.store(row + EPSILON, epsilon)
    tl.store(row + TAU, tau)


@triton.jit
def head_parameters(parameters, h):
    """(β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e) of head h."""
    row = parameters + h * NUMBERS
    relaxations = tl.load(row + KEY_RELAXATION), tl.load(row + REFERENCE_RELAXATION)
    return tl.load(row + LOG_BETA), tl.load(row + SCALE), relaxations[0], relaxations[1], tl.load(row + SQUARED_TAU)


@triton.jit
def plain_parameters(parameters, h):
    """(β, ε, τ) of head h."""
    row = parameters + h * NUMBERS
    return tl.load(row + BETA), tl.load(row + EPSILON), tl.load(row + TAU)


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
def head_of(references, h, sizes, cut):
    """Head h of the prepared references (`parameters.prepare.Prepared`)."""
    y = references.y + h * (sizes.MP * sizes.DP)
    y_t = load_references_t(y, 0, sizes.MP, sizes.DP, cut.DEPTH)
    beta, scale, lam_a, lam_b, tau = head_parameters(references.parameters, h)
    return Head(y, y_t, references.log_b + h * sizes.MP, beta, scale, lam_a, lam_b, tau)
