"""The ops under every tool of PyTorch they are promised to work with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import setformer_kernels.functional as SF
from setformer_kernels import ops

B, H, L, S, M, D, E, P = 2, 3, 7, 9, 4, 8, 5, 2
OPS = torch.ops.setformer_kernels


def tokens(dtype: torch.dtype = torch.float64, length: int = L, keys: int = S) -> list[Tensor]:
    shapes = ((B, H, length, D), (B, H, keys, D), (B, H, keys, E), (H, M, D))
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def hyper() -> list[Tensor]:
    return [torch.full((H,), x, dtype=torch.float64, requires_grad=True) for x in (1.2, 0.3, 0.8, 0.7, 0.5)]


def operands(causal: bool = False, pool: bool = False) -> list[Any]:
    """Every tensor of an op given, dropout too."""
    q, k, v, y = tokens(keys=L if causal else S)
    s = k.shape[2]
    log_a = torch.randn(B, H, s, dtype=torch.float64).log_softmax(-1).requires_grad_()
    log_b = torch.randn(H, M, dtype=torch.float64).log_softmax(-1).requires_grad_()
    q_position = None if pool else torch.randn(1, 1, L, P, dtype=torch.float64).expand(B, H, L, P)
    k_position = torch.randn(B, 1, s, P, dtype=torch.float64).expand(B, H, s, P)
    r_position = torch.randn(H, M, P, dtype=torch.float64, requires_grad=True)
    seed = None if pool else torch.tensor(5)
    tensors = [None if pool else q, k, v, y, log_a, log_b, *hyper(), q_position, k_position, r_position]
    constants = [[1.0] * 5, "rbf", 1 if causal else 3, 0.0 if pool else 0.3, "auto"]
    return [*tensors, seed, *constants]


def causal_arguments() -> list[Any]:
    """Gates and a state before the first key, beside all else; its gradient is looked at in tests/test_streaming.py."""
    tensors, constants = operands(causal=True)[:-5], operands(causal=True)[-5:]
    decay = (-torch.rand(B, H, L, dtype=torch.float64)).requires_grad_()
    sums = torch.rand(B, H, M, E + 1, dtype=torch.float64) + 1
    state = torch.cat((sums, torch.zeros_like(sums), torch.ones(B, H, M, 1, dtype=torch.float64)), -1)
    return [*tensors, decay, state, *constants, True]


def step_arguments() -> list[Any]:
    """Two tokens on three states, one of which nobody continues."""
    given = [a.detach() if isinstance(a, Tensor) else a for a in causal_arguments()]
    at = (0, 1, 2, 4, 11, 12, 15)  # what has a length
    given = [a[:, :, :1] if i in at else a for i, a in enumerate(given)]
    given[14] = None  # no dropout
    given[20] = 0.0
    state = torch.cat((given[16], given[16][:1]))
    return [state, *given[:16], torch.tensor([2, 0], dtype=torch.int32), *given[17:-1]]


def masked_arguments() -> list[Any]:
    """A float mask for every head, beside all else that is differentiable."""
    mask = torch.randn(1, H, L, S, dtype=torch.float64)
    mask[..., ::3] = -math.inf
    tensors, constants = operands()[:-5], operands()[-5:]
    return [*tensors, mask.requires_grad_(), *constants, True]


def packed_arguments(causal: bool = False, pool: bool = False) -> list[Any]:
    """Three segments, one of them without keys, and a row behind them; log masses that are not normalised."""
    full = operands(causal, pool)
    tensors = [t[:1] if isinstance(t, Tensor) and t.ndim > 2 and t.shape[0] == B else t for t in full[:-5]]
    tensors = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.requires_grad else t for t in tensors]
    keys = torch.tensor([0, 3, 3, L - 1])
    if causal:
        decay, state = (t[:1] for t in causal_arguments()[15:17])
        decay = decay.detach().clone().requires_grad_()
        return [*tensors, decay, torch.cat((state, state, state)), keys, *full[-5:], True]
    offsets = [keys] if pool else [torch.tensor([0, 2, 4, L - 1]), keys]
    return [*tensors, *offsets, *full[-5:]]


def feature_arguments() -> list[Any]:
    x = torch.randn(B, L, H, D, dtype=torch.float64).transpose(1, 2).requires_grad_()
    return [x, torch.randn(H, 6, D, dtype=torch.float64, requires_grad=True), hyper()[0], 1.0, 1e-3, True, "auto"]


def sinkhorn_arguments() -> list[Any]:
    l = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    log_a = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(4, dtype=torch.float64, requires_grad=True)
    return [l, log_a, None, lam, None, [1.0, 0.9], 5, 1e-3, "auto"]


ARGUMENTS: dict[str, Callable[[], list[Any]]] = {
    "set_attention": operands,
    "set_pool": functools.partial(operands, pool=True),
    "set_causal": causal_arguments,
    "set_masked": masked_arguments,
    "set_attention_weights": lambda: [*operands(), True],
    "set_attention_varlen": packed_arguments,
    "set_pool_varlen": functools.partial(packed_arguments, pool=True),
    "set_causal_varlen": functools.partial(packed_arguments, causal=True),
    "nystrom_features": feature_arguments,
    "sinkhorn": sinkhorn_arguments,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str, native: str) -> None:
    torch.library.opcheck(getattr(OPS, name), tuple(ARGUMENTS[name]()))


def test_opcheck_of_a_step(native: str) -> None:
    torch.library.opcheck(OPS.set_step, tuple(step_arguments()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_gradcheck(name: str, native: str) -> None:
    arguments = ARGUMENTS[name]()
    spots = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    differentiable = {
        "set_attention_weights": (0, 3, 4),
        "sinkhorn": (0, 1),
        "set_causal": (0, 1),
        "set_causal_varlen": (0, 1),
    }.get(name, (0,))

    def f(*leaves: Tensor) -> Any:
        full = list(arguments)
        for spot, leaf in zip(spots, leaves, strict=True):
            full[spot] = leaf
        out = getattr(OPS, name)(*full)
        return out if isinstance(out, Tensor) else tuple(out[i] for i in differentiable)

    leaves = [arguments[i].detach().clone().requires_grad_() for i in spots]
    assert torch.autograd.gradcheck(f, leaves, atol=1e-6, nondet_tol=0.0, fast_mode=True)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "num_iters": 1},
    "masked": {"causal": True, "num_iters": 2},
    "dropout": {"dropout_p": 0.2},
    "tensor_epsilon": {"epsilon": torch.full((H,), 0.1)},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_with_dynamic_lengths(call: str, dynamic: bool, native: str) -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return SF.set_attention(q.sin(), k, v, y, key_mask=mask, **CALLS[call]).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11):
        inputs = [*tokens(torch.float32, n, n), torch.rand(B, n) < 0.9]
        torch.manual_seed(3)
        found = compiled(*inputs)
        grads = torch.autograd.grad(found.sum(), inputs[:4])
        torch.manual_seed(3)
        wanted = f(*inputs)
        if call != "dropout":  # compiled code draws its seed elsewhere in the stream
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(grads, torch.autograd.grad(wanted.sum(), inputs[:4]))


def test_one_graph_serves_every_length(native: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = torch.compile(lambda q, k, v, y: SF.set_attention(q, k, v, y), fullgraph=True, dynamic=True, backend=counter)
    for n in (11, 16, 33, 70):
        f(*(t.detach() for t in tokens(torch.float32, n, n + 1)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_does_not_specialise_on_the_length(causal: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = torch.compile(
        lambda q, k, v, y: SF.set_attention(q, k, v, y, backend="reference", causal=causal, num_iters=3),
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    for n in (11, 16, 33):
        f(*(t.detach() for t in tokens(torch.float32, n, n)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict: bool, native: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
            return SF.set_attention(q, k, v, y)

    n = torch.export.Dim("n", min=2, max=1000)
    inputs = [t.detach() for t in tokens(torch.float32, 16, 16)]
    shapes = {name: {2: n} for name in "qkv"} | {"y": None}
    exported = torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes, strict=strict)
    other = [t.detach() for t in tokens(torch.float32, 21, 21)]
    torch.testing.assert_close(exported.module()(*other), SF.set_attention(*other))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_a_mask(dynamic: bool, native: str) -> None:
    torch._dynamo.reset()

    def f(q: Tensor, k: Tensor, v: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return SF.set_attention(q, k, v, y, attn_mask=mask, num_iters=2)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11, 70):
        inputs = [*tokens(torch.float32, n, n + 1), torch.randn(n, n + 1, requires_grad=True)]
        found, wanted = compiled(*inputs), f(*inputs)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(o.square().sum(), inputs) for o in (found, wanted)]
        torch.testing.assert_close(*grads)


IN_DIMS = [(0, 0, 0, None), (0, 0, 0, 0), (None, 0, None, 0), (None, None, None, 0), (1, 2, 0, None)]


@pytest.mark.parametrize("call", ["plain", "causal", "masked", "tensor_epsilon"])
@pytest.mark.parametrize("dims", IN_DIMS)
def test_vmap_and_vmap_of_grad(dims: tuple[int | None, ...], call: str, native: str) -> None:
    n = 7
    inputs = [t.detach() for t in tokens(keys=n)]
    inputs = [
        t if d is None else torch.stack([t + i * torch.randn_like(t) for i in range(4)], d)
        for t, d in zip(inputs, dims, strict=True)
    ]

    def f(q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return SF.set_attention(q, k, v, y, backend=native, **CALLS[call])

    def loss(*t: Tensor) -> Tensor:
        return f(*t).square().sum()

    for function in (f, torch.func.grad(loss, argnums=(0, 1, 2, 3))):
        found = torch.vmap(function, in_dims=dims)(*inputs)
        rows = [
            function(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True))) for i in range(4)
        ]
        wanted = torch.stack(rows) if isinstance(found, Tensor) else tuple(map(torch.stack, zip(*rows, strict=True)))
        torch.testing.assert_close(found, wanted)


def test_vmap_of_pool_features_and_sinkhorn(native: str) -> None:
    _, k, v, _ = (t.detach() for t in tokens())
    w = torch.randn(3, H, 5, D, dtype=torch.float64)
    found = torch.vmap(lambda y: SF.set_pool(k, v, y, backend=native))(w)
    torch.testing.assert_close(found, torch.stack([SF.set_pool(k, v, y, backend=native) for y in w]))
    found = torch.vmap(lambda w: SF.nystrom_features(k, w, backend=native))(w)
    torch.testing.assert_close(found, torch.stack([SF.nystrom_features(k, y, backend=native) for y in w]))
    l = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    grad = torch.func.grad(lambda l: SF.sinkhorn(l, num_iters=4, backend=native)[0].square().sum())
    torch.testing.assert_close(torch.vmap(grad)(l), torch.stack([grad(x) for x in l]))


@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 1)])
def test_vmap_with_a_mask(batched: tuple[int | None, int | None], native: str) -> None:
    """Masks are not folded into the heads, which those they are shared by would multiply."""
    q, k, v, y = (t.detach() for t in tokens())
    mask = torch.randn(L, S, dtype=torch.float64)
    inputs = [
        t if d is None else torch.stack([t + i * torch.randn_like(t) for i in range(3)], d)
        for t, d in zip((q, mask), batched, strict=True)
    ]

    def loss(q: Tensor, mask: Tensor) -> Tensor:
        return SF.set_attention(q, k, v, y, attn_mask=mask, num_iters=2, backend=native).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    found = torch.vmap(gradient, in_dims=batched)(*inputs)
    rows = [
        gradient(*(t if d is None else t.select(d, i) for t, d in zip(inputs, batched, strict=True))) for i in range(3)
    ]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*rows, strict=True))))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness: str, native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    batch = q.expand(3, *q.shape)
    o = torch.vmap(lambda q: SF.set_attention(q, k, v, y, dropout_p=0.5, backend=native), randomness=randomness)(batch)
    assert (torch.equal(o[0], o[1])) == (randomness == "same")


def test_double_backward_is_refused_never_zero(native: str) -> None:
    leaves = tokens()
    (grad,) = torch.autograd.grad(
        SF.set_attention(*leaves, backend=native).square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
        torch.autograd.grad(grad.sum(), leaves[:1])


def test_forward_mode_is_refused_never_zero(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    with pytest.raises(RuntimeError, match=r"forward-mode derivative.*backend='reference'"):
        torch.func.jvp(lambda q: SF.set_attention(q, k, v, y, backend=native), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivative"):
        SF.set_attention(torch.autograd.forward_ad.make_dual(q, q), k, v, y, backend=native)


def test_autocast_runs_and_returns_bfloat16(native: str) -> None:
    leaves = tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = SF.set_attention(*leaves, backend=native)
        z = SF.set_pool(*leaves[1:], backend=native)
        assert SF.set_attention_weights(leaves[0], leaves[1], leaves[3], backend=native).dtype == torch.bfloat16
    assert o.dtype == z.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(o.sum() + z.sum(), leaves))


def test_autocast_casts_before_dtypes_are_compared(native: str) -> None:
    """Rotated queries and keys are float32 under autocast, where values are what a linear layer left."""
    q, k, v, y = (t.detach() for t in tokens(torch.float32))
    half = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        o, wanted = (SF.set_attention(q, k, values, y, backend=native) for values in (half, v))
        assert torch.equal(o, wanted)
        assert SF.set_pool(k, half, y, backend=native).dtype == torch.bfloat16
        assert SF.set_transport(k, half, y, backend=native).z.dtype == torch.float32
    with pytest.raises(TypeError, match="value must have the dtype of key"):
        SF.set_attention(q, k, half, y, backend=native)


def test_gradients_keep_their_tensors_dtypes(native: str) -> None:
    q, k, v = (torch.randn(B, H, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (L, S, S))
    y = torch.randn(H, M, 8, dtype=torch.float64, requires_grad=True)
    epsilon = torch.full((H,), 0.1, dtype=torch.float16, requires_grad=True)
    o = SF.set_attention(q, k, v, y, epsilon=epsilon, backend=native)
    for leaf, grad in zip(
        (q, k, v, y, epsilon), torch.autograd.grad(o.float().sum(), (q, k, v, y, epsilon)), strict=True
    ):
        assert grad.dtype == leaf.dtype


def test_flop_formulas_count_products(native: str) -> None:
    leaves = tokens(torch.float32)
    with FlopCounterMode(display=False) as counter:
        SF.set_attention(*leaves, backend="auto").sum().backward()
    forward, backward = 2 * B * H * M * (L + S) * (D + E), 2 * B * H * M * (L + S) * (3 * D + 2 * E)
    assert counter.get_total_flops() == forward + backward


def test_flop_formula_of_masks_counts_pairs(native: str) -> None:
    leaves = tokens(torch.float32)
    with FlopCounterMode(display=False) as counter:
        SF.set_attention(*leaves, attn_mask=torch.rand(L, S) < 0.5, num_iters=3, backend="auto").sum().backward()
    tokens_, pairs = 2 * B * H * M * (L + S) * D, 2 * B * H * L * S
    assert counter.get_total_flops() == tokens_ * (1 + 3) + pairs * (6 * M + E + 18 * M + 2 * E)


def test_only_what_the_definition_lists_is_saved(native: str) -> None:
    leaves = tokens(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        SF.set_attention(*leaves, num_iters=3, backend=native)
    extra = [t.shape for t in saved if not any(t.data_ptr() == leaf.data_ptr() for leaf in leaves)]
    assert sorted(map(tuple, extra)) == sorted([(B, H, M, E), (B, H, 3, M)])


def test_meta_tensors_have_the_right_shapes() -> None:
    q, k, v, y = (t.detach().to("meta") for t in tokens(torch.float32))
    assert SF.set_attention(q, k, v, y).shape == (B, H, L, E)
    assert ops.attention.set_pool(None, k, v, y, *[None] * 11, [1.0] * 5, "rbf", 3, 0.0, "auto")[1].shape == (
        B,
        H,
        3,
        M,
    )


def test_dropout_is_the_same_on_every_backend_and_in_the_weights(native: str) -> None:
    q, k, v, y = (t.detach() for t in tokens())
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor(11)}
    o = SF.set_attention(q, k, v, y, backend=native, **options)
    torch.testing.assert_close(o, SF.set_attention(q, k, v, y, backend="reference", **options))
    torch.testing.assert_close(SF.set_attention_weights(q, k, y, **options) @ v, o)
    assert (SF.set_attention(q, k, v, y, dropout_p=1.0, backend=native) == 0).all()


def test_no_random_number_is_drawn_without_dropout(native: str) -> None:
    leaves = tokens()
    state = torch.get_rng_state()
    SF.set_attention(*leaves, backend=native).sum().backward()
    assert torch.equal(state, torch.get_rng_state())
    assert math.isfinite(leaves[0].grad.sum().item())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nodes_carry_the_name_of_the_op(name: str, native: str) -> None:
    arguments = ARGUMENTS[name]()
    leaf = next(a for a in arguments if isinstance(a, Tensor) and a.requires_grad)
    out = getattr(OPS, name)(*arguments)
    o = out if isinstance(out, Tensor) else out[0]
    assert o.grad_fn is not None
    assert o.grad_fn.name() == f"{name}Backward"
    with torch.autograd.profiler.profile() as profile:
        (grad,) = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)
    assert f"{name}Backward" in {event.name for event in profile.function_events}
    nodes = [grad.grad_fn]
    while (node := nodes[-1]).name() != f"{name}_backwardBackward":
        nodes.append(node.next_functions[0][0])


def test_errors_of_autograd_name_the_op(native: str) -> None:
    leaves = tokens(torch.float32)
    o = SF.set_attention(*leaves, backend=native)
    norm = o.square().sum()
    o.detach().mul_(2)
    with pytest.raises(RuntimeError, match="output 0 of set_attention,"):
        norm.backward()
