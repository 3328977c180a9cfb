"""NumPy scalars, 0-d arrays and 0-d tensors where Python numbers are meant; what is none, refused where it is given."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nn_helpers import E, H, M
from torch import nn

import setformer_kernels.functional as SF
from setformer_kernels.models import SeTformer, TextEncoder
from setformer_kernels.models.layers import DropPath
from setformer_kernels.models.transport import SetTransport
from setformer_kernels.nn import SeTAttention, SeTPooling

KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numpy": (np.int64, np.float64, np.bool_),
    "small": (np.uint8, np.float16, np.bool_),
    "array": (np.array, np.array, np.array),
    "tensor": (torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64), torch.tensor),
}


def convert(value: Any, kind: str) -> Any:
    """A Python number, text or sequence of numbers as one of `KINDS`."""
    whole, real, truth = KINDS[kind]
    if isinstance(value, (tuple, list)):
        return [convert(v, kind) for v in value]
    if isinstance(value, str):
        return np.str_(value)
    return {bool: truth, int: whole, float: real}.get(type(value), lambda x: x)(value)


OWN = {
    "num_references": M, "num_iters": 2, "epsilon": 0.125, "bandwidth": 2.0, "kernel": "rbf", "value_map": "rkhs",
    "position_dim": 2, "learn_epsilon": True, "learn_log_mass": True, "key_relaxation": 0.5,
    "reference_relaxation": 0.25, "backend": "auto", "position_scale": 4.0, "tol": 0.125, "method": "sinkhorn",
    "grad": "implicit",
}  # fmt: skip
BUILDS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "attention": (
        SeTAttention,
        {
            "embed_dim": E, "num_heads": H, "num_kv_heads": H // 2, "dropout": 0.5, "bias": True, "add_bias_kv": True,
            "add_zero_attn": True, "kdim": 10, "vdim": 12, "batch_first": True, **OWN,
        },
    ),
    "pooling": (SeTPooling, {"embed_dim": E, "num_heads": H, "bias": False, **OWN}),
    "transport": (lambda **own: SetTransport(H, E // H, torch.zeros(()), own), OWN),
    "drop path": (DropPath, {"rate": 0.5}),
    "vision": (
        SeTformer,
        {
            "widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "mlp_ratio": 2.0,
            "num_references": M, "in_channels": 3, "num_classes": 5, "pool": "set", "pool_references": 2,
            "out_indices": (0, 1, 2, 3), "dropout": 0.5, "drop_path_rate": 0.5, "layer_scale": 0.25,
            "position_scale": 4.0,
        },
    ),
    "text": (
        TextEncoder,
        {
            "vocab_size": 20, "width": E, "depth": 1, "num_heads": H, "hidden": 8, "num_references": M,
            "max_positions": 9, "type_vocab_size": 2, "pad_token_id": 0, "dropout": 0.5, "position_scale": 4.0,
            "layer_norm_eps": 0.0001,
        },
    ),
}  # fmt: skip


def facts(module: nn.Module) -> list[tuple[str, str, type, Any]]:
    """Every number, text and sequence of them that the modules keep, by name and with its type."""
    return [
        (name, key, type(value), value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if not isinstance(value, (dict, set, nn.Module, torch.Tensor, Callable)) and not key.startswith("__")  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constructor_keeps_python_numbers(build, kind):
    make, arguments = BUILDS[build]
    torch.manual_seed(0)
    want = make(**arguments)
    torch.manual_seed(0)
    given = {name: convert(value, kind) for name, value in arguments.items()}
    if build == "text" and kind == "small":
        given["layer_norm_eps"] = np.float64(0.0001)  # half precision has no such number
    got = make(**given)
    assert facts(got) == facts(want)
    assert repr(got) == repr(want)
    for ours, theirs in zip(got.state_dict().values(), want.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert facts(pickle.loads(pickle.dumps(copy.deepcopy(got)))) == facts(want)


def test_every_argument_of_the_attention_is_converted():
    assert set(BUILDS["attention"][1]) == set(inspect.signature(SeTAttention).parameters) - {"device", "dtype"}


@pytest.mark.parametrize("kind", KINDS)
def test_modules_run_with_attributes_that_were_set_later(kind):
    whole, real, _ = KINDS[kind]
    module, x = SeTAttention(E, H, num_references=M, epsilon=0.125, num_iters=2), torch.randn(5, 2, E)
    want = module(x, x, x)[0]
    module.num_iters, module.epsilon, module.dropout = whole(2), real(0.125), real(0.0)
    torch.testing.assert_close(module(x, x, x)[0], want)
    module.initialize_references(x, num_iters=whole(1), init=np.str_("random"))


SCALARS = {
    "bandwidth": 2.0, "epsilon": 0.125, "num_iters": 2, "key_relaxation": 0.5, "reference_relaxation": 0.25,
    "position_scale": 2.0, "kernel": "rbf",
}  # fmt: skip


def calls(backend: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    torch.manual_seed(0)
    q, y = torch.randn(2, H, 5, 4), torch.randn(H, M, 4)
    where = {name: torch.rand(n, 2) for name, n in (("query_position", 5), ("key_position", 5))}
    where |= {"reference_position": torch.rand(H, M, 2)}
    seed, key = (
        torch.tensor(3),
        {"key_position": where["key_position"], "reference_position": where["reference_position"]},
    )
    common = SCALARS | {"backend": backend}
    return {
        "attention": (
            lambda **o: SF.set_attention(q, q, q, y, seed=seed, **where, **o),
            common | {"dropout_p": 0.5, "causal": False},
        ),
        "causal": (
            lambda **o: SF.set_attention(q, q, q, y, **where, **o),
            common | {"causal": True, "num_iters": 1},
        ),
        "dense": (lambda **o: SF.set_attention(q, q, q, y, **where, **o), common | {"causal": True}),
        "weights": (
            lambda **o: SF.set_attention_weights(q, q, y, seed=seed, **where, **o),
            common | {"dropout_p": 0.5, "causal": True},
        ),
        "pool": (lambda **o: SF.set_pool(q, q, y, **key, **o), common),
        "features": (
            lambda **o: SF.nystrom_features(q, y, **o),
            {"bandwidth": 2.0, "ridge": 0.125, "center": True, "backend": backend},
        ),
        "sinkhorn": (
            lambda **o: torch.cat(SF.sinkhorn(q, **o), -1),
            {"num_iters": 4, "tol": 0.125, "key_relaxation": 0.5, "reference_relaxation": 0.25, "backend": backend},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls("auto"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_functions_take_them(name, kind, backend):
    function, options = calls(backend)[name]
    got = function(**{key: convert(value, kind) for key, value in options.items()})
    torch.testing.assert_close(got, function(**options), rtol=1e-4, atol=1e-5)


def test_a_0d_hyperparameter_keeps_its_gradient():
    function, options = calls("auto")["attention"]
    epsilon = torch.tensor(0.125, requires_grad=True)
    function(**options | {"epsilon": epsilon}).square().sum().backward()
    assert epsilon.grad != 0


NO_INTEGERS = [2.0, np.float64(2.0), True, np.True_, "2", None, torch.tensor(2.0), torch.tensor([2]), np.array([2]), 2j]
NO_NUMBERS = [True, np.bool_(False), "0.5", None, torch.tensor(True), torch.tensor([0.5]), np.array([0.5]), 0.5j,
              np.complex64(0.5), torch.tensor(0.5, requires_grad=True)]  # fmt: skip
OUTSIDE = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.array(np.inf), torch.tensor(float("nan"))]


@pytest.mark.parametrize("name", ["embed_dim", "num_heads", "kdim", "num_references", "num_iters", "position_dim"])
@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_integers(name, value):
    if name == "kdim" and value is None:
        pytest.skip("None is embed_dim")
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        SeTAttention(**{"embed_dim": E, "num_heads": H, name: value})


@pytest.mark.parametrize(
    "name", ["dropout", "epsilon", "bandwidth", "key_relaxation", "reference_relaxation", "position_scale"]
)
@pytest.mark.parametrize("value", [*NO_NUMBERS, *OUTSIDE], ids=repr)
def test_no_numbers(name, value):
    error = ValueError if any(value is other for other in OUTSIDE) else TypeError
    with pytest.raises(error, match=f"{name} must be"):
        SeTAttention(E, H, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.5, np.float32(2), np.array(-1.0), torch.tensor(1.01)], ids=repr)
def test_dropout_is_checked_when_built(value):
    """Not first in a training step."""
    for build in (lambda: SeTAttention(E, H, value), lambda: TextEncoder(20, E, 1, H, 8, dropout=value),
                  lambda: SeTformer((8,) * 4, (1,) * 4, (2,) * 4, dropout=value)):  # fmt: skip
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\]"):
            build()


@pytest.mark.parametrize(("name", "value"), [
    ("mlp_ratio", "2"), ("mlp_ratio", 0.0), ("in_channels", 3.0), ("in_channels", 0), ("num_classes", -1),
    ("num_classes", 2.5), ("pool_references", 0), ("drop_path_rate", -0.5), ("drop_path_rate", "0.1"),
    ("layer_scale", float("nan")), ("position_scale", -1.0), ("position_scale", "4"), ("widths", (8.0, 8, 8, 8)),
    ("depths", (1, 1, 1, True)), ("num_heads", ("2", 2, 2, 2)), ("out_indices", (0, 1.0)), ("pool", None),
])  # fmt: skip
def test_vision_models_check_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        SeTformer(**BUILDS["vision"][1] | {name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("vocab_size", 20.0), ("width", "16"), ("depth", True), ("hidden", 0), ("max_positions", None), ("dropout", "0.1"),
    ("pad_token_id", 0.0), ("layer_norm_eps", float("nan")), ("position_scale", float("inf")),
])  # fmt: skip
def test_text_models_check_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        TextEncoder(**BUILDS["text"][1] | {name: value})


@pytest.mark.parametrize(("name", "change"), [
    ("epsilon", torch.tensor(True)), ("epsilon", np.array([0.1])), ("num_iters", np.float64(2)), ("causal", "no"),
    ("num_iters", torch.tensor([2])), ("dropout_p", np.float32("nan")), ("kernel", ["rbf"]), ("backend", None),
    ("bandwidth", torch.tensor(-1)), ("key_relaxation", np.float32(2)),
])  # fmt: skip
def test_functions_refuse_by_name(name, change):
    function, options = calls("auto")["attention"]
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        function(**options | {name: change})
