"""replace_attention where the weights are not plain parameters: carried over with what computes them, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from setformer_kernels.models import initialize_references, replace_attention
from setformer_kernels.nn import SeTAttention

E, H = 16, 4
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def plain_tensor(name: str) -> Callable[[nn.Module], None]:
    """What adapters do when they merge: the Parameter goes, a tensor stands under its name."""

    def change(module: nn.Module) -> None:
        tensor = getattr(module, name).detach() * 2
        delattr(module, name)
        setattr(module, name, tensor)

    return change


def as_buffer(module: nn.Module) -> None:
    tensor = module.in_proj_weight.detach() * 2
    del module.in_proj_weight
    module.register_buffer("in_proj_weight", tensor)


def halved(module: nn.Module, args: object) -> None:
    module.in_proj_weight = module.raw / 2


def own_hook(module: nn.Module) -> None:
    module.raw = module.in_proj_weight
    del module.in_proj_weight
    module.register_forward_pre_hook(halved)
    halved(module, ())


def pruned_bias(module: nn.Module) -> None:
    nn.init.normal_(module.in_proj_bias)
    prune.random_unstructured(module, "in_proj_bias", amount=0.5)


CHANGES: dict[str, tuple[dict, Callable[[nn.Module], object]]] = {
    "pruned": ({}, lambda a: prune.l1_unstructured(a, "in_proj_weight", amount=0.3)),
    "pruned twice": ({}, lambda a: [prune.random_unstructured(a, "in_proj_weight", amount=0.3) for _ in range(2)]),
    "pruned bias": ({}, pruned_bias),
    "pruned bias_k": ({"add_bias_kv": True}, lambda a: prune.random_unstructured(a, "bias_k", amount=0.5)),
    "pruned k_proj": ({"kdim": 8}, lambda a: prune.random_unstructured(a, "k_proj_weight", amount=0.5)),
    "pruned out_proj": ({}, lambda a: prune.random_unstructured(a.out_proj, "weight", amount=0.5)),
    "weight_norm": ({}, lambda a: nn.utils.weight_norm(a, "in_proj_weight")),
    "weight_norm of v_proj": ({"vdim": 8}, lambda a: nn.utils.weight_norm(a, "v_proj_weight")),
    "weight_norm of out_proj": ({}, lambda a: nn.utils.weight_norm(a.out_proj)),
    "spectral_norm": ({}, lambda a: nn.utils.spectral_norm(a, "in_proj_weight")),
    "parametrized out_proj": ({}, lambda a: parametrizations.weight_norm(a.out_proj)),
    "tensor": ({}, plain_tensor("in_proj_weight")),
    "tensor bias": ({}, plain_tensor("in_proj_bias")),
    "tensor bias_v": ({"add_bias_kv": True}, plain_tensor("bias_v")),
    "tensor in out_proj": ({}, lambda a: plain_tensor("weight")(a.out_proj)),
    "buffer": ({}, as_buffer),
    "hook of one's own": ({}, own_hook),
    "frozen": ({}, lambda a: a.requires_grad_(False)),
}  # fmt: skip


def attention(name: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    options, change = CHANGES[name]
    module = nn.MultiheadAttention(E, H, batch_first=True, **options)
    change(module)
    return nn.ModuleDict({"attn": module})


def call(module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    query = torch.randn(2, 5, E, requires_grad=True)  # of which backward hooks make sure
    return module(query, torch.randn(2, 6, module.kdim), torch.randn(2, 6, module.vdim))[0]


def effective(module: nn.Module) -> dict[str, Tensor]:
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v",
             "out_proj.weight", "out_proj.bias")  # fmt: skip
    found = {}
    for name in names:
        part, _, last = name.rpartition(".")
        value = getattr(module.get_submodule(part), last)
        if value is not None:
            found[name] = value.detach().clone()
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_effective_weights_are_carried_over_with_their_machinery(name: str) -> None:
    model = attention(name)
    call(model["attn"].eval())  # lets hooks compute
    want, state = effective(model["attn"]), model.state_dict()
    parameters = dict(model.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    report = replace_attention(model, num_references=3)
    assert report.replaced == {"attn": "MultiheadAttention"}
    assert isinstance(model["attn"], SeTAttention)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {name for name, parameter in after.items() if not parameter.requires_grad} == frozen
    assert after.keys() - parameters.keys() == {"attn.references"}
    for _ in range(2):  # as they stand, and as the hooks of a forward leave them
        for key, value in effective(model["attn"]).items():
            torch.testing.assert_close(value, want[key], msg=key)
        call(model["attn"])
    assert not model.load_state_dict(state, strict=False).unexpected_keys


@pytest.mark.parametrize("name", ["pruned", "weight_norm", "spectral_norm", "pruned out_proj", "hook of one's own"])
def test_training_goes_through_what_computes_the_weight(name: str) -> None:
    model = attention(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # from before: the parameters stay the same objects
    replace_attention(model, num_references=3)
    before = effective(model["attn"])
    for _ in range(2):
        optimizer.zero_grad()
        call(model["attn"]).square().sum().backward()
        optimizer.step()
    call(model["attn"])
    part = "out_proj.weight" if "out_proj" in name else "in_proj_weight"
    after = effective(model["attn"])[part]
    assert not torch.allclose(after, before[part])
    if name == "pruned":
        assert ((after == 0) >= (before[part] == 0)).all()
        prune.remove(model["attn"], "in_proj_weight")
        torch.testing.assert_close(model["attn"].in_proj_weight.detach(), after)


def other_forward(module: nn.Module) -> None:
    module.forward = lambda *args, **kwargs: args[0]


class Adapted(nn.Module):
    """As an adapter wraps a linear layer: the base's weight under the same name, more in forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "parametrized": (lambda a: parametrizations.weight_norm(a, "in_proj_weight"), "parametrized"),
    "forward": (other_forward, "forward was exchanged"),
    "adapter": (lambda a: setattr(a, "out_proj", Adapted(a.out_proj)), "Adapted whose forward was never called"),
    "spectral_norm out_proj": (lambda a: nn.utils.spectral_norm(a.out_proj), "without the normalisation of its weight"),
    "no weight": (lambda a: delattr(a, "in_proj_weight"), "it has no in_proj_weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_left_with_the_reason(name: str) -> None:
    change, reason = REFUSED[name]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H)})
    change(model["attn"])
    kind, before = type(model["attn"]), set(model.state_dict())
    report = replace_attention(model)
    assert not report.replaced
    assert reason in report.left["attn"]
    assert type(model["attn"]) is kind
    assert set(model.state_dict()) == before


def test_hooks_their_handles_and_every_reference_stay() -> None:
    model, seen = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, batch_first=True)}), []
    module = model["attn"]
    handle = module.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
    module.register_full_backward_hook(lambda *args: seen.append("backward"))
    replace_attention(model, num_references=3)
    assert model["attn"] is module
    with_hook = call(module)
    handle.remove()
    torch.testing.assert_close(with_hook, call(module) + 1)
    with_hook.sum().backward()
    assert seen == ["backward"]


def test_a_shared_module_is_skipped_under_all_its_names() -> None:
    module = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"a": module, "b": module})
    report = replace_attention(model, skip=lambda name, _: name == "b")
    assert report.left == dict.fromkeys(("a", "b"), "skipped by the caller as b")
    assert type(model["a"]) is nn.MultiheadAttention


def test_meta_and_mixed_dtypes() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H)})
    replace_attention(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, dtype=torch.bfloat16)})
    model["attn"].out_proj.float()
    replace_attention(model)
    assert model["attn"].references.dtype == torch.bfloat16
    assert model["attn"].out_proj.weight.dtype == torch.float32


def test_a_model_without_attention_is_told_so() -> None:
    assert str(replace_attention(nn.Sequential(nn.Linear(2, 2)))) == (
        "nothing replaced: no softmax attention was found in the model"
    )


def test_a_replaced_model_copies_and_pickles() -> None:
    model = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    replace_attention(model, num_references=3)
    x = torch.randn(2, 5, E)
    initialize_references(model, x)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_pruned_projections_of_other_libraries_go_on() -> None:
    timm = pytest.importorskip("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=E, depth=1, num_heads=2).eval()
    attn = model.blocks[0].attn
    prune.random_unstructured(attn.qkv, "weight", amount=0.5)
    attn.qkv, attn.proj = Adapted(attn.qkv), Adapted(attn.proj)
    assert replace_attention(model, num_references=3).replaced == {"blocks.0.attn": "Attention"}
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert attn.qkv.base_layer.weight_orig.grad.any()
    assert attn.set_transport.references.shape == (2, 3, E // 2)


def test_adapters_on_bert_go_on() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=E, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32)  # fmt: skip
    model = transformers.BertModel(config).eval()
    layer = model.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        setattr(layer, name, Adapted(getattr(layer, name)))
    report = replace_attention(model, num_references=3)
    assert report.replaced == {"encoder.layer.0.attention.self": "BertSelfAttention"}
    assert layer.set_transport.references.shape == (2, 3, E // 2)
    model(torch.randint(0, 20, (1, 5))).last_hidden_state.sum().backward()
    assert layer.query.base_layer.weight.grad is not None
