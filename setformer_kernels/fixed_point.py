"""Transport to convergence on a backend's kernels, where `reference.converged` has it in PyTorch.

A backend gives a pass at potentials g (`linearised`), iterations from a start (`started`), and its ops; one that makes
logits of the keys in its kernels gives both for keys too (`linearised_keys`, `iterated_keys`).  Newton's method and the
M × M systems are those of the reference, in PyTorch.  The iteration that sets out from the fixed point is an op of
T = 1 whose log b is g, and the gradient of g that op's backward again, from the u of the system.  Under torch.compile,
transforms and modes, which see nothing of kernels that are no ops, calls are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, ops
from .ops.direct import unwatched
from .ops.operands import batch_as_heads, narrow
from .problem import Operands, Options, Sinkhorn, replaced
from .reference.attention import hyper, reference_mass, widen
from .reference.converged import Marginals, Solver, Transported
from .reference.converged.attention import around, marginals
from .reference.converged.implicit import refuse, through
from .reference.converged.newton import newton
from .reference.converged.solve import Solving, batched
from .reference.converged.system import Pass, Passed, columns_of, full, is_live, without_autocast
from .reference.transport import INF, Plan, potential, started


def backend_for(name: str, tensors: Sequence[Tensor | None]) -> ModuleType | None:
    """The native backend of that name, if it has these kernels and nobody but autograd has to see the call."""
    module = dispatch.NATIVE.get(name)
    return module if module is not None and hasattr(module, "linearised") and unwatched(tensors) else None


class Kernels(NamedTuple):
    """What finds the potentials of some problems [G]."""

    passed: Passed
    iterated: Callable[[Marginals, int, Solver], tuple[Tensor, Tensor]]  # g [G, M] after that many, how many ran [G]


def passes(backend: ModuleType) -> Passed:
    """`reference.converged.system.passed` of problems [G], without gradient."""

    def passed(p: Marginals, g: Tensor, running: Tensor | None = None) -> Pass:
        return _live(p, g, backend.linearised(p.l, p.log_a, p.lam_a.squeeze(-1), g, running))

    return passed


def _live(p: Marginals, g: Tensor, found: tuple[Tensor, ...]) -> Pass:
    s, f, c, mass, gram = found
    return Pass(s, f, c, gram, mass, is_live(p, g, c))


def _of_costs(backend: ModuleType) -> Kernels:
    def iterated(p: Marginals, num_iters: int, how: Solver) -> tuple[Tensor, Tensor]:
        _, g, _, iters = backend.started(_problem(p, num_iters, how.tol), how.start)
        return g, iters

    return Kernels(passes(backend), iterated)


def _of_keys(x: Operands, opt: Options, backend: ModuleType) -> Kernels:
    """Those of the problems [BH] of keys, whatever their ℓ says."""
    x = narrow(x)

    def passed(p: Marginals, g: Tensor, running: Tensor | None = None) -> Pass:
        return _live(p, g, backend.linearised_keys(x, opt, g, running))

    def iterated(p: Marginals, num_iters: int, how: Solver) -> tuple[Tensor, Tensor]:
        return backend.iterated_keys(x, opt._replace(num_iters=num_iters), started(how.start, p.log_b), how.tol)

    return Kernels(passed, iterated)


def _potentials(p: Marginals, num_iters: int, how: Solver, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """g [G, M] near the fixed point, and how many iterations ran [G]."""
    if how.method == "newton":
        plan = newton(p, num_iters, how.tol, how.start, kernels.passed)
        return plan.g, plan.iters
    return kernels.iterated(p, num_iters, how)


def _problem(p: Marginals, num_iters: int, tol: float | None) -> Sinkhorn:
    return Sinkhorn(p.l, p.log_a, p.log_b, p.lam_a.squeeze(-1), p.lam_b.squeeze(-1), (1.0, 1.0), num_iters, tol)


class Iteration(NamedTuple):
    """One iteration from g, as a function of tensors: how it runs, and the problems [G] that these make."""

    after: Callable[..., Tensor]  # (g, *tensors) -> F(g), shaped as g
    problem: Callable[..., tuple[Marginals, Kernels]]  # of tensors


class FixedPoint(torch.autograd.Function):
    """g, a fixed point of an iteration, as a function of its tensors."""

    @staticmethod
    def forward(ctx: Any, iteration: Iteration, g: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.iteration = iteration
        ctx.save_for_backward(g, *tensors)
        return g.clone()

    @staticmethod
    def backward(ctx: Any, d_g: Tensor) -> tuple[Tensor | None, ...]:
        g, *tensors = ctx.saved_tensors
        found = iter(Adjoint.apply(ctx.iteration, ctx.needs_input_grad[2:], d_g, g, *tensors))
        return None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:])


class Adjoint(torch.autograd.Function):
    """(∂F/∂θ)ᵀ u of the tensors that need it; it has no backward itself."""

    backward = staticmethod(refuse)

    @staticmethod
    def forward(
        ctx: Any, iteration: Iteration, needs: Sequence[bool], d_g: Tensor, g: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(g):
            p, kernels = iteration.problem(*tensors)
            flat = g.reshape(-1, g.shape[-1])
            u = through(p, kernels.passed(p, flat, None), d_g.reshape(flat.shape)).view(g.shape)
            with torch.enable_grad():
                leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
                after = iteration.after(g, *leaves)
            wanted = [t for t, n in zip(leaves, needs, strict=True) if t is not None and n]
            return torch.autograd.grad(after, wanted, u, allow_unused=True)


def _dense_iteration(chosen: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def iteration(g: Tensor, l: Tensor, log_a: Tensor, lam_a: Tensor) -> tuple[Tensor, Tensor]:
        """f [G, N] of g [G, M], and c [G, M] of f."""
        f, after, *_ = ops.sinkhorn.sinkhorn(l, log_a, g, lam_a.squeeze(-1), None, [1.0, 1.0], 1, None, chosen)
        return f, _less(g, after)

    return iteration


def _less(g: Tensor, after: Tensor) -> Tensor:
    """c of g − c: −∞ where either is."""
    return torch.where((g > -INF) & (after > -INF), full(g) - full(after), -INF)


def solve(p: Marginals, num_iters: int, how: Solver, backend: ModuleType) -> Plan:
    """`reference.converged.solve` of problems [G] with the gradient of the fixed point; its c stands for g alone."""
    p = batched(p)
    of_columns = p.l.shape[-1] <= p.l.shape[-2]
    side = p if of_columns else p.T._replace(l=p.l.mT.contiguous())
    iterate, kernels = _dense_iteration(dispatch.chosen_for(backend.NAME, backend.NAME)), _of_costs(backend)

    def after(g: Tensor, *tensors: Tensor) -> Tensor:
        x = Marginals(*tensors)
        return potential(x.log_b, x.lam_b, iterate(g, x.l, x.log_a, x.lam_a)[1])

    with torch.no_grad(), without_autocast(p.l):
        fixed = Marginals(*[t.detach() for t in side])
        if how.start is not None and not of_columns:
            start = torch.where(how.start.isfinite(), how.start, p.log_b)
            how = how._replace(start=iterate(start, p.l, p.log_a, p.lam_a)[0])
        g, iters = _potentials(fixed, num_iters - 1, how, kernels)
    g = FixedPoint.apply(Iteration(after, lambda *tensors: (Marginals(*tensors), kernels)), g, *side)
    f, c = iterate(g, side.l, side.log_a, side.lam_a)
    if not of_columns:
        return Plan(g, f, c.unsqueeze(-2), iters + 1)
    return Plan(f, potential(p.log_b, p.lam_b, c), c.unsqueeze(-2), iters + 1)


def solving(backend: ModuleType) -> Solving:
    """`reference.converged.solve` of problems [...]: unrolled by the op of iterations, which stops by a tolerance."""

    def solved(p: Marginals, num_iters: int, how: Solver) -> Plan:
        p = batched(p)
        batch = p.l.shape[:-2]
        flat = Marginals(*[t.reshape(-1, *t.shape[len(batch) :]) for t in p])
        if how.grad == "implicit":
            start = None if how.start is None else how.start.reshape(flat.log_b.shape)
            f, _, _, iters = solve(flat, num_iters, how._replace(start=start), backend)
        else:
            chosen = dispatch.chosen_for(backend.NAME, backend.NAME)
            x = _problem(flat, num_iters, how.tol)
            f, _, _, iters = ops.sinkhorn.sinkhorn(*x.tensors, [1.0, 1.0], num_iters, how.tol, chosen)
        f = f.reshape(*batch, f.shape[-1])
        c, g = columns_of(p, f)
        return Plan(f, g if num_iters else p.log_b, c.unsqueeze(-2), iters.reshape(batch))

    return solved


def _takes_keys(backend: ModuleType) -> bool:
    return hasattr(backend, "linearised_keys")


def _with_logits(x: Operands, opt: Options) -> Marginals:
    """The problems [BH] of the keys."""
    return _of_heads(marginals(widen(x), opt))


def _of_heads(p: Marginals) -> Marginals:
    """[BH] from [B, H]."""
    return Marginals(*[t.flatten(0, 1) for t in batched(p)])


def _problem_of_keys(x: Operands, opt: Options, backend: ModuleType) -> tuple[Marginals, Kernels]:
    if not _takes_keys(backend):
        return _with_logits(x, opt), _of_costs(backend)
    nowhere = x.references.new_full((), math.nan)  # whoever reads a logit sees it
    sizes = (*x.key.shape[:3], x.references.shape[1])
    return _of_heads(around(nowhere.expand(sizes), x, opt)), _of_keys(x, opt, backend)


class Reached(NamedTuple):
    """Where potentials of keys came to, without gradient; the problems and their plans where somebody asks for them."""

    iters: Tensor  # [B, H]
    transported: Callable[[], Transported]


def transport(x: Operands, opt: Options, how: Solver, backend: ModuleType) -> tuple[Tensor, Tensor, Reached]:
    """z [B, H, M, E] and g [B, H, M] with the gradient of the fixed point, and what was reached."""
    x = replaced(x, query=None, query_position=None, seed=None)
    (b, h, _, _), m = x.key.shape, x.references.shape[1]

    def problem(*tensors: Tensor | None) -> tuple[Marginals, Kernels]:
        return _problem_of_keys(Operands(*tensors), opt, backend)  # type: ignore[arg-type]

    def iterate(x: Operands, g: Tensor) -> tuple[Tensor, Tensor]:
        """z and c [B, H, M]."""
        # A head without any key has no potentials; an iteration sets out from finite ones, and finds none again.
        g = torch.where((g > -INF).any(-1, keepdim=True), g, 0.0)
        z, after, _ = ops.memory.set_transport(*batch_as_heads(x, g)._replace(reference_relaxation=None), *one)
        return z.view(b, h, m, z.shape[-1]), _less(g, after.view(g.shape))

    def balanced_against(x: Operands, c: Tensor) -> Tensor:
        return potential(reference_mass(x), hyper(x, opt, "reference_relaxation").squeeze(-1), c)

    def after(g: Tensor, *tensors: Tensor | None) -> Tensor:
        x = Operands(*tensors)  # type: ignore[arg-type]
        return balanced_against(x, iterate(narrow(x), g)[1])

    scalars = (*opt.scalars[:3], 1.0, opt.scalars[4])  # λ_b = 1: g − c is what comes out
    one = Options(scalars, opt.kernel, 1, 0.0, dispatch.chosen_for(backend.NAME, backend.NAME))
    with torch.no_grad(), without_autocast(x.key):
        p, kernels = problem(*x)
        start = None if how.start is None else how.start.flatten(0, 1)
        before, iters = _potentials(p, opt.num_iters - 1, how._replace(start=start), kernels)
    g = FixedPoint.apply(Iteration(after, problem), before.view(b, h, m), *x)
    z, c = iterate(x, g)
    g, iters = balanced_against(x, c), (iters + 1).view(b, h)

    def transported() -> Transported:
        with torch.no_grad(), without_autocast(x.key):
            whole = _with_logits(x, opt) if _takes_keys(backend) else p
            f, *_ = backend.started(_problem(whole, 1, None), before)
        of_heads = Marginals(*[t.unflatten(0, (b, h)) for t in whole])
        return Transported(of_heads, Plan(f.view(b, h, f.shape[-1]), g.detach(), c.detach().unsqueeze(-2), iters))

    return z, g, Reached(iters, transported)
