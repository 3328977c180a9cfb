"""SeTAttention under the tools of PyTorch: compile, export, functional transforms, DDP, autocast, checkpointing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from nn_helpers import CONSTRUCTIONS, B, E, H, L, M, S, tokens, trainable, twins
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from setformer_kernels.nn import SeTAttention

EVERYTHING = {"value_map": "rkhs", "position_dim": 2, "learn_epsilon": True, "learn_log_mass": True}
PAD = torch.arange(S) >= torch.tensor([S, S - 2, S - 4])[:, None]  # [B, S]
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PAD},
    "mask": {"attn_mask": torch.linspace(-1, 1, L * S).reshape(L, S)},
    "both": {"key_padding_mask": PAD, "attn_mask": torch.zeros(B * H, L, S, dtype=torch.bool)},
}


def positions() -> dict[str, torch.Tensor]:
    return {"query_position": torch.rand(L, 2), "key_position": torch.rand(B, S, 2)}


def gradients(module: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(output.square().sum(), list(module.parameters())), strict=True))


def agree(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        # the compilers' own warnings are not under test
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    ("backend", "construction", "own", "call"),
    [
        ("eager", CONSTRUCTIONS[7], EVERYTHING, "both"),
        ("aot_eager", CONSTRUCTIONS[1], {}, "padding"),
        ("aot_eager", CONSTRUCTIONS[3], {"num_iters": 1}, "mask"),
        ("aot_eager", CONSTRUCTIONS[7], EVERYTHING, "no weights"),
    ],
    ids=["eager", "padding", "mask", "everything"],
)
def test_compile_fullgraph(backend, construction, own, call):
    module = twins(own=own, **construction)[0]
    arguments = CALLS[call] | (positions() if own is EVERYTHING else {})
    x = tokens(module)
    output, weights = torch.compile(module, fullgraph=True, backend=backend)(*x, **arguments)
    want, want_weights = module(*x, **arguments)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    assert (weights is None) == (want_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-5)
    agree(gradients(module, output), gradients(module, want))


def test_compile_with_inductor():
    module = twins(batch_first=True)[0]
    x = tokens(module)
    compiled = torch.compile(module, fullgraph=True)
    output = compiled(*x, key_padding_mask=PAD, need_weights=False)[0]
    want = module(*x, key_padding_mask=PAD, need_weights=False)[0]
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
    agree(gradients(module, output), gradients(module, want), 1e-4)


@pytest.mark.parametrize("call", ["self", "padding", "causal"])
def test_one_graph_serves_every_length(call):
    module = twins(batch_first=True, own={"num_iters": 1})[0]
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counting)
    for length, batch in ((9, 4), (13, 3), (33, 5)):
        x = torch.randn(batch, length, E)
        arguments = {"self": {}, "causal": {"is_causal": True}, "padding": {}}[call]
        if call == "padding":
            arguments = {"key_padding_mask": torch.rand(batch, length) < 0.3}
        torch.testing.assert_close(
            compiled(x, x, x, need_weights=False, **arguments)[0],
            module(x, x, x, need_weights=False, **arguments)[0],
            rtol=1e-5,
            atol=1e-5,
        )
    assert len(graphs) == 1


def test_compiled_dropout_matches_its_weights():
    module = trainable(twins(dropout=0.5, bias=False, batch_first=True)[0])
    x = tokens(module, dtype=torch.float64)
    output, A = torch.compile(module, fullgraph=True, backend="aot_eager")(*x, average_attn_weights=False)
    v = (x[2] @ module.in_proj_weight[2 * E :].T).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(module.out_proj((A @ v).transpose(1, 2).flatten(-2)), output)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_export_with_dynamic_lengths(strict, masked):
    module = twins(batch_first=True)[0].eval()
    x = tokens(module)
    batch, queries, keys = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "queries", "keys"))
    arguments = (*x, PAD if masked else None)
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys}, {0: batch, 1: keys} if masked else None)
    program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=strict)
    longer = tokens(module, sizes=(5, 11, 17))
    pad = torch.rand(5, 17) < 0.3 if masked else None
    for got, want in zip(program.module()(*longer, pad), module(*longer, pad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_functional_call():
    module, other = twins()[0], twins(seed=1)[0]
    x = tokens(module)
    got = functional_call(module, dict(other.named_parameters()), x)[0]
    torch.testing.assert_close(got, other(*x)[0])


@pytest.mark.parametrize("call", CALLS)
def test_ensembles_by_vmap(call):
    models = [twins(seed=i, own={"num_iters": 2})[0] for i in range(3)]
    x = tokens(models[0])
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def one(p, b):
        output, weights = functional_call(base, (p, b), x, CALLS[call])
        return output if weights is None else (output, weights)

    outputs = vmap(one)(parameters, buffers)
    for i, model in enumerate(models):
        want = model(*x, **CALLS[call])
        got = (outputs[i], None) if call == "no weights" else (outputs[0][i], outputs[1][i])
        for g, w in zip(got, want, strict=True):
            if w is not None:
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", [True, False], ids=["batch of one", "unbatched"])
@pytest.mark.parametrize("padded", [True, False])
def test_per_sample_gradients(batched, padded):
    module = twins(batch_first=True, own={"num_iters": 2})[0]
    x = tokens(module)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(p, q, k, v, pad):
        q, k, v, pad = ((y.unsqueeze(0) if batched else y) for y in (q, k, v, pad))
        arguments = {"key_padding_mask": pad if padded else None, "need_weights": False}
        return functional_call(module, p, (q, k, v), arguments)[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *x, PAD)
    for b in range(B):
        mask = PAD[b : b + 1] if padded else None
        want = gradients(module, module(*(y[b : b + 1] for y in x), key_padding_mask=mask, need_weights=False)[0])
        agree({name: g[b] for name, g in got.items()}, want)


@pytest.mark.parametrize(("randomness", "equal"), [("same", True), ("different", False)])
def test_dropout_in_an_ensemble(randomness, equal):
    module = twins(dropout=0.5)[0]
    x = tokens(module)
    copies = {name: p.detach().expand(2, *p.shape) for name, p in module.named_parameters()}
    outputs = vmap(lambda p: functional_call(module, p, x)[0], randomness=randomness)(copies)
    assert torch.allclose(outputs[0], outputs[1]) == equal


@pytest.mark.parametrize("call", ["self", "padding", "causal"])
def test_work_grows_linearly_with_length(call):
    module = SeTAttention(E, H, num_references=M, num_iters=1 if call == "causal" else 3, batch_first=True)

    def flops(length: int) -> int:
        x = torch.randn(2, length, E, requires_grad=True)
        pad = torch.arange(length).expand(2, -1) > length - 3 if call == "padding" else None
        with FlopCounterMode(display=False) as counter:
            module(x, x, x, pad, need_weights=False, is_causal=call == "causal")[0].sum().backward()
        return counter.get_total_flops()

    assert flops(512) - flops(256) == 2 * (flops(256) - flops(128)) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout(reentrant):
    module = twins(dropout=0.3)[0]
    x = [y.requires_grad_() for y in tokens(module)]
    results = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        output = checkpoint(module, *x, use_reentrant=reentrant)[0] if wrapped else module(*x)[0]
        module.zero_grad()
        output.square().sum().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    agree(results[1][1], results[0][1])


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("num_iters", [0, 3])
def test_every_parameter_is_used_in_every_call(construction, call, num_iters):
    """DDP waits for the gradient of each; None would hang it."""
    module = twins(own=EVERYTHING | {"num_iters": num_iters}, **construction)[0]
    module(*tokens(module), **positions(), **CALLS[call])[0].square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = twins(dropout=0.1, own=EVERYTHING)[0]
        x, p = tokens(module), positions()
        want = gradients(module.eval(), module(*x, **p)[0])
        parallel = DistributedDataParallel(module)
        for _ in range(2):
            module.zero_grad()
            parallel(*x, **p)[0].square().sum().backward()
        agree({name: q.grad for name, q in module.named_parameters()}, want)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_bfloat16_autocast(construction):
    module, twin = twins(own=EVERYTHING, **construction)[0], twins(**construction)[1]
    x, p = tokens(module), positions()
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = module(*x, **p)
        assert output.dtype == twin(*x)[0].dtype == torch.bfloat16
    assert torch.isfinite(weights).all()
    scale = module(*x, **p)[0].abs().max()
    torch.testing.assert_close(output.float(), module(*x, **p)[0], rtol=0.1, atol=0.1 * scale.item())
    output.float().square().sum().backward()
    assert {q.grad.dtype for q in module.parameters()} == {torch.float32}


def test_deterministic_algorithms():
    module = twins(batch_first=True, dropout=0.2)[0]
    x = tokens(module)
    torch.use_deterministic_algorithms(True)
    try:
        module.initialize_references(torch.randn(B, 20, E), generator=torch.Generator().manual_seed(0))
        results = []
        for _ in range(2):
            torch.manual_seed(7)
            results.append(gradients(module, module(*x, key_padding_mask=PAD)[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(results[0][name], g) for name, g in results[1].items())


def test_double_backward_on_the_reference():
    own = {"backend": "reference", "num_references": 3, "num_iters": 2, "epsilon": 0.5}
    module = trainable(twins(own=own)[0])
    x = [y.requires_grad_() for y in tokens(module, sizes=(1, 2, 3), dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *y: module(*y, need_weights=False)[0][:, 0, :3], x, fast_mode=True)


def test_jvp_on_the_reference():
    module = trainable(twins(own={"backend": "reference"})[0])
    x = tokens(module, dtype=torch.float64)
    step = tuple(torch.randn_like(y) for y in x)
    value, tangent = jvp(lambda *y: module(*y)[0], x, step)
    h = 1e-6
    ahead, behind = (module(*(y + s * h * d for y, d in zip(x, step, strict=True)))[0] for s in (1, -1))
    torch.testing.assert_close(value, module(*x)[0])
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("construction", [CONSTRUCTIONS[0], CONSTRUCTIONS[7]], ids=str)
def test_gradients_of_every_parameter_are_right(construction):
    """Against finite differences, in float64, with every option on."""
    module = trainable(twins(own=EVERYTHING | {"num_iters": 2, "epsilon": 0.5}, **construction)[0])
    x, p = tokens(module, dtype=torch.float64), {k: v.double() for k, v in positions().items()}
    names = [name for name, _ in module.named_parameters()]

    def output(*values):
        return functional_call(module, dict(zip(names, values, strict=True)), x, {**p, "need_weights": False})[0]

    values = [q.detach().requires_grad_() for q in module.parameters()]
    assert torch.autograd.gradcheck(output, values, fast_mode=True)


def test_module_on_the_default_device_context():
    with torch.device("meta"):
        module = SeTAttention(E, H, num_references=M)
    x = tokens(module.to_empty(device="meta"))
    assert module(*(y.to("meta") for y in x))[0].shape == (L, B, E)
