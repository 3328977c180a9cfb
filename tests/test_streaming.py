"""Causal attention in pieces and token by token: against the definition in float64, and what a state promises."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.testing import measure

B, H, S, M, D, E = 2, 3, 50, 5, 8, 6
attention = functools.partial(SF.set_attention, backend="reference")


def tokens(length: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((B, H, length, D), (B, H, length, D), (B, H, length, E), (H, M, D))
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def gates(length: int = S, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.logsigmoid(3 * torch.randn(B, H, length, dtype=dtype))


def per_query(q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, log_a: Tensor, **options: Any) -> Tensor:
    """The definition: query i with masses a_s e^{Γ_i − Γ_s} of the keys s ≤ i, one call for each."""
    rows = []
    for i in range(q.shape[2]):
        between = [decay[..., s + 1 : i + 1].sum(-1) for s in range(i + 1)]
        mask = log_a[..., : i + 1] + torch.stack(between, -1)
        some = (slice(None), slice(None), slice(i + 1))
        rows.append(attention(q[:, :, i : i + 1], k[some], v[some], y, key_mask=mask, **options))
    return torch.cat(rows, 2)


def masses() -> Tensor:
    """[B, H, S] log masses, of each head's own; the first keys of one batch element are not there."""
    log_a = torch.randn(B, H, S, dtype=torch.float64)
    log_a[:, :, 4::7] = -math.inf
    log_a[1, :, :9] = -math.inf
    return log_a


OPTIONS: dict[str, dict[str, Any]] = {
    "t0": {"num_iters": 0},
    "t1": {},
    "relaxed": {"key_relaxation": 0.4, "reference_relaxation": 0.7},
    "small_epsilon": {"epsilon": 0.005},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gates_are_masses_that_depend_on_the_query(options: dict[str, Any], native: str) -> None:
    q, k, v, y = tokens()
    decay, log_a = gates(), masses()
    o, state = SF.set_causal(q, k, v, y, log_decay=decay, key_mask=log_a, backend=native, **options)
    skipped = torch.where(log_a > -math.inf, decay, 0.0)  # the gate of a key that is not there does not count
    torch.testing.assert_close(o, per_query(q, k, v, y, skipped, log_a, **options), rtol=1e-9, atol=1e-11)
    assert state is None
    assert (o[1, :, :9] == 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pieces_and_steps_equal_one_call(options: dict[str, Any], gated: bool, native: str) -> None:
    q, k, v, y = tokens()
    decay, log_a = gates() if gated else None, masses()
    call = functools.partial(SF.set_causal, references=y, backend=native, output_final_state=True, **options)
    want, last = call(q, k, v, log_decay=decay, key_mask=log_a)
    state, found = None, []
    for first, end in ((0, 1), (1, 20), (20, 20), (20, 43)):
        one = slice(first, end)
        o, state = call(
            *(t[:, :, one] for t in (q, k, v)), log_decay=None if decay is None else decay[..., one],
            key_mask=log_a[..., one], initial_state=state,
        )  # fmt: skip
        found.append(o)
    for s in range(43, S):
        gate = None if decay is None else decay[..., s]
        tokens_now = (t[:, :, s] for t in (q, k, v))
        mass = log_a[..., s]
        o = SF.set_step(state, *tokens_now, y, log_decay=gate, key_mask=mass, backend=native, **options)
        found.append(o.unsqueeze(2))
    torch.testing.assert_close(torch.cat(found, 2), want, rtol=1e-9, atol=1e-12)
    for a, b in zip(invariants(state), invariants(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def invariants(state: Tensor) -> tuple[Tensor, Tensor]:
    """(log C [.., M], z [.., M, E]) of a state with keys, however it is scaled."""
    e = (state.shape[-1] - 3) // 2
    total = state[..., : e + 1] + state[..., e + 1 : -1]
    return total[..., -1].log() + state[..., -1] * math.log(2), total[..., :-1] / total[..., -1:]


def test_keys_that_take_no_part_leave_the_state_bit_by_bit(native: str) -> None:
    q, k, v, y = tokens(dtype=torch.float32)
    decay = gates(dtype=torch.float32)
    call = functools.partial(SF.set_causal, references=y, backend=native, output_final_state=True)
    _, state = call(q, k, v, log_decay=decay)
    k, v = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    o, after = call(q, k, v, log_decay=decay, key_mask=torch.zeros(B, S, dtype=torch.bool), initial_state=state)
    assert torch.equal(state, after)
    assert o.isfinite().all()
    before = state.clone()
    absent = torch.zeros(B, dtype=torch.bool)
    SF.set_step(state, q[:, :, 0], k[:, :, 0], v[:, :, 0], y, log_decay=decay[..., 0], key_mask=absent, backend=native)
    assert torch.equal(state, before)
    _, empty = call(q, k, v, key_mask=absent[:, None].expand(B, S))
    assert torch.equal(empty, SF.empty_state(B, H, M, E))


def test_steps_touch_the_states_that_they_are_told_and_no_others(native: str) -> None:
    q, k, v, y = (t[:, :, 0] if t.ndim == 4 else t for t in tokens(1, torch.float32))
    pool = torch.randn(5, H, M, 2 * E + 3)
    pool[..., E] = 1 + pool[..., E].sigmoid()
    pool[..., E + 1 : -1] *= 1e-8
    pool[..., -1] = pool[..., -1].round()
    before, alone = pool.clone(), pool[[3]]
    o = SF.set_step(pool, q, k, v, y, state_indices=torch.tensor([3, -1], dtype=torch.int32), backend=native)
    want = SF.set_step(alone, q[:1], k[:1], v[:1], y, backend=native)
    torch.testing.assert_close(o[0], want[0], rtol=0, atol=0)
    assert (o[1] == 0).all()
    assert torch.equal(pool[3], alone[0])
    assert not torch.equal(pool[3], before[3])
    others = [0, 1, 2, 4]
    assert torch.equal(pool[others], before[others])
    before, nobody = pool.clone(), torch.empty(0, dtype=torch.int32)
    assert SF.set_step(pool, q[:0], k[:0], v[:0], y, state_indices=nobody, backend=native).shape == (0, H, E)
    assert torch.equal(pool, before)


def test_merged_states_hold_the_keys_of_both(native: str) -> None:
    q, k, v, y = tokens(dtype=torch.float32)
    call = functools.partial(SF.set_causal, references=y, backend=native, output_final_state=True)
    a, b, both = (call(*(t[:, :, s] for t in (q, k, v)))[1] for s in (slice(20), slice(20, S), slice(S)))
    for found, want in zip(invariants(SF.merge_states(a, b)), invariants(both), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    empty = SF.empty_state(B, H, M, E)
    assert torch.equal(SF.merge_states(a, empty), a)
    assert torch.equal(SF.merge_states(empty, empty), empty)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_pass_from_piece_to_piece(gated: bool, native: str) -> None:
    """Through final and initial states as through one call, in every input."""
    leaves = [t.requires_grad_() for t in tokens()]
    decay = gates().requires_grad_() if gated else None
    log_a = masses().requires_grad_()
    inputs = [*leaves, log_a] + ([decay] if decay is not None else [])
    call = functools.partial(SF.set_causal, references=leaves[3], backend=native, output_final_state=True)
    weights = torch.randn(B, H, S, E, dtype=torch.float64)

    def loss(cuts: tuple[int, ...]) -> Tensor:
        total, state = weights.new_zeros(()), None
        for first, end in zip((0, *cuts), (*cuts, S), strict=True):
            one = slice(first, end)
            o, state = call(
                *(t[:, :, one] for t in leaves[:3]), key_mask=log_a[..., one],
                log_decay=None if decay is None else decay[..., one], initial_state=state,
            )  # fmt: skip
            total = total + (o * weights[:, :, one]).sum()
        return total + sum(x.sin().sum() for x in invariants(state))

    want = torch.autograd.grad(loss(()), inputs)
    for cuts in ((17,), (1, 2, 40)):
        for a, b in zip(torch.autograd.grad(loss(cuts), inputs), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gradcheck_with_a_state_and_gates(native: str) -> None:
    """In log C and N/C of the state, as k is a scale; the gradients of the reference are autograd's own."""
    q, k, v, y = (t.requires_grad_() for t in tokens(7))
    decay, log_a = gates(7).requires_grad_(), torch.randn(B, H, 7, dtype=torch.float64, requires_grad=True)
    log_c = torch.randn(B, H, M, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, H, M, E, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, y: Tensor, decay: Tensor, log_a: Tensor, log_c: Tensor, z: Tensor) -> Any:
        c = log_c.exp().unsqueeze(-1)
        lost = torch.zeros_like(torch.cat((z, c), -1))
        state = torch.cat((z * c, c, lost, torch.zeros_like(c)), -1)
        call = {"log_decay": decay, "key_mask": log_a, "initial_state": state, "output_final_state": True}
        o, last = SF.set_causal(q, k, v, y, reference_relaxation=0.7, backend=native, **call)
        return o, *invariants(last)

    inputs = (q, k, v, y, decay.detach().requires_grad_(), log_a, log_c, z)
    assert torch.autograd.gradcheck(f, inputs, atol=1e-6, fast_mode=True)


def drift(native: str, doublings: int, steps: int) -> float:
    """Relative error of the sums after so many steps of one float32 token, on top of 2^doublings such keys."""
    q, k, v, y = (t[:1, :1, 0, :4].contiguous() if t.ndim == 4 else t[:1, :, :4] for t in tokens(1, torch.float32))
    state = SF.empty_state(1, 1, M, 4)
    SF.set_step(state, q, k, v, y, backend=native)
    want = state.double()[..., :5] * (2.0**doublings + steps)
    state[..., -1] += doublings
    exponent = state[..., -1:].clone()
    for _ in range(steps):
        SF.set_step(state, q, k, v, y, backend=native)
    found = state.double()
    total = (found[..., :5] + found[..., 5:10]) * 2.0 ** (found[..., -1:] - exponent + doublings)
    return ((total - want).norm() / want.norm()).item()


def test_steps_on_many_keys_neither_stagnate_nor_drift(native: str) -> None:
    """float32 sums would lose each of them: 2^24 + 1 is no float32."""
    steps = 500 if native == "cpu" else 20
    assert drift(native, 24, steps) <= 1e-8


@dataclass(frozen=True)
class Piece:
    """A piece of a sequence after others, and how its gates are drawn."""

    rate: float | None = 0.3  # the mean of −log γ; None: no gates
    started: bool = True  # whether there is an initial state
    L: int = 100
    D: int = 16
    E: int = 16
    M: int = 7
    mask: bool = False
    options: dict[str, Any] = field(default_factory=dict)


PIECES = {
    "plain": Piece(),
    "first": Piece(started=False),
    "no_gates": Piece(rate=None),
    "slow": Piece(rate=1e-3, L=230, M=64, D=64, E=48),
    "fast": Piece(rate=8.0, mask=True),
    "odd": Piece(D=19, E=33, M=13, L=31),
    "t0": Piece(options={"num_iters": 0}),
    "small_epsilon": Piece(options={"epsilon": 0.005}),
    "tensors": Piece(mask=True, options={
        "epsilon": torch.linspace(0.08, 0.12, H), "bandwidth": torch.linspace(0.8, 1.2, H),
        "key_relaxation": torch.linspace(0.4, 0.9, H), "reference_relaxation": torch.linspace(0.9, 0.3, H),
    }),
}  # fmt: skip


def drawn(piece: Piece) -> dict[str, Any]:
    """The inputs of a piece in float64; gates of −0 are no matter, and some keys are not there."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    n, m, e = piece.L, piece.M, piece.E
    found = {"query": normal(B, H, n, piece.D), "key": normal(B, H, n, piece.D), "value": normal(B, H, n, e)}
    found |= {"references": normal(H, m, piece.D)}
    if piece.rate is not None:
        found["log_decay"] = -piece.rate * 2 * torch.rand(B, H, n, dtype=torch.float64)
    if piece.mask:
        found["key_mask"] = normal(B, H, n).masked_fill(torch.rand(B, H, n) < 0.2, -math.inf)
    if piece.started:
        c, k = 1 + torch.rand(B, H, m, 1, dtype=torch.float64), torch.randint(-9, 4, (B, H, m, 1)).double()
        lost = torch.zeros(B, H, m, e + 1, dtype=torch.float64)
        found["initial_state"] = torch.cat((c * normal(B, H, m, e), c, lost, k), -1)
    return found | piece.options


def piece_output(**inputs: Any) -> Tensor:
    return SF.set_causal(**inputs)[0]


def piece_state(query: Tensor, **inputs: Any) -> Tensor:
    """Means and log C of the final state [B, H, M, E + 1]."""
    _, state = SF.set_causal(query, output_final_state=True, **inputs)
    assert state is not None
    log_c, z = invariants(state)
    return torch.cat((z, log_c.unsqueeze(-1)), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PIECES)
def test_pieces_and_every_gradient_within_the_error_budget(name: str, dtype: torch.dtype, native: str) -> None:
    piece = PIECES[name]
    inputs = drawn(piece)
    for function, shape in ((piece_output, (B, H, piece.L, piece.E)), (piece_state, (B, H, piece.M, piece.E + 1))):
        cotangent = torch.randn(shape, dtype=torch.float64)
        measure.beside(function, inputs, dtype, cotangent, native).check(f"{name} {function.__name__}")


def test_gates_of_draws_that_cancel_within_the_error_budget(native: str) -> None:
    """A gate's gradient sums over all earlier keys, where what the state's means and its log C leave there cancel."""
    torch.manual_seed(3)
    inputs = drawn(PIECES["fast"])
    torch.randn(B, H, PIECES["fast"].L, PIECES["fast"].E, dtype=torch.float64)
    cotangent = torch.randn(B, H, PIECES["fast"].M, PIECES["fast"].E + 1, dtype=torch.float64)
    measure.beside(piece_state, inputs, torch.bfloat16, cotangent, native).check("cancelling")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "iterations": ({"num_iters": 2}, ValueError, "num_iters must be 0 or 1 in set_causal, got 2"),
    "state_shape": (
        {"initial_state": torch.zeros(B, H, M, E)}, ValueError,
        r"initial_state must have shape \[2, 3, 5, 15\] .* got \[2, 3, 5, 6\]",
    ),
    "state_batch": ({"initial_state": torch.zeros(1, H, M, 2 * E + 3)}, ValueError, "initial_state must have shape"),
    "state_dtype": (
        {"initial_state": torch.zeros(B, H, M, 2 * E + 3).bfloat16()}, ValueError,
        "initial_state must be torch.float32, got torch.bfloat16",
    ),
    "state_kind": ({"initial_state": 0}, TypeError, "initial_state must be a Tensor"),
    "decay_shape": ({"log_decay": torch.zeros(B, 7)}, ValueError, r"log_decay must have shape \[B, H, S\]"),
    "decay_heads": ({"log_decay": torch.zeros(B, 1, 7)}, ValueError, "log_decay must have shape"),
    "decay_sign": ({"log_decay": torch.full((B, H, 7), 0.5)}, ValueError, "log_decay must be ≤ 0, got 0.5"),
    "decay_device": (
        {"log_decay": torch.zeros(B, H, 7, device="meta")}, ValueError, "log_decay must be on the device of key",
    ),
    "lengths": ({"query": torch.randn(B, H, 6, D)}, ValueError, "query must have shape .*a query for every key"),
    "flag": ({"output_final_state": 1}, TypeError, "output_final_state must be a bool"),
    "mask": ({"key_mask": torch.ones(B, 2, 7)}, ValueError, r"key_mask must have shape \[2, 7\] or \[2, 3, 7\]"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("query", "key", "value", "references"), tokens(7, torch.float32), strict=True))
    with pytest.raises(error, match=message):
        SF.set_causal(**(good | changes))


BAD_STEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "iterations": ({"num_iters": 3}, ValueError, "num_iters must be 0 or 1 in set_step, got 3"),
    "rows": ({"state": SF.empty_state(B + 1, H, M, E)}, ValueError, "state must have shape"),
    "dtype": ({"state": SF.empty_state(B, H, M, E, dtype=torch.float64)}, ValueError, "state must be torch.float32"),
    "strides": (
        {"state": SF.empty_state(B, M, H, E).transpose(1, 2)}, ValueError, "state must be contiguous, got strides",
    ),
    "indices": ({"state_indices": torch.zeros(B).long()}, TypeError, "state_indices must be an int32 Tensor"),
    "count": ({"state_indices": torch.zeros(B + 1).int()}, ValueError, r"state_indices must have shape \[2\]"),
    "turn_far": ({"state_indices": torch.tensor([0, B]).int()}, ValueError, r"different ones of 2 states, or -1"),
    "turn_twice": ({"state_indices": torch.tensor([1, 1]).int()}, ValueError, r"different ones .* got \[1, 1\]"),
    "turn_before": ({"state_indices": torch.tensor([0, -2]).int()}, ValueError, r"or -1, got \[0, -2\]"),
    "mask_kind": ({"key_mask": [True]}, TypeError, "key_mask must be a Tensor, got list"),
    "decay_kind": ({"log_decay": [0.0]}, TypeError, "log_decay must be a Tensor, got list"),
    "position_kind": ({"key_position": 1.0}, TypeError, "key_position must be a Tensor, got float"),
    "position_scalar": ({"query_position": torch.tensor(1.0)}, ValueError, "query_position must have a dimension"),
    "query": ({"query": torch.randn(B, H, 1, D)}, ValueError, r"query must have shape \[B, H, D\]"),
    "decay": ({"log_decay": torch.ones(B, H)}, ValueError, "log_decay must be ≤ 0, got 1.0"),
    "gradient": ({"references": torch.randn(H, M, D, requires_grad=True)}, ValueError, "set_step has no gradient"),
}  # fmt: skip


def test_gates_far_below_zero_count_as_the_lowest(native: str) -> None:
    x = [torch.randn(B, H, 7, n) for n in (D, D, E)]
    y, gates = torch.randn(H, M, D), torch.zeros(B, H, 7)
    gates[..., 3] = -torch.inf
    o = SF.set_causal(*x, y, log_decay=gates, backend=native)[0]
    torch.testing.assert_close(o, SF.set_causal(*x, y, log_decay=gates.clamp(-1000.0), backend=native)[0])


def test_a_gate_above_zero_is_named_beside_one_that_is_no_number() -> None:
    x = [torch.randn(B, H, n) for n in (D, D, E)]
    gates = torch.zeros(B, H)
    gates[0, 0], gates[1, 1] = torch.nan, 0.5
    with pytest.raises(ValueError, match=r"log_decay must be ≤ 0, got 0\.5"):
        SF.set_step(SF.empty_state(B, H, M, E), *x, torch.randn(H, M, D), log_decay=gates)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_bad_steps_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    one = (t[:, :, 0] if t.ndim == 4 and t.shape[2] == 1 else t for t in tokens(1, torch.float32))
    good = dict(zip(("query", "key", "value", "references"), one, strict=True)) | {"state": SF.empty_state(B, H, M, E)}
    with pytest.raises(error, match=message):
        SF.set_step(**(good | changes))


BAD_STATES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "none": (None, torch.zeros(M, 5), TypeError, "a must be a Tensor .*got NoneType"),
    "list": (torch.zeros(M, 5), [1.0], TypeError, "b must be a Tensor .*got list"),
    "scalar": (torch.zeros(()), torch.zeros(()), ValueError, "a must have shape .*2E"),
    "even": (torch.zeros(M, 6), torch.zeros(M, 6), ValueError, r"a must have shape .*got \[5, 6\]"),
    "other": (torch.zeros(M, 5), torch.zeros(M, 7), ValueError, "b must have shape"),
}


@pytest.mark.parametrize(("a", "b", "error", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_states_do_not_merge(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SF.merge_states(a, b)


def test_no_states_of_few_digits() -> None:
    with pytest.raises(TypeError, match="dtype must be torch"):
        SF.empty_state(B, H, M, E, dtype=torch.bfloat16)


def test_key_masks_of_each_head(native: str) -> None:
    q, k, v, y = tokens(12, torch.float32)
    mask = torch.randn(B, H, 12).masked_fill(torch.rand(B, H, 12) < 0.3, -math.inf)
    call = functools.partial(SF.set_attention, backend=native)
    heads = [call(q[:, [h]], k[:, [h]], v[:, [h]], y[[h]], key_mask=mask[:, h]) for h in range(H)]
    torch.testing.assert_close(call(q, k, v, y, key_mask=mask), torch.cat(heads, 1))
    pooled = [SF.set_pool(k[:, [h]], v[:, [h]], y[[h]], key_mask=mask[:, h]) for h in range(H)]
    torch.testing.assert_close(SF.set_pool(k, v, y, key_mask=mask, backend=native), torch.cat(pooled, 1))


@pytest.mark.slow
@pytest.mark.parametrize("doublings", [0, 24])
def test_a_million_steps_do_not_drift(doublings: int) -> None:
    """Within 1e-6 of float64; what is left, 2e-7, is how one token's weight is rounded in other units."""
    assert drift("auto", doublings, 2**20) <= 1e-6


@pytest.mark.parametrize("given", [["log_decay"], ["key_mask"], []], ids=str)
@pytest.mark.parametrize("m", [16, 64, 128])
def test_pieces_of_whole_bundles_have_the_bits_of_one_call(m: int, given: list[str]) -> None:
    """192 tokens are whole chunks for any M; the masses take some chunks out of the range of those without units."""
    q, k, v = torch.randn(2, 3, 700, 32), torch.randn(2, 3, 700, 32), torch.randn(2, 3, 700, 24)
    y, rows = torch.randn(3, m, 32), {"log_decay": -0.1 * torch.rand(2, 3, 700), "key_mask": torch.zeros(2, 3, 700)}
    rows["key_mask"][..., 300:310], rows["key_mask"][..., 400:500] = 20.0, -math.inf
    whole, last = SF.set_causal(q, k, v, y, **{name: rows[name] for name in given}, output_final_state=True)
    found, state = [], None
    for at in (slice(0, 192), slice(192, 576), slice(576, 700)):
        piece, own = (t[:, :, at] for t in (q, k, v)), {name: rows[name][:, :, at] for name in given}
        o, state = SF.set_causal(*piece, y, **own, initial_state=state, output_final_state=True)
        found.append(o)
    assert torch.equal(torch.cat(found, 2), whole)
    assert state is not None
    assert torch.equal(state, last)
