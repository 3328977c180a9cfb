"""The implementations that are compared, all with the same face.

An attention implementation is a function of `AttentionInputs` that returns o [B, H, L, E]; a sinkhorn implementation
is a function of the log kernel [G, N, M] that returns the potentials (f [G, N], g [G, M]) in the mass convention of
its library (see `Sinkhorn.plan`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.common.cases import (
    BANDWIDTH,
    EPSILON,
    FORWARD,
    PACKED,
    AttentionInputs,
    Entry,
    pack_offsets,
    query_mask,
)

Attention = Callable[[AttentionInputs], Tensor]
Potentials = tuple[Tensor, Tensor]


def _set(x: AttentionInputs, T: int, backend: str, mask: str = "") -> Tensor:
    return SF.set_attention(
        x.query,
        x.key,
        x.value,
        x.references,
        bandwidth=BANDWIDTH,
        epsilon=EPSILON,
        num_iters=T,
        backend=backend,
        attn_mask=query_mask(mask, x.query.shape[2]),
        causal=mask == "causal",
    )


def _packed(x: AttentionInputs, T: int) -> Tensor:
    """The same tokens as sequences of other lengths, one after another."""
    B, _, L, _ = x.query.shape
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (x.query, x.key, x.value)]
    q, k, v = rows
    o = SF.set_attention_varlen(
        q, k, v, x.references, pack_offsets(B, L), bandwidth=BANDWIDTH, epsilon=EPSILON, num_iters=T
    )
    return o.unflatten(0, (B, L)).transpose(1, 2)


def _sdpa(x: AttentionInputs, mask: str = "") -> Tensor:
    seen = query_mask(mask, x.query.shape[2])
    return F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=seen, is_causal=mask == "causal")


def elu_attention(query: Tensor, key: Tensor, value: Tensor, present: Tensor | None = None) -> Tensor:
    """Linear attention with the elu + 1 feature map (Katharopoulos et al., 2020); present [B, 1 or H, S] bool."""
    q, k = F.elu(query) + 1, F.elu(key) + 1  # [B, H, L, D], [B, H, S, D]
    if present is not None:
        k = k * present.unsqueeze(-1)
    state = k.transpose(-1, -2) @ value  # [B, H, D, E]
    normaliser = q @ k.sum(dim=-2).unsqueeze(-1)  # [B, H, L, 1]
    return (q @ state) / normaliser


def _elu(x: AttentionInputs) -> Tensor:
    return elu_attention(x.query, x.key, x.value)


def attention(entry: Entry, mask: str = "") -> Attention:
    """The implementation an entry names, under a mask; `compiled` compiles anew, for the shapes of its first call."""
    if entry.impl == "sdpa":
        return functools.partial(_sdpa, mask=mask)
    if entry.impl == "elu":
        return _elu
    if entry.T is None:
        raise ValueError(f"{entry.impl!r} needs a T")
    if entry.impl == PACKED:
        return functools.partial(_packed, T=entry.T)
    if entry.impl == "compiled":
        return torch.compile(functools.partial(_set, T=entry.T, backend="reference"), fullgraph=True, dynamic=False)
    backend = {"set": "auto", "reference": "reference"}[entry.impl]
    return functools.partial(_set, T=entry.T, backend=backend, mask=mask)


def forget_graphs() -> None:
    """Drop compiled graphs: those of earlier lengths would count towards the recompilation limit."""
    torch._dynamo.reset()


def attention_call(run: Attention, x: AttentionInputs, mode: str, *, references: bool) -> Callable[[], object]:
    """What one timed call does: a forward without autograd, or a forward and the gradients of its inputs."""
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return run(x)

        return forward
    leaves = x.leaves() if references else x.leaves()[:3]
    return lambda: torch.autograd.grad(run(x), leaves, x.grad_output)


def has_references(entry: Entry) -> bool:
    """Whether the implementation reads the references (and so has a gradient for them)."""
    return entry.T is not None


class Sinkhorn(NamedTuple):
    """One solver and the masses its potentials leave out of the plan."""

    solve: Callable[[Tensor, int], Potentials]
    masses_apart: bool = False  # plan = a ⊗ b · exp(K + f + g) instead of exp(K + f + g)

    def plan(self, log_kernel: Tensor, T: int) -> Tensor:
        """The transport plan [G, N, M] after T iterations."""
        f, g = self.solve(log_kernel, T)
        plan = torch.exp(log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2))
        return plan / (log_kernel.shape[-1] * log_kernel.shape[-2]) if self.masses_apart else plan


def plain_sinkhorn(log_kernel: Tensor, T: int) -> Potentials:
    """Log-domain Sinkhorn with uniform masses, as one writes it in PyTorch."""
    N, M = log_kernel.shape[-2:]
    log_a, log_b = (-log_kernel.new_tensor(float(n)).log() for n in (N, M))
    g = log_b.expand(log_kernel.shape[0], M)  # [G, M]
    f = log_a.expand(log_kernel.shape[0], N)  # [G, N]
    for _ in range(T):
        f = log_a - torch.logsumexp(log_kernel + g.unsqueeze(-2), dim=-1)
        g = log_b - torch.logsumexp(log_kernel + f.unsqueeze(-1), dim=-2)
    return f, g


def _uniform(log_kernel: Tensor) -> Potentials:
    G, N, M = log_kernel.shape
    return log_kernel.new_full((G, N), 1 / N), log_kernel.new_full((G, M), 1 / M)


def _pot(log_kernel: Tensor, T: int) -> Potentials:
    """POT's default batched solver; tol=0 keeps its early stop from firing."""
    from ot.batch import bregman_log_projection_batch

    a, b = _uniform(log_kernel)
    grad = "autodiff" if log_kernel.requires_grad else "detach"
    return bregman_log_projection_batch(log_kernel, a, b, max_iter=T, tol=0.0, grad=grad)["potentials"]


def _pot_scaling(log_kernel: Tensor, T: int) -> Potentials:
    """POT's batched solver in the exponential domain: faster, but e^K underflows at small ε."""
    from ot.batch import bregman_projection_batch

    a, b = _uniform(log_kernel)
    u, v = bregman_projection_batch(torch.exp(log_kernel), a, b, max_iter=T, tol=0.0, grad="detach")["potentials"]
    return u.log(), v.log()


def _geomloss(log_kernel: Tensor, T: int) -> Potentials:
    """geomloss' batched solver: T averaged updates along a decreasing ε, plus its own first and last update."""
    from geomloss import ot

    solution = ot.solve_batch(-EPSILON * log_kernel, reg=EPSILON, max_iter=T)
    return solution.potential_a / EPSILON, solution.potential_b / EPSILON


def _package(log_kernel: Tensor, T: int, backend: str) -> Potentials:
    return SF.sinkhorn(log_kernel, num_iters=T, backend=backend)


SINKHORN = {
    "set": Sinkhorn(functools.partial(_package, backend="auto")),
    "reference": Sinkhorn(functools.partial(_package, backend="reference")),
    "plain": Sinkhorn(plain_sinkhorn),
    "pot": Sinkhorn(_pot),
    "pot-scaling": Sinkhorn(_pot_scaling),
    "geomloss": Sinkhorn(_geomloss, masses_apart=True),
}
_MODULES = {"pot": "ot", "pot-scaling": "ot", "geomloss": "geomloss"}


def missing(impl: str) -> str:
    """Why a solver cannot run here, empty if it can."""
    module = _MODULES.get(impl)
    return f"the module {module!r} is not installed" if module and importlib.util.find_spec(module) is None else ""


def sinkhorn_call(solver: Sinkhorn, log_kernel: Tensor, T: int) -> Callable[[], object]:
    """A forward without autograd, or with the gradient of Σf + Σg with respect to the log kernel."""
    if log_kernel.requires_grad:

        def both() -> tuple[Tensor, ...]:
            f, g = solver.solve(log_kernel, T)
            return torch.autograd.grad(f.sum() + g.sum(), log_kernel)

        return both

    def forward() -> Potentials:
        with torch.no_grad():
            return solver.solve(log_kernel, T)

    return forward
