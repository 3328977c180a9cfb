"""The hyperparameters of a head: one row of numbers, whose places only this module knows."""

import triton
import triton.language as tl

from .primitives import LOG2E

# β·log2 e, log2 e/ε, λ_a, λ_b, τ²·log2 e, as the logits take them; then β, ε, τ themselves.
LOG_BETA, SCALE, KEY_RELAXATION, REFERENCE_RELAXATION, SQUARED_TAU, BETA, EPSILON, TAU = map(tl.constexpr, range(8))
NUMBERS = tl.constexpr(8)  # in a row


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
