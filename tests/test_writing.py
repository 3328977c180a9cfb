"""Values written into parameters that are pruned, parametrized, normalised or plain tensors; or a refusal."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from nn_helpers import E, H, M
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from setformer_kernels.models import setformer_nano
from setformer_kernels.models.transport import SetTransport
from setformer_kernels.nn import SeTAttention, SeTPooling
from setformer_kernels.nn.writing import assign

D = E // H
OWN = {"num_references": M, "value_map": "rkhs", "position_dim": 2}
NAMES = ("references", "landmarks", "reference_position")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class OneWay(nn.Module):
    def forward(self, x):
        return 2 * x


class Wrong(Doubled):
    """Its inverse is not one."""

    def right_inverse(self, x):
        return x


def tensor(module, name):
    value = getattr(module, name).detach() * 2
    delattr(module, name)
    setattr(module, name, value)


def buffer(module, name):
    value = getattr(module, name).detach() * 2
    delattr(module, name)
    module.register_buffer(name, value)


def unknown_hook(module, name):
    """Machinery that no one knows: another parameter, and a hook that makes the tensor of it."""
    module.register_parameter(f"{name}_raw", getattr(module, name))
    del module._parameters[name]
    module.register_forward_pre_hook(lambda m, args: setattr(m, name, getattr(m, f"{name}_raw") * 2))
    setattr(module, name, getattr(module, f"{name}_raw").detach() * 2)


WRITABLE = {
    "plain": lambda module, name: None,
    "frozen": lambda module, name: getattr(module, name).requires_grad_(False),
    "pruned": lambda module, name: prune.random_unstructured(module, name, amount=0.3),
    "pruned rows": lambda module, name: prune.random_structured(module, name, amount=1, dim=1),
    "weight_norm": lambda module, name: nn.utils.weight_norm(module, name),
    "weight_norm, whole": lambda module, name: nn.utils.weight_norm(module, name, dim=None),
    "parametrized weight_norm": lambda module, name: parametrizations.weight_norm(module, name),
    "parametrized": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    "tensor": tensor,
    "buffer": buffer,
}
REFUSED = {
    "spectral_norm": lambda module, name: nn.utils.spectral_norm(module, name),
    "parametrized spectral_norm": lambda module, name: parametrizations.spectral_norm(module, name),
    "one way": lambda module, name: parametrize.register_parametrization(module, name, OneWay()),
    "wrong": lambda module, name: parametrize.register_parametrization(module, name, Wrong(), unsafe=True),
    "unknown hook": unknown_hook,
}


def attention():
    return SeTAttention(E, H, batch_first=True, **OWN)


def place(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, position = torch.randn(3, 20, E, generator=generator), torch.rand(20, 2, generator=generator)
    if isinstance(module, SetTransport):
        heads = x.unflatten(-1, (H, D)).transpose(1, 2)
        torch.manual_seed(0)
        module.initialize_references(heads, heads.flip(2))
    else:
        module.initialize_references(x, key_position=position, generator=generator)
    return x, position


def run(module, x, position):
    return module(x, x, x, need_weights=False, query_position=position, key_position=position)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", WRITABLE)
def test_placed_references_reach_what_is_computed(change, name):
    torch.manual_seed(0)
    module, plain = attention(), attention()
    plain.load_state_dict(module.state_dict())
    WRITABLE[change](module, name)
    stores = dict(module.named_parameters())
    x, position = place(module)
    place(plain)
    want = getattr(plain, name).detach()
    if "pruned" in change:
        mask = getattr(module, f"{name}_mask")
        assert not mask.all()
        with torch.no_grad():
            getattr(plain, name).mul_(mask)
        want = getattr(plain, name).detach()
    torch.testing.assert_close(getattr(module, name).detach(), want)
    torch.testing.assert_close(run(module, x, position), run(plain, x, position), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(getattr(module, name).detach(), want)  # as a forward leaves it
    assert all(stores[key] is parameter for key, parameter in module.named_parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_written_is_refused_and_nothing_is_changed(change, name):
    module = attention().eval()
    REFUSED[change](module, name)
    x, position = torch.randn(2, 5, E), torch.rand(5, 2)
    run(module, x, position)  # lets hooks compute
    before = {key: value.clone() for key, value in module.state_dict().items()}
    output = run(module, x, position)
    with pytest.raises(ValueError, match=f"cannot write {name} of .*SeTAttention"):
        place(module)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], msg=key)
    torch.testing.assert_close(run(module, x, position), output)


@pytest.mark.parametrize("kind", ["attention", "pooling", "transport"])
def test_every_reference_set_is_reset_through_pruning(kind):
    module = {
        "attention": lambda: attention(),
        "pooling": lambda: SeTPooling(E, H, **OWN),
        "transport": lambda: SetTransport(H, D, torch.empty(0), {**OWN, "position_dim": 0}),
    }[kind]()
    prune.random_unstructured(module, "references", amount=0.3)
    nn.utils.weight_norm(module, "landmarks")
    before, mask = module.references.clone(), module.references_mask
    place(module)
    placed = module.references.clone()
    module.reset_parameters()
    assert not torch.allclose(placed, before)
    assert not torch.allclose(module.references, placed)
    assert torch.equal(module.references, module.references_orig * mask)
    torch.testing.assert_close(module.references_orig.norm(dim=-1), torch.ones(H, M))
    torch.testing.assert_close(module.landmarks.norm(dim=-1), torch.ones(H, D))


def test_projections_are_reset_through_pruning():
    module = SeTAttention(E, H, add_bias_kv=True)
    prune.random_unstructured(module, "in_proj_weight", amount=0.3)
    nn.utils.weight_norm(module, "bias_k")
    before = module.in_proj_weight.clone(), module.bias_k.clone()
    module.reset_parameters()
    assert not torch.allclose(module.in_proj_weight, before[0])
    assert not torch.allclose(module.bias_k, before[1])
    assert torch.equal(module.in_proj_weight, module.in_proj_weight_orig * module.in_proj_weight_mask)


def test_all_or_none():
    module = nn.Linear(3, 3)
    parametrizations.spectral_norm(module.eval(), "weight")
    bias = module.bias.clone()
    with pytest.raises(ValueError, match="cannot write weight"):
        assign(module, {"bias": torch.ones(3), "weight": torch.randn(3, 3)})
    assert torch.equal(module.bias, bias)


def test_a_layer_s_own_start_survives_copies_and_keeps_no_model_alive():
    model = setformer_nano(num_classes=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.constant_(other.head.fc.bias, 7.0)
        other.head.fc.reset_parameters()
        assert not other.head.fc.bias.any()
        assert type(other.head.fc) is nn.Linear
    gone = weakref.ref(model.head.fc)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
