"""Bad input: a ValueError or TypeError naming the argument, what it got and what it wants, before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import setformer_kernels as sk
import setformer_kernels.functional as SF
from setformer_kernels.problem import HYPER

B, H, L, S, M, D, E = 2, 3, 5, 6, 4, 8, 7


def good() -> dict[str, Any]:
    shapes = {"query": (B, H, L, D), "key": (B, H, S, D), "value": (B, H, S, E), "references": (H, M, D)}
    return {name: torch.randn(*shape) for name, shape in shapes.items()}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query_not_tensor": ({"query": [1.0]}, TypeError, r"query must be a Tensor \[B, H, L, D\], got list"),
    "query_ndim": ({"query": torch.randn(B, L, D)}, ValueError, r"query must have shape .* got 3-D \[2, 5, 8\]"),
    "query_int": (
        {"query": torch.ones(B, H, L, D, dtype=torch.int32)},
        TypeError,
        "query must be float32.*got torch.int32",
    ),
    "query_width": ({"query": torch.randn(B, H, L, D + 1)}, ValueError, r"query must have shape \[2, 3, \*, 8\]"),
    "query_batch": ({"query": torch.randn(1, H, L, D)}, ValueError, "query must have shape"),
    "key_dtype": ({"key": torch.randn(B, H, S, D).double()}, TypeError, "value must have the dtype of key"),
    "query_dtype": ({"query": torch.randn(B, H, L, D).double()}, TypeError, "query must have the dtype of key"),
    "no_width": ({"key": torch.randn(B, H, S, 0)}, ValueError, "key must have D > 0"),
    "value_width": ({"value": torch.randn(B, H, S, 0)}, ValueError, "value must have E > 0"),
    "sparse": ({"query": torch.zeros(B, H, L, D).to_sparse()}, TypeError, "query must be a dense Tensor"),
    "value_length": ({"value": torch.randn(B, H, S + 1, E)}, ValueError, r"value must have shape \[2, 3, 6, \*\]"),
    "references_ndim": ({"references": torch.randn(M, D)}, ValueError, r"references must have shape \[H, M, D\]"),
    "references_heads": ({"references": torch.randn(1, M, D)}, ValueError, "references must have shape"),
    "references_width": ({"references": torch.randn(H, M, D - 1)}, ValueError, "references must have shape"),
    "references_none": ({"references": torch.randn(H, 0, D)}, ValueError, "references must have M > 0"),
    "device": (
        {"references": torch.randn(H, M, D, device="meta")},
        ValueError,
        "references must be on the device of key",
    ),
    "kernel": ({"kernel": "cosine"}, ValueError, "kernel must be one of rbf, dot, got 'cosine'"),
    "epsilon_zero": ({"epsilon": 0.0}, ValueError, "epsilon must be finite and > 0, got 0.0"),
    "epsilon_nan": ({"epsilon": math.nan}, ValueError, "epsilon must be finite"),
    "epsilon_type": ({"epsilon": "small"}, TypeError, "epsilon must be a float or a tensor"),
    "epsilon_shape": ({"epsilon": torch.ones(H + 1)}, ValueError, r"epsilon must be .* \[H\] = \[3\]"),
    "bandwidth": ({"bandwidth": -1.0}, ValueError, "bandwidth must be finite and > 0"),
    "bandwidth_inf": ({"bandwidth": math.inf}, ValueError, "bandwidth must be finite"),
    "relaxation": ({"key_relaxation": 1.5}, ValueError, "key_relaxation must be finite and ≥ 0 and ≤ 1, got 1.5"),
    "relaxation_b": ({"reference_relaxation": -0.1}, ValueError, "reference_relaxation must be"),
    "num_iters": ({"num_iters": -1}, ValueError, "num_iters must be ≥ 0, got -1"),
    "num_iters_float": ({"num_iters": 3.0}, TypeError, "num_iters must be an int"),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
    "seed": ({"dropout_p": 0.5, "seed": 3}, TypeError, "seed must be an int64 scalar Tensor"),
    "key_mask_shape": (
        {"key_mask": torch.ones(B, S + 1, dtype=torch.bool)},
        ValueError,
        r"key_mask must have shape \[2, 6\]",
    ),
    "key_mask_int": ({"key_mask": torch.ones(B, S, dtype=torch.int64)}, TypeError, "key_mask must be bool"),
    "attn_mask_shape": (
        {"attn_mask": torch.ones(S, L)},
        ValueError,
        r"attn_mask must have shape \[5, 6\] or \[2, 5, 6\]",
    ),
    "attn_mask_kind": ({"attn_mask": 3}, TypeError, "attn_mask must be a bool or floating-point Tensor, got int"),
    "causal_type": ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    "log_mass": ({"reference_log_mass": torch.ones(M)}, ValueError, r"reference_log_mass must have shape \[H, M\]"),
    "positions_missing": ({"key_position": torch.ones(S, 2)}, ValueError, "go together: .*missing"),
    "backend_list": ({"backend": ["cpu"]}, ValueError, "backend must be a string, got list"),
    "return_info": ({"return_info": torch.ones(2)}, TypeError, r"return_info must be a bool, got a Tensor \[2\]"),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be one of auto, .*reference, got 'tpu'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_bad_arguments_of_set_attention(name: str) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        SF.set_attention(**good() | change)


def placed(**change: Any) -> dict[str, Any]:
    positions = {"query_position": torch.randn(L, 2), "key_position": torch.randn(S, 2)}
    return good() | positions | {"reference_position": torch.randn(H, M, 2)} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_position": torch.randn(S, 3)}, r"key_position must have shape \[6, 2\] or \[2, 6, 2\]"),
        ({"query_position": torch.randn(L, 2, requires_grad=True)}, "query_position gets no gradient"),
        ({"reference_position": torch.randn(H, M + 1, 2)}, "reference_position must have shape"),
        ({"position_scale": -1.0}, "position_scale must be finite and ≥ 0"),
    ],
)
def test_bad_positions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SF.set_attention(**placed(**change))


@pytest.mark.parametrize(
    "name",
    [
        "query", "value", "references", "key_mask", "attn_mask", "reference_log_mass", "bandwidth", "epsilon",
        "key_relaxation", "reference_relaxation", "position_scale", "query_position", "key_position",
        "reference_position", "seed",
    ],
)  # fmt: skip
def test_every_tensor_is_checked_for_its_device(name: str) -> None:
    """A kernel that is given another device's address reads what is not there."""
    hyper = {h: torch.ones(H) for h in HYPER}
    masks = {"key_mask": torch.ones(B, S), "attn_mask": torch.ones(L, S), "reference_log_mass": torch.ones(H, M)}
    given = placed(**hyper, **masks, dropout_p=0.5, seed=torch.tensor(3))
    with pytest.raises(ValueError, match=f"{name} must be on the device of key, cpu, got meta"):
        SF.set_attention(**given | {name: given[name].to("meta")})


CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SF.nystrom_features(torch.randn(B, H, S, D), torch.randn(H, M, D + 1)), ValueError, "landmarks must have"),
    (
        lambda: SF.nystrom_features(torch.randn(B, H, S, D), torch.randn(H, M, D), ridge=0.0),
        ValueError,
        "ridge must be",
    ),
    (lambda: SF.nystrom_features(torch.randn(B, S, D), torch.randn(H, M, D)), ValueError, "x must have shape"),
    (
        lambda: SF.nystrom_features(torch.randn(B, H, S, D), torch.randn(H, M, D), bandwidth=1e6, center=True),
        ValueError,
        f"bandwidth must be smaller for centred features of D = {D}",
    ),
    (lambda: SF.sinkhorn(torch.randn(4)), ValueError, r"log_kernel must have shape \[..., N, M\]"),
    (lambda: SF.sinkhorn(torch.randn(4, 3), torch.zeros(5)), ValueError, r"log_a must broadcast to \[4\], got \[5\]"),
    (lambda: SF.sinkhorn(torch.randn(4, 3), tol=-1.0), ValueError, "tol must be finite and ≥ 0"),
    (lambda: SF.sinkhorn(torch.randn(4, 3), num_iters=-1), ValueError, "num_iters must be ≥ 0"),
    (lambda: SF.sinkhorn(torch.randn(4, 3), key_relaxation=2.0), ValueError, "key_relaxation must be"),
    (lambda: SF.sinkhorn(torch.randn(4, 3, dtype=torch.complex64)), TypeError, "log_kernel must be float32"),
    (
        lambda: SF.set_pool(torch.randn(B, H, S, D), torch.randn(B, H, S), torch.randn(H, M, D)),
        ValueError,
        "value must",
    ),
    (lambda: SF.set_attention_weights(1, 2, 3), TypeError, "query must be a Tensor"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_bad_arguments_of_the_other_functions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_named_backend_that_cannot_run_says_why() -> None:
    q, k, v = (torch.randn(1, 1, 4, 100_000, device="meta") for _ in range(3))
    for name, reasons in sk.available_backends().items():
        if name != "reference":
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run this call: ."):
                SF.set_attention(q, k, v, torch.randn(1, 2, 100_000, device="meta"), backend=name)
            assert all(isinstance(reason, str) for reason in reasons)


def test_auto_falls_back_to_the_reference_where_nothing_else_can() -> None:
    q, y = torch.randn(1, 1, 4, 100_000), torch.randn(1, 2, 100_000)
    assert SF.set_attention(q, q, q[..., :3], y).isfinite().all()
