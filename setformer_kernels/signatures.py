"""For type checkers: the keyword arguments of functions with `return_info`, whose overloads say what comes back.

A test compares each with the signature that it stands for.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

Hyper = float | Tensor


class Convergence(TypedDict, total=False):
    """Of `functional.sinkhorn`."""

    num_iters: int
    tol: float | None
    key_relaxation: Hyper
    reference_relaxation: Hyper
    method: str
    grad: str
    initial_potential: Tensor | None
    backend: str


class Transport(Convergence, total=False):
    """Of `functional.set_transport` and `functional.set_pool`."""

    kernel: str
    bandwidth: Hyper
    epsilon: Hyper
    key_mask: Tensor | None
    reference_log_mass: Tensor | None
    key_position: Tensor | None
    reference_position: Tensor | None
    position_scale: Hyper
    cp_context: Any


class Attention(Transport, total=False):
    """Of `functional.set_attention`."""

    attn_mask: Tensor | None
    causal: bool
    query_position: Tensor | None
    dropout_p: float
    seed: Tensor | None


class Plan(Convergence, total=False):
    """Of `ot.transport_plan`, beside ε."""

    rho: Hyper | tuple[Hyper, Hyper] | None
    mask_a: Tensor | None
    mask_b: Tensor | None


class Cost(Plan, total=False):
    """Of `ot.transport_cost`."""

    entropy: bool
