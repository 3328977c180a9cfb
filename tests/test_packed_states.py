"""Causal packs whose sequences go on from states: what `set_causal` gives one sequence after another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.testing import assert_within_budget, measure

H, HK, M, D, E = 4, 2, 5, 8, 6
LENGTHS = (0, 5, 130, 1, 0)
N, T, SLACK = len(LENGTHS), sum(LENGTHS), 3
OFFSETS = torch.tensor([0, *itertools.accumulate(LENGTHS)])


def tokens(heads: int = H, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A pack with slack of NaN, its gates and the states it goes on from, one of them empty; all want gradients."""
    sizes = {"query": (heads, D), "key": (HK, D), "value": (HK, E), "log_decay": (HK,)}
    x = {name: torch.randn(T + SLACK, *size, dtype=dtype) for name, size in sizes.items()}
    x["log_decay"] = -x["log_decay"].abs()
    for t in x.values():
        t[T:] = math.nan
    x["references"] = torch.randn(HK, M, D, dtype=dtype)
    past = (torch.randn(N, HK, 40, c, dtype=dtype) for c in (D, D, E))
    state = SF.set_causal(*past, x["references"], output_final_state=True, backend="reference")[1]
    assert state is not None
    state[2] = 0
    return {name: t.detach().requires_grad_() for name, t in (x | {"initial_state": state}).items()}


def looped(x: dict[str, Tensor], mask: Tensor | None, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    """o [T, H, E] and the states of every segment alone."""
    rows, states = [], []
    for n, (a, b) in enumerate(itertools.pairwise(OFFSETS.tolist())):
        at = {name: x[name][a:b].transpose(0, 1)[None] for name in ("query", "key", "value", "log_decay") if name in x}
        before = x["initial_state"][n : n + 1] if "initial_state" in x else None
        of = None if mask is None else mask[a:b].transpose(0, 1)[None]
        o, state = SF.set_causal(
            **at, references=x["references"], initial_state=before, key_mask=of, output_final_state=True,
            backend=backend, **options,
        )  # fmt: skip
        assert state is not None
        rows.append(o[0].transpose(0, 1))
        states.append(state)
    return torch.cat(rows), torch.cat(states)


def means(state: Tensor) -> Tensor:
    total = state[..., : E + 1] + state[..., E + 1 : -1]
    return total[..., :-1] / torch.where(total[..., -1:] > 0, total[..., -1:], 1.0)


@pytest.mark.parametrize("heads", [HK, H])
@pytest.mark.parametrize("options", [{}, {"num_iters": 0, "epsilon": 0.2}], ids=["t1", "t0"])
@pytest.mark.parametrize("given", ["all", "state", "gates", "neither", "mask"])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_pack_goes_on_as_its_segments_do(given: str, options: dict[str, Any], heads: int, native: str) -> None:
    """Bit for bit: o, the states, and every gradient but those of parameters, which are summed in another order.

    PyTorch's own products, behind "eager", round by their shape on some CPUs; a pack repeats the keys of groups.
    """
    if native == "triton" and (heads == H or (options and given != "all")):
        pytest.skip("grouped queries and T are the same for packs as for pieces; half a minute on the interpreter")
    x = tokens(heads)
    absent = {"state": ["log_decay"], "gates": ["initial_state"], "neither": ["log_decay", "initial_state"]}
    for name in absent.get(given, []):
        del x[name]
    mask = torch.randn(T + SLACK, HK).masked_fill(torch.rand(T + SLACK, HK) < 0.3, -math.inf)
    mask = mask if given == "mask" else None
    own = {"causal": True, "output_final_state": True, "key_mask": mask, "backend": native, **options}
    o, states = SF.set_attention_varlen(**x, cu_seqlens_q=OFFSETS.int(), **own)
    want = looped(x, mask, native, **options)
    rounding = {"rtol": 1e-4, "atol": 1e-5} if native == "eager" and heads == H else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(o[:T], want[0], **rounding)
    assert not o[T:].any()
    torch.testing.assert_close(states, want[1], **rounding)
    into = torch.randn(T + SLACK, heads, E), torch.randn(states.shape)
    found, alone = (
        torch.autograd.grad(list(outputs), list(x.values()), [w[: len(r)] for w, r in zip(into, outputs, strict=True)])
        for outputs in ((o, states), want)
    )
    for name, a, b in zip(x, found, alone, strict=True):
        if name == "references":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        else:
            torch.testing.assert_close(a, b, **rounding, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packs_with_states_within_the_error_budget(dtype: torch.dtype, native: str) -> None:
    if native == "triton" and dtype == torch.float64:
        pytest.skip("no kernels for float64")
    x = {name: t.detach()[:T] if len(t) == T + SLACK else t.detach() for name, t in tokens(HK, torch.float64).items()}
    inputs = {**x, "cu_seqlens_q": OFFSETS}
    state = inputs.pop("initial_state").float().double()

    def both(**given: Any) -> Tensor:
        wide = torch.float64 if given["query"].dtype == torch.float64 else torch.float32
        o, after = SF.set_attention_varlen(**given, initial_state=state.to(wide), causal=True, output_final_state=True)
        return torch.cat((o.to(wide).flatten(), means(after).flatten()))

    cotangent = torch.randn(T * HK * E + N * HK * M * E, dtype=torch.float64)
    assert_within_budget(*measure.beside(both, inputs, dtype, cotangent, native).only(measure.large), "states")


def test_two_packs_are_one(native: str) -> None:
    """Every sequence cut in two, at places of its own."""
    x = {name: t.detach() for name, t in tokens().items()}
    own: dict[str, Any] = {"causal": True, "output_final_state": True, "backend": native}
    o, states = SF.set_attention_varlen(**x, cu_seqlens_q=OFFSETS, **own)
    firsts = [min(n, 64) for n in LENGTHS]
    pieces: list[list[Tensor]] = [[] for _ in LENGTHS]
    state = x.pop("initial_state")
    for half in range(2):
        pairs = zip(itertools.pairwise(OFFSETS.tolist()), firsts, strict=True)
        rows = [range(a, a + n) if half == 0 else range(a + n, b) for (a, b), n in pairs]
        at = torch.tensor([s for r in rows for s in r], dtype=torch.int64)
        cu = torch.tensor([0, *itertools.accumulate(map(len, rows))])
        part = {name: t if name == "references" else t[at] for name, t in x.items()}
        found, state = SF.set_attention_varlen(**part, cu_seqlens_q=cu, initial_state=state, **own)
        for piece, own_rows in zip(pieces, found.split([len(r) for r in rows]), strict=True):
            piece.append(own_rows)
    torch.testing.assert_close(torch.cat([torch.cat(piece) for piece in pieces]), o[:T])
    torch.testing.assert_close(means(state), means(states))


def test_no_token_and_no_segment(native: str) -> None:
    x = tokens()
    nothing = {name: t[:0] if len(t) == T + SLACK else t for name, t in x.items()}
    own: dict[str, Any] = {"causal": True, "output_final_state": True, "backend": native}
    o, states = SF.set_attention_varlen(**nothing, cu_seqlens_q=torch.zeros_like(OFFSETS), **own)
    assert o.shape == (0, H, E)
    assert torch.equal(states, x["initial_state"])
    del x["initial_state"]
    o, states = SF.set_attention_varlen(**x, cu_seqlens_q=torch.zeros(1, dtype=torch.int64), **own)
    assert states.shape == (0, HK, M, 2 * E + 3)
    assert not o.any()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer states": (
        {"initial_state": torch.zeros(2, HK, M, 2 * E + 3)}, ValueError,
        r"initial_state must have shape \[5, 2, 5, 15\] \(N of cu_seqlens",
    ),
    "half a state": ({"initial_state": torch.zeros(N, HK, M, E + 2)}, ValueError, "initial_state must have shape"),
    "states of bfloat16": (
        {"initial_state": torch.zeros(N, HK, M, 2 * E + 3).bfloat16()}, ValueError,
        "initial_state must be torch.float32, got torch.bfloat16",
    ),
    "states elsewhere": (
        {"initial_state": torch.zeros(N, HK, M, 2 * E + 3, device="meta")}, ValueError,
        "initial_state must be on the device of key, cpu, got meta",
    ),
    "gates of heads before tokens": (
        {"log_decay": torch.zeros(HK, T)}, ValueError, r"log_decay must have shape \[139, 2\]",
    ),
    "growth": ({"log_decay": torch.full((T + SLACK, HK), 0.5)}, ValueError, "log_decay must be ≤ 0, got 0.5"),
    "not causal, a state": ({"causal": False}, ValueError, "initial_state goes with causal=True"),
    "not causal, a final state": (
        {"causal": False, "initial_state": None, "output_final_state": True}, ValueError,
        "output_final_state goes with causal=True",
    ),
    "not causal, gates": ({"causal": False, "initial_state": None}, ValueError, "log_decay goes with causal=True"),
    "iterations": ({"num_iters": 2}, ValueError, "num_iters must be at most 1 for a causal packed batch"),
    "no flag": ({"output_final_state": 1}, TypeError, "output_final_state must be a bool, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_states_is_said(name: str) -> None:
    changes, error, message = WRONG[name]
    x = {key: t.detach() for key, t in tokens().items()}
    with pytest.raises(error, match=message):
        SF.set_attention_varlen(**{**x, "cu_seqlens_q": OFFSETS, "causal": True, **changes})


def test_gates_of_slack_are_not_looked_at() -> None:
    x = {name: t.detach() for name, t in tokens().items()}
    x["log_decay"][T:] = 7.0
    SF.set_attention_varlen(**x, cu_seqlens_q=OFFSETS, causal=True)
