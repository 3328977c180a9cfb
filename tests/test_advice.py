"""A call that could be linear is told so once, at its caller, by nothing that reads a device or breaks a graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setformer_kernels.functional as SF
from setformer_kernels import SeTAttention, advice

L = 12
BANNED = torch.ones(L, L, dtype=torch.bool).triu(1)
FLOAT = torch.zeros(L, L).masked_fill(BANNED, -math.inf)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that was told nothing yet."""
    monkeypatch.setattr(advice, "enabled", True)
    monkeypatch.setattr(advice, "_told", set())
    monkeypatch.setattr(advice, "_looked_at", 0)


@pytest.fixture
def told() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def attention(**options: Any) -> Tensor:
    q, k, v = (torch.randn(2, 3, L, 8) for _ in range(3))
    return SF.set_attention(q, k, v, torch.randn(3, 5, 8), **options)


def module(**options: Any) -> Tensor:
    x = torch.randn(2, L, 16)
    return SeTAttention(16, 2, batch_first=True, num_references=5, **options.pop("own", {}))(
        x, x, x, need_weights=False, **options
    )[0]


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: attention(attn_mask=~BANNED), "without it, causal=True"),
        (lambda: attention(attn_mask=FLOAT, num_iters=3), "for num_iters <= 1 one linear scan"),
        (lambda: attention(attn_mask=FLOAT.expand(2, 3, L, L)), "without it, causal=True"),
        (lambda: attention(causal=True, num_iters=3), "with num_iters = 3 takes O"),
        (lambda: module(attn_mask=BANNED), "is_causal=True of a module"),
        (lambda: module(is_causal=True, own={"num_iters": 2}), "one linear scan with num_iters <= 1"),
        (lambda: module(is_causal=True, attn_mask=BANNED, own={"num_iters": 2}), "one linear scan with num_iters <= 1"),
    ],
)
def test_a_call_that_could_be_a_scan_is_told_once_at_its_caller(
    call: Callable[[], Tensor], remedy: str, told: list[warnings.WarningMessage]
) -> None:
    call()
    call()
    (one,) = told
    assert remedy in str(one.message)
    assert "setformer_kernels.advice.enabled = False" in str(one.message)
    assert one.filename == __file__


SHIFTED, NEARLY, BIASED = BANNED.roll(1, 1), BANNED.clone(), FLOAT.clone()
NEARLY[5, 7], BIASED[5, 2] = False, 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(),
        lambda: attention(causal=True),
        lambda: attention(attn_mask=~SHIFTED),
        lambda: attention(attn_mask=~NEARLY),
        lambda: attention(attn_mask=BIASED),
        lambda: attention(attn_mask=FLOAT.clone().requires_grad_()),  # more than causal: it is learned
        lambda: attention(attn_mask=torch.stack([FLOAT, BIASED])),  # of each batch element its own
        lambda: module(is_causal=True, attn_mask=BANNED),
        lambda: module(is_causal=True, own={"add_bias_kv": True}),  # nothing that the caller could do
    ],
)
def test_what_is_linear_or_has_no_remedy_is_told_nothing(
    call: Callable[[], Tensor], told: list[warnings.WarningMessage]
) -> None:
    call()
    assert told == []


def test_the_switch_silences(monkeypatch: pytest.MonkeyPatch, told: list[warnings.WarningMessage]) -> None:
    monkeypatch.setattr(advice, "enabled", False)
    attention(attn_mask=FLOAT)
    attention(causal=True, num_iters=3)
    assert told == []


def test_only_the_first_masks_of_a_process_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(advice, "is_causal", lambda mask: looked.append(mask) or False)
    for _ in range(advice.MOST_LOOKED_AT + 5):
        attention(attn_mask=FLOAT)
    assert len(looked) == advice.MOST_LOOKED_AT


def test_a_mask_of_a_device_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "is_causal", lambda mask: pytest.fail("reading it would wait for the device"))
    advice.slower_than_linear(FLOAT[None, None].to("meta"), causal=False, num_iters=1, square=True)


@pytest.mark.parametrize("options", [{"attn_mask": FLOAT}, {"causal": True, "num_iters": 3}])
def test_no_graph_breaks_and_no_transform_is_told(options: dict[str, Any], told: list[warnings.WarningMessage]) -> None:
    q, y = torch.randn(2, 3, L, 8), torch.randn(3, 5, 8)

    def call(q: Tensor, y: Tensor) -> Tensor:
        return SF.set_attention(q, q, q, y, **options)

    torch.compile(call, fullgraph=True, backend="eager")(q, y)
    torch.func.vmap(call, in_dims=(0, None))(q[None], y)
    exported = torch.export.export(Exported(options), (q, y)).module()(q, y)
    torch.fx.experimental.proxy_tensor.make_fx(call)(q, y)
    assert [str(one.message) for one in told if "num_iters" in str(one.message)] == []
    torch.testing.assert_close(exported, call(q, y))


class Exported(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, y: Tensor) -> Tensor:
        return SF.set_attention(q, q, q, y, **self.options)
