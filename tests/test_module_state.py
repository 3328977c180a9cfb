"""Attributes, state and life cycle: what clients of nn.MultiheadAttention read, replace, copy, save and convert."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from nn_helpers import CONSTRUCTIONS, E, H, M, like, tokens, twins
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, prune

import setformer_kernels
from setformer_kernels.nn import SeTAttention, SeTPooling

CLIP_NAMES = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")
ATTRIBUTES = [
    *("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn", "training"),
    *CLIP_NAMES,
    "_qkv_same_embed_dim",
]
EVERYTHING = {
    "value_map": "rkhs", "position_dim": 2, "learn_epsilon": True, "learn_log_mass": True, "num_references": M,
}  # fmt: skip


def full(**arguments) -> SeTAttention:
    torch.manual_seed(0)
    return SeTAttention(E, H, **arguments, **EVERYTHING)


def call(module):
    x = [torch.linspace(-1, 1, 7 * E).reshape(7, 1, E).expand(7, 2, E).to(module.references) for _ in range(3)]
    x = [y + 0.1 * i for i, y in enumerate(x)]
    position = torch.linspace(0, 1, 14).reshape(7, 2).to(module.references)
    return module(*x, query_position=position, key_position=position)[0]


def test_the_package_exports_the_layers():
    assert setformer_kernels.SeTAttention is SeTAttention
    assert setformer_kernels.SeTPooling is SeTPooling


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_attributes_and_parameters_are_torchs(construction):
    module, twin = twins(**construction)
    assert isinstance(module, nn.MultiheadAttention)
    for name in ATTRIBUTES:
        ours, theirs = getattr(module, name), getattr(twin, name)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs), name  # the same seed draws the same projections
        else:
            assert ours == theirs, name
            assert type(ours) is type(theirs), name
    assert type(module.out_proj) is NonDynamicallyQuantizableLinear
    assert torch.equal(module.out_proj.weight, twin.out_proj.weight)
    assert callable(module.merge_masks)
    assert set(module.state_dict()) - set(twin.state_dict()) == {"references"}
    assert set(twin.state_dict()) <= set(module.state_dict())


def test_own_parameters_have_the_documented_shapes():
    module = full()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    D = E // H
    own = {
        "references": (H, M, D), "landmarks": (H, D, D), "log_epsilon": (H,), "reference_log_mass": (H, M),
        "reference_position": (H, M, 2), "position_scale": (H,),
    }  # fmt: skip
    assert {k: shapes[k] for k in own} == own
    torch.testing.assert_close(module.log_epsilon.exp(), torch.full((H,), 0.05))
    torch.testing.assert_close(module.references.norm(dim=-1), torch.ones(H, M))
    torch.testing.assert_close(module.landmarks.norm(dim=-1), torch.ones(H, D))


@pytest.mark.parametrize("construction", CONSTRUCTIONS, ids=str)
def test_a_torch_checkpoint_loads(construction):
    module, twin = twins(**construction)[0], twins(seed=1, **construction)[1]
    result = module.load_state_dict(twin.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["references"]
    assert torch.equal(module.out_proj.weight, twin.out_proj.weight)


def test_fast_path_is_off():
    """A hook is what nn.TransformerEncoderLayer looks for before it runs softmax attention in C++ (trap 1)."""
    for module in (full(), copy.deepcopy(full()), pickle.loads(pickle.dumps(full()))):
        assert len(module._forward_pre_hooks) == 1
        assert module._qkv_same_embed_dim is True
    assert full(kdim=E + 1)._qkv_same_embed_dim is False


def test_copies_give_the_same_output():
    module = full(dropout=0.1).eval()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(call(other), call(module))
        assert repr(other) == repr(module)


def test_state_dict_round_trip():
    module, other = full(), full()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * torch.randn_like(p))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(call(other), call(module))


@pytest.mark.parametrize("build", [SeTAttention, SeTPooling])
def test_skip_init(build):
    module = torch.nn.utils.skip_init(build, E, H, num_references=M)
    assert all(p.device.type == "cpu" for p in module.parameters())
    # torch's MHA, too, leaves out_proj.weight to the reset of nn.Linear
    module.out_proj.reset_parameters()
    module.reset_parameters()
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_meta_then_to_empty_or_assign():
    want = full()
    meta = SeTAttention(E, H, device="meta", **EVERYTHING)
    assert all(p.is_meta for p in meta.parameters())
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    empty.load_state_dict(want.state_dict())
    meta.load_state_dict(want.state_dict(), assign=True)
    assert torch.equal(call(empty), call(want))
    assert torch.equal(call(meta), call(want))
    with torch.device("meta"):
        assert all(p.is_meta for p in SeTAttention(E, H).parameters())


@pytest.mark.parametrize("name", ["reset_parameters", "_reset_parameters"])
def test_reset_covers_every_parameter(name):
    module, fresh = full(add_bias_kv=True), full(add_bias_kv=True)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    # torch leaves out_proj.weight as it is: nn.Linear's own reset draws it
    module.out_proj.reset_parameters()
    torch.manual_seed(3)
    getattr(module, name)()
    for key, p in module.named_parameters():
        assert not (p == 7.0).any(), key
        assert torch.isfinite(p).all(), key
    assert torch.equal(module.log_epsilon, fresh.log_epsilon)


def test_resets_may_be_patched_onto_each_other(monkeypatch):
    monkeypatch.setattr(
        nn.MultiheadAttention, "reset_parameters", nn.MultiheadAttention._reset_parameters, raising=False
    )
    monkeypatch.setattr(SeTAttention, "_reset_parameters", SeTAttention.reset_parameters)
    module = full()
    module.reset_parameters()
    module._reset_parameters()


def test_dtype_and_default_dtype():
    assert {p.dtype for p in SeTAttention(E, H, dtype=torch.bfloat16, **EVERYTHING).parameters()} == {torch.bfloat16}
    torch.set_default_dtype(torch.float64)
    try:
        module = SeTAttention(E, H, **EVERYTHING)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert call(full().double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_names_clip_knows_are_converted(dtype):
    """open_clip's precision conversion casts the attributes of nn.MultiheadAttention that it knows and no others."""
    module = full(add_bias_kv=True)
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
    ):
        if getattr(module, name) is not None:
            getattr(module, name).data = getattr(module, name).data.to(dtype)
    for p in module.out_proj.parameters():
        p.data = p.data.to(dtype)
    assert module.references.dtype == torch.float32
    x = torch.randn(5, 2, E, dtype=dtype)
    position = torch.rand(5, 2)
    output, weights = module(x, x, x, query_position=position, key_position=position)
    assert (output.dtype, weights.dtype) == (dtype, dtype)
    output.float().sum().backward()
    assert module.references.grad.dtype == torch.float32
    assert module.in_proj_weight.grad.dtype == dtype


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_bias_of_another_dtype(batch_first):
    """torch's own tests have one, batch_first."""
    module = twins(batch_first=batch_first, dtype=torch.float64)[0]
    nn.init.normal_(module.in_proj_bias)
    x = tokens(module, dtype=torch.float64)
    bias = module.in_proj_bias.detach().half()
    module.in_proj_bias = nn.Parameter(bias.double())
    want = module(*x)[0]
    module.in_proj_bias = nn.Parameter(bias)
    torch.testing.assert_close(module(*x)[0], want, rtol=0, atol=0)


def test_replaced_in_proj_weight_is_used():
    """peft deletes the parameter and puts a merged tensor under its name; its gradient must flow."""
    module = twins()[0]
    x = tokens(module)
    want = module(*x)[0]
    delta = torch.randn(3 * E, 2), torch.randn(2, E)
    delta = [d.requires_grad_() for d in delta]
    base = module.in_proj_weight
    del module.in_proj_weight
    module.in_proj_weight = base.detach() + delta[0] @ delta[1]
    output = module(*x)[0]
    assert not torch.allclose(output, want)
    output.sum().backward()
    assert all(d.grad.abs().sum() > 0 for d in delta)
    del module.in_proj_weight
    module.register_parameter("in_proj_weight", nn.Parameter(base.detach()))
    assert torch.equal(module(*x)[0], want)


@pytest.mark.parametrize("name", ["in_proj_weight", "references"])
def test_prune(name):
    module = twins()[0]
    x = tokens(module)
    before = module(*x)[0]
    prune.random_unstructured(module, name, amount=0.5)
    assert not torch.allclose(module(*x)[0], before)
    module(*x)[0].sum().backward()
    original = getattr(module, f"{name}_orig")
    assert (original.grad[getattr(module, f"{name}_mask") == 0] == 0).all()
    prune.remove(module, name)
    assert torch.isfinite(module(*x)[0]).all()


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_parametrize():
    module = twins()[0]
    x = tokens(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.in_proj_weight.div_(2)
        other.out_proj.weight.div_(2)
    parametrize.register_parametrization(module, "in_proj_weight", Halve())
    parametrize.register_parametrization(module.out_proj, "weight", Halve())
    torch.testing.assert_close(module(*x)[0], other(*x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation_leaves_the_module_alone():
    model = nn.ModuleDict({"attention": twins()[0], "linear": nn.Linear(E, E)}).eval()
    x = tokens(model["attention"])
    want = model["attention"](*x)[0]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantised["linear"]) is not nn.Linear
    assert type(quantised["attention"].out_proj) is NonDynamicallyQuantizableLinear
    assert torch.equal(quantised["attention"](*x)[0], want)


def test_init_functions_written_for_torch():
    """nn.Transformer draws every parameter with more than one dim; ViTs look for isinstance and fill known names."""
    module = full(add_bias_kv=True)
    nn.Transformer._reset_parameters(module)
    assert isinstance(module, nn.MultiheadAttention)
    nn.init.xavier_uniform_(module.in_proj_weight)
    nn.init.constant_(module.in_proj_bias, 0.0)
    nn.init.xavier_normal_(module.bias_k)
    assert torch.isfinite(call(module)).all()


def test_conversions_reach_every_parameter():
    module = full(add_bias_kv=True)
    assert {p.dtype for p in module.half().parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in module.requires_grad_(False).parameters())
    assert all(p.is_meta for p in module.to("meta").parameters())


def test_twin_weights_carry_over():
    twin = twins(seed=4, batch_first=True, dropout=0.25)[1].eval()
    module = like(twin)
    assert (module.dropout, module.training, module.batch_first) == (0.25, False, True)
    assert torch.equal(module.in_proj_weight, twin.in_proj_weight)
