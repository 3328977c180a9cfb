"""The halves of attention: set_read of set_transport is set_attention, and each stands on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import setformer_kernels.functional as SF
from setformer_kernels import dispatch
from setformer_kernels.backends.triton.host.tiles import INTERPRETED
from setformer_kernels.problem import Problem
from setformer_kernels.testing import ALL_CASES, CASES, Case, assert_typically_within_budget, measure
from setformer_kernels.testing.budget import cast
from setformer_kernels.testing.cases import make

B, H, L, S, M, D, E, P = 2, 3, 7, 9, 4, 8, 5, 2
PLAIN_CASES = [case for case in CASES if not case.options.get("causal")]
OPS = torch.ops.setformer_kernels
# Those that Triton's interpreter runs, in float32 and the first in bfloat16 too: the kernels are those of attention.
FEW_CASES = ("plain", "t0", "no_key", "tensors", "dropout", "dot")


def skip_most(native: str, dtype: torch.dtype, case: Case) -> None:
    stays = case.name in FEW_CASES if dtype == torch.float32 else (dtype, case.name) == (torch.bfloat16, FEW_CASES[0])
    if native == "triton" and INTERPRETED and not stays:
        pytest.skip("on the interpreter other cases stand for this one")


def tokens(dtype: torch.dtype = torch.float32, heads: int = H) -> list[Tensor]:
    shapes = ((B, heads, L, D), (B, H, S, D), (B, H, S, E), (H, M, D))
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_the_halves_are_attention_bit_for_bit(
    case: Case, dtype: torch.dtype, native: str, poisoned_memory: None
) -> None:
    skip_most(native, dtype, case)
    given, keywords = make(case)
    inputs = cast(given | keywords, torch.float64 if dtype == torch.float64 else torch.float32, dtype)
    for backend in (native, "reference"):
        with torch.no_grad():
            whole = SF.set_attention(**inputs, backend=backend)
            assert torch.equal(measure.halves(**inputs, backend=backend), whole), backend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_gradients_through_the_halves_within_the_error_budget(case: Case, dtype: torch.dtype, native: str) -> None:
    skip_most(native, dtype, case)
    measure.attention(case, dtype, native, function=measure.halves).check(case.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["log_mass", "tensors", "positionless"])
def test_small_gradients_through_the_halves(name: str, dtype: torch.dtype, native: str) -> None:
    if native == "triton" and INTERPRETED and (dtype != torch.float32 or name != "tensors"):
        pytest.skip("on the interpreter other cases stand for this one")
    draws = 1 if native == "triton" and INTERPRETED else measure.DRAWS
    found = measure.small_gradients(ALL_CASES[name], dtype, native, draws=draws, function=measure.halves)
    assert_typically_within_budget(*found, name)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_potentials_are_those_of_the_definition_and_carry_gradients(T: int, native: str) -> None:
    """A loss on g itself, whose gradient does not sum to 0 as that of a read does."""
    _, k, v, y = tokens()
    masses, lam = torch.randn(H, M, requires_grad=True), torch.rand(H, requires_grad=True)
    mask = torch.randn(B, S)
    mask[0] = -math.inf
    leaves = [k, v, y, masses, lam]
    found = []
    for backend in (native, "reference"):
        z, g = SF.set_transport(
            k, v, y, num_iters=T, key_mask=mask, reference_log_mass=masses, reference_relaxation=lam, backend=backend
        )
        assert z.dtype == g.dtype == torch.float32
        assert (g[0] == -math.inf).all()
        assert (z[0] == 0).all()
        loss = (g[1].square() * torch.arange(1.0, M + 1)).sum() + z.square().sum()
        found.append([z, g, *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_nothing_is_read_where_every_potential_is_absent(native: str) -> None:
    q, _, _, y = tokens()
    z = torch.randn(B, H, M, E, requires_grad=True)
    g = torch.full((B, H, M), -math.inf)
    g[1, 0, 2] = 0.0
    g.requires_grad_()
    o = SF.set_read(q, SF.SetMemory(z, g), y, backend=native)
    torch.testing.assert_close(o[1, 0], z[1, 0, 2].expand(L, E))
    assert (o[0] == 0).all()
    grads = torch.autograd.grad((o * torch.randn(o.shape)).sum(), (q, z, g, y))
    assert all(t.isfinite().all() for t in grads)
    assert (grads[0] == 0).all()
    assert (grads[1][0] == 0).all()
    assert (grads[2] == 0).all()


def operands(op: str) -> list[Any]:
    """Every tensor of an op given."""
    q, k, v, y = tokens(torch.float64)
    wide: dict[str, Any] = {"dtype": torch.float64}
    beta, eps, lam_a, lam_b, tau = (torch.full((H,), x, requires_grad=True, **wide) for x in (1.2, 0.3, 0.8, 0.7, 0.5))
    positions = [torch.randn(1, 1, n, P, **wide).expand(B, H, n, P) for n in (L, S)]
    r_position = torch.randn(H, M, P, requires_grad=True, **wide)
    if op == "set_read":
        z, g = (torch.randn(*s, requires_grad=True, **wide) for s in ((B, H, M, E), (B, H, M)))
        hyper = [beta, eps, tau, positions[0], r_position]
        return [q, z, g, y, *hyper, torch.tensor(5), [1.0] * 5, "rbf", 0.3, "auto"]
    log_a, log_b = (torch.randn(*s, **wide).log_softmax(-1).requires_grad_() for s in ((B, H, S), (H, M)))
    hyper = [beta, eps, lam_a, lam_b, tau]
    return [None, k, v, y, log_a, log_b, *hyper, None, positions[1], r_position, None, [1.0] * 5, "rbf", 3, 0.0, "auto"]


@pytest.mark.parametrize("name", ["set_transport", "set_read"])
def test_opcheck(name: str, native: str) -> None:
    torch.library.opcheck(getattr(OPS, name), tuple(operands(name)))


@pytest.mark.parametrize("name", ["set_transport", "set_read"])
def test_gradcheck(name: str, native: str) -> None:
    arguments = operands(name)
    spots = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def f(*leaves: Tensor) -> Any:
        full = list(arguments)
        for spot, leaf in zip(spots, leaves, strict=True):
            full[spot] = leaf
        out = getattr(OPS, name)(*full)
        return out if isinstance(out, Tensor) else out[:2]

    leaves = [arguments[i].detach().clone().requires_grad_() for i in spots]
    assert torch.autograd.gradcheck(f, leaves, atol=1e-6, nondet_tol=0.0, fast_mode=True)


def test_one_graph_of_the_halves_serves_every_length(native: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = torch.compile(measure.halves, fullgraph=True, dynamic=True, backend=counter)
    for n in (11, 16, 33):
        q, k, v, y = tokens()
        many = [t.repeat(1, 1, n, 1)[:, :, : n + i].detach() for i, t in enumerate((q, k, v))]
        f(many[0], many[1], many[2][:, :, : n + 1], y.detach())
    assert counter.frame_count == 1


def test_compiled_gradients_reach_both_halves(native: str) -> None:
    torch._dynamo.reset()
    leaves, compiled = tokens(heads=2 * H), torch.compile(measure.halves, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*leaves), measure.halves(*leaves)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(o.square().sum(), leaves) for o in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict: bool, native: str) -> None:
    class Reader(torch.nn.Module):
        def forward(self, q: Tensor, z: Tensor, g: Tensor, y: Tensor) -> Tensor:
            return SF.set_read(q, SF.SetMemory(z, g), y)

    q, k, v, y = (t.detach() for t in tokens())
    memory, n = SF.set_transport(k, v, y), torch.export.Dim("n", min=2, max=1000)
    exported = torch.export.export(
        Reader(), (q, *memory, y), dynamic_shapes={"q": {2: n}, "z": None, "g": None, "y": None}, strict=strict
    )
    longer = torch.randn(B, H, 21, D)
    torch.testing.assert_close(exported.module()(longer, *memory, y), SF.set_read(longer, memory, y))


def test_vmap_and_vmap_of_grad_of_the_halves(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    many = torch.stack([q + i for i in range(3)])

    def loss(q: Tensor, k: Tensor, y: Tensor) -> Tensor:
        return measure.halves(q, k, v, y, backend=native).square().sum()

    gradient: Callable[..., Any] = torch.func.grad(loss, argnums=(0, 1, 2))
    found = torch.vmap(gradient, in_dims=(0, None, None))(many, k, y)
    rows = [gradient(one, k, y) for one in many]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))


def test_autocast_casts_tokens_and_leaves_the_memory_wide(native: str) -> None:
    q, k, v, y = tokens()
    with torch.autocast(q.device.type, torch.bfloat16):
        memory = SF.set_transport(k, v, y, backend=native)
        o = SF.set_read(q, memory, y, backend=native)
    assert (memory.z.dtype, memory.g.dtype, o.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert all(t.dtype == torch.float32 for t in torch.autograd.grad(o.float().sum(), (q, k, v, y)))


def test_flop_formulas_are_halves_of_attention(native: str) -> None:
    leaves = tokens()
    with FlopCounterMode(display=False) as halves:
        measure.halves(*leaves).sum().backward()
    with FlopCounterMode(display=False) as whole:
        SF.set_attention(*leaves).sum().backward()
    assert halves.get_total_flops() == whole.get_total_flops() == 2 * B * H * M * (L + S) * (4 * D + 3 * E)


def test_a_read_saves_what_it_was_given_alone(native: str) -> None:
    q, k, v, y = tokens()
    memory = [t.detach().requires_grad_() for t in SF.set_transport(k, v, y, backend=native)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        SF.set_read(q, SF.SetMemory(*memory), y, backend=native)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (q, *memory, y)}


@pytest.mark.parametrize("op", ["transport", "read"])
def test_cuda_says_that_it_has_no_kernel(op: str) -> None:
    problem = Problem(op, "cuda", torch.float32, D, E, M)
    assert f"has no kernel for {op} yet" in dispatch.available_backends(problem)["cuda"]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"memory": None}, TypeError, r"memory must be a SetMemory \(z, g\), got NoneType"),
        ({"z": torch.zeros(B, H, M, E, dtype=torch.float64)}, TypeError, r"memory.z must be torch.float32.*float64"),
        ({"z": torch.zeros(B + 1, H, M, E)}, ValueError, r"memory.z must have shape \[2, \*, \*, \*\] \(B of"),
        ({"z": torch.zeros(B, H, M, 0)}, ValueError, r"memory.z must have E > 0"),
        ({"g": torch.zeros(B, H, M + 1)}, ValueError, r"memory.g must have shape \[2, 3, 4\]"),
        ({"query": torch.zeros(B, 4, L, D)}, ValueError, r"query must have H, a multiple of the 3 heads of the memory"),
        ({"query": torch.zeros(B, H, L, D + 1)}, ValueError, r"references must have shape \[3, 4, 9\]"),
        ({"references": torch.zeros(H, M + 1, D)}, ValueError, r"references must have shape \[3, 4, 8\]"),
        ({"query_position": torch.zeros(L, P)}, ValueError, r"go together: reference_position missing"),
        ({"epsilon": 0.0}, ValueError, r"epsilon must be finite and > 0"),
        ({"dropout_p": 2.0}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ({"backend": "cuda"}, ValueError, r"backend 'cuda' cannot run this call.*no kernel for read"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_a_read(change: dict[str, Any], error: type[Exception], match: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    memory = SF.set_transport(k, v, y)
    memory = memory._replace(**{name: change.pop(name) for name in ("z", "g") if name in change})
    call = {"query": q, "memory": memory, "references": y} | change
    with pytest.raises(error, match=match):
        SF.set_read(**call)  # type: ignore[arg-type]
