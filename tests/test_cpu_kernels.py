"""The C++ CPU backend against the float64 reference: every instruction set, layout, thread count and extreme."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.backends import cpu, eager
from setformer_kernels.backends._extension import MODULE, REASON
from setformer_kernels.problem import SCALARS, Operands, Options, Sinkhorn
from setformer_kernels.testing import (
    ALL_CASES,
    Case,
    assert_typically_within_budget,
    assert_within_budget,
    gradients,
    make,
    measure,
    model_inputs,
)
from setformer_kernels.testing.budget import cast

pytestmark = pytest.mark.skipif(MODULE is None, reason=REASON or "extension loaded")
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
reference = functools.partial(SF.set_attention, backend="reference")
native = functools.partial(SF.set_attention, backend="cpu")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = MODULE.cpu_isa()
    if not MODULE.set_cpu_isa(request.param):
        pytest.skip(f"this machine or build has no {request.param}")
    yield request.param
    MODULE.set_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(case: Case, dtype: torch.dtype) -> None:
    tokens, keywords = make(case)
    inputs = tokens | keywords
    cotangent = torch.randn(case.B, case.H, case.L, case.E, dtype=torch.float64)
    exact, model = model_inputs(reference, inputs, dtype, cotangent)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fast = gradients(native, cast(inputs, wide, dtype), cotangent)
    if dtype == torch.float64:  # the model is the oracle itself here
        for name, result in fast.items():
            allowed = 1e-11 * exact[name].norm().item() + 1e-12  # some gradients are exactly 0
            assert (result - exact[name]).norm().item() <= allowed, name
    else:
        assert_within_budget({n: t for n, t in fast.items() if measure.large(n, t)}, exact, model, case.name)


ISA_CASES = (
    "odd_sizes", "length_63", "many_references", "small_epsilon_wide", "causal_t1", "t0", "positions", "tensors",
    "masked_causal", "masked_odd_sizes", "masked_tensors", "masked_small_epsilon",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ISA_CASES)
def test_every_instruction_set_keeps_the_error_budget(name: str, dtype: torch.dtype, isa: str) -> None:
    check(ALL_CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tensors", "far_positions", "causal_tensors"])
def test_every_instruction_set_keeps_small_gradients_in_the_budget(name: str, dtype: torch.dtype, isa: str) -> None:
    assert_typically_within_budget(*measure.small_gradients(ALL_CASES[name], dtype, "cpu"), name)


@pytest.mark.parametrize("name", ["causal_t1", "causal_tensors", "causal_float_mask"])
def test_the_scale_of_causal_positions_far_apart_keeps_the_budget(name: str, isa: str) -> None:
    """One key holds a column then: ⟨G, v⟩ and h cancel, and what rounding leaves meets logits of thousands."""
    case = dataclasses.replace(ALL_CASES[name], P=2, position_spread=30.0)
    found = measure.small_gradients(case, torch.float32, "cpu", draw=1)
    assert_typically_within_budget(*found, name)
    assert_within_budget(*found.only(lambda name, _: name == "position_scale"), name)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
@pytest.mark.parametrize("name", ["length_1000", "small_epsilon_wide", "unbalanced", "causal_t1", "one_key", "no_key"])
def test_heads_are_shared_among_threads(name: str, num_threads: int, threads: None) -> None:
    torch.set_num_threads(num_threads)
    for heads in (1, 3):
        case = dataclasses.replace(ALL_CASES[name], B=1 if name != "no_key" else 2, H=heads, L=700, S=700)
        check(case, torch.float64)


def random_operands(dtype: torch.dtype = torch.float32, b: int = 2, h: int = 3, n: int = 150, m: int = 20) -> Operands:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = (torch.randn(b, h, n, 24).to(dtype) for _ in range(2))
    v, y = torch.randn(b, h, n, 40).to(dtype), torch.randn(h, m, 24, dtype=wide)
    log_a = torch.randn(b, h, n, dtype=wide).log_softmax(-1)
    log_a[:, :, ::7] = -math.inf
    positions = (
        torch.randn(b, h, n, 3, dtype=wide),
        torch.randn(b, h, n, 3, dtype=wide),
        torch.randn(h, m, 3, dtype=wide),
    )
    log_b = torch.randn(h, m, dtype=wide).log_softmax(-1)
    return Operands(q, k, v, y, log_a, log_b, None, None, None, None, None, *positions, None)


def run_all(x: Operands, opt: Options, d_o: Tensor) -> list[Tensor]:
    needs = [t is not None and i not in (11, 12, 14) for i, t in enumerate(x)]
    o, z, c = cpu.attention(x, opt)
    grads = cpu.attention_backward(x, opt, z, c, d_o, needs)
    return [o, z, c, *(g for g in grads if g is not None)]


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values in another layout."""
    if kind == "every second element":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if kind == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "rows apart":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), math.nan, dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    return t.movedim(0, -2).contiguous().movedim(-2, 0) if t.ndim > 2 else t


@pytest.mark.parametrize("kind", ["every second element", "transposed", "rows apart", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(kind: str, dtype: torch.dtype) -> None:
    x, opt = random_operands(dtype), Options(SCALARS, "rbf", 2)
    d_o = torch.randn(2, 3, 150, 40).to(dtype)
    expected = run_all(x, opt, d_o)
    y = Operands(*(None if t is None else strided(t, kind) for t in x))
    for got, want in zip(run_all(y, opt, strided(d_o, kind)), expected, strict=True):
        assert torch.equal(got, want)


def test_expanded_operands_get_full_gradients() -> None:
    x, opt = random_operands(), Options(SCALARS, "rbf", 3)
    x = x._replace(key=x.key[:, :1].expand_as(x.key), log_a=x.log_a[:, :1].expand_as(x.log_a))
    d_o = torch.randn(2, 3, 150, 40)
    contiguous = Operands(*(None if t is None else t.contiguous() for t in x))
    for got, want in zip(run_all(x, opt, d_o), run_all(contiguous, opt, d_o), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_masked_rows_are_never_read(T: int) -> None:
    x, opt = random_operands(), Options(SCALARS, "rbf", T)
    d_o = torch.randn(2, 3, 150, 40)
    expected = run_all(x, opt, d_o)
    key, value, position = x.key.clone(), x.value.clone(), x.key_position.clone()
    for t, bad in ((key, math.nan), (value, math.inf), (position, 1e30)):
        t[:, :, ::7] = bad
    got = run_all(x._replace(key=key, value=value, key_position=position), opt, d_o)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (got[4][:, :, ::7] == 0).all()  # dk of the masked rows


def test_every_output_is_written(poisoned_memory: None) -> None:
    x = random_operands()
    assert all(t.isfinite().all() for t in run_all(x, Options(SCALARS, "rbf", 3), torch.randn(2, 3, 150, 40)))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_results_repeat_bit_for_bit(num_threads: int, threads: None) -> None:
    torch.set_num_threads(num_threads)
    x, d_o = random_operands(n=500, b=1), torch.randn(1, 3, 500, 40)
    first = run_all(x, Options(SCALARS, "rbf", 3), d_o)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run_all(x, Options(SCALARS, "rbf", 3), d_o), first, strict=True))


@pytest.mark.parametrize("scale", [1e-20, 1e-13, 1.0, 1e10, 1e15])
@pytest.mark.parametrize(
    "opt", [Options(SCALARS, "rbf", 3), Options((1.0, 0.005, 1.0, 1.0, 1.0), "rbf", 50), Options(SCALARS, "rbf", 1)]
)
def test_extreme_scales_stay_finite(scale: float, opt: Options) -> None:
    x = random_operands()
    x = x._replace(query=x.query * scale, key=x.key * scale)
    assert all(t.isfinite().all() for t in run_all(x, opt, torch.randn(2, 3, 150, 40)))
    x = x._replace(value=x.value * min(scale, 1e10))
    assert all(t.isfinite().all() for t in run_all(x, opt, torch.randn(2, 3, 150, 40)))


def test_empty_batches_and_lengths() -> None:
    for b, n in ((0, 5), (2, 0)):
        x = random_operands(b=b, n=max(n, 9))
        x = x._replace(query=x.query[:, :, :n], query_position=x.query_position[:, :, :n])
        outputs = run_all(x, Options(SCALARS, "rbf", 3), torch.randn(b, 3, n, 40))
        assert outputs[0].shape == (b, 3, n, 40)
        assert all(t.isfinite().all() for t in outputs)


@pytest.mark.parametrize("T", [0, 1, 3])
def test_pool_gradients_through_z_and_c(T: int) -> None:
    x, opt = random_operands(torch.float64), Options(SCALARS, "rbf", T)
    x = x._replace(query=None, query_position=None)
    needs = [t is not None and i not in (11, 12, 14) for i, t in enumerate(x)]
    z, c = cpu.pool(x, opt)
    d_z, d_c = torch.randn_like(z), torch.randn_like(c)
    want = eager.pool_backward(x, opt, z, c, d_z, d_c, needs)
    for got, expected in zip(cpu.pool_backward(x, opt, z, c, d_z, d_c, needs), want, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_gradients_asked_for_are_made(causal: bool) -> None:
    x, opt = random_operands(), Options(SCALARS, "rbf", 1)
    d_o = torch.randn(2, 3, 150, 40)
    everything = [t is not None and i not in (11, 12, 14) for i, t in enumerate(x)]
    z, c = cpu.pool(x, opt)

    def run(needs: list[bool]) -> Operands:
        return (
            cpu.causal_backward(x, opt, d_o, needs)[:15] if causal else cpu.attention_backward(x, opt, z, c, d_o, needs)
        )

    full = run(everything)
    for i in (0, 1, 2, 3, 4, 5, 13):
        one = run([j == i for j in range(15)])
        assert [t is not None for t in one] == [j == i for j in range(15)]
        assert torch.allclose(one[i], full[i], rtol=1e-6)


def test_sinkhorn_takes_any_strides() -> None:
    l = torch.randn(3, 40, 30)
    expected = cpu.sinkhorn(Sinkhorn(l, num_iters=5))
    for view in (strided(l, "transposed"), strided(l, "every second element"), strided(l, "rows apart")):
        assert all(torch.equal(a, b) for a, b in zip(cpu.sinkhorn(Sinkhorn(view, num_iters=5)), expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 300, 257), (5, 64, 33), (2, 1, 1), (1, 3, 3000)])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_sinkhorn_and_its_gradients_in_float64(shape: tuple[int, int, int], spread: float, threads: None) -> None:
    torch.set_num_threads(3)
    l = spread * torch.randn(shape, dtype=torch.float64)
    log_a = torch.randn(shape[:2], dtype=torch.float64).log_softmax(-1)
    lam = torch.rand(shape[0], dtype=torch.float64)
    x = Sinkhorn(l, log_a, None, lam, None, (1.0, 0.7), 6)
    got, want = cpu.sinkhorn(x), eager.sinkhorn(x)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, want, strict=True))
    d_f, d_g = torch.randn_like(got[0]), torch.randn_like(got[1])
    needs = (True, True, False, True, False)
    tail = (got[2], got[3], d_f, d_g, needs)
    for a, b in zip(cpu.sinkhorn_backward(x, *tail), eager.sinkhorn_backward(x, *tail), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


def test_wrong_sizes_are_refused_before_any_kernel_runs() -> None:
    x = random_operands()
    for bad in (
        x._replace(value=x.value[:, :, :10]),
        x._replace(references=x.references[:1]),
        x._replace(log_a=x.log_a[:, :1]),
        x._replace(key=x.key.double()),
        x._replace(query_position=None),
    ):
        with pytest.raises(ValueError, match="tensor '"):
            cpu.attention(bad, Options(SCALARS, "rbf", 3))


@pytest.mark.parametrize("center", [False, True])
def test_features_gradients_in_float64(isa: str, center: bool) -> None:
    x, w = torch.randn(2, 3, 70, 19, dtype=torch.float64), torch.randn(3, 13, 19, dtype=torch.float64)
    beta: Any = torch.rand(3, dtype=torch.float64) + 0.5
    psi, expected = (backend.features(x, w, beta, 1.0, 1e-3, center) for backend in (cpu, eager))
    assert torch.allclose(psi, expected, rtol=1e-9, atol=1e-10)
    d_psi, needs = torch.randn_like(psi), (True, True, True)
    pairs = zip(
        cpu.features_backward(x, w, beta, 1.0, 1e-3, center, d_psi, needs),
        eager.features_backward(x, w, beta, 1.0, 1e-3, center, d_psi, needs),
        strict=True,
    )
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-8) for a, b in pairs)


def test_bfloat16_tokens_as_large_as_they_get(isa: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 48).bfloat16() for n in (70, 100, 100))
    y = torch.randn(2, 20, 48)
    expected = native(q, k, v, y)
    for far_q, far_k in ((2.0**100, 1.0), (1.0, 2.0**100), (2.0**-30, 2.0**-30)):
        found = native(q * far_q, k * far_k, v, y)
        assert (found - expected).float().norm() <= 8e-3 * expected.float().norm()


def test_bfloat16_heads_in_and_out_of_range_share_a_call(isa: str, threads: None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 130, 40).bfloat16() for _ in range(3))
    y, epsilon = torch.randn(3, 33, 40), torch.tensor([0.05, 0.004, 0.1])
    mask = torch.rand(2, 130) < 0.7
    mask[1, 1:] = False  # a lone key, whose value is everyone's output
    expected = reference(q.float(), k.float(), v.float(), y, epsilon=epsilon, key_mask=mask, num_iters=2)
    for count in (1, 4):
        torch.set_num_threads(count)
        found = native(q, k, v, y, epsilon=epsilon, key_mask=mask, num_iters=2).float()
        assert (found - expected).norm() <= 1e-2 * expected.norm()
        assert torch.equal(found[1], v[1, :, :1].float().expand_as(found[1]))


@pytest.mark.parametrize("width", [3, 20])
def test_a_group_steps_as_its_heads_do(width: int, isa: str) -> None:
    """Five query heads on one key, whose values do not fill a vector and do; one of the batch takes no part."""
    shapes = ((2, 10, 17), (2, 2, 17), (2, 2, width), (2, 70, 17))
    (q, k, v, y), gates = (torch.randn(*shape, dtype=torch.float64) for shape in shapes), -torch.rand(2, 2)
    states = SF.set_causal(*(torch.randn(2, 2, 30, c, dtype=torch.float64) for c in (17, 17, width)), y,
                           output_final_state=True, backend="reference")[1]  # fmt: skip
    assert states is not None
    wanted = states.clone()
    options: dict[str, Any] = {"log_decay": gates.double(), "key_mask": torch.tensor([True, False])}
    o = SF.set_step(states, q, k, v, y, **options, backend="cpu")
    torch.testing.assert_close(o, SF.set_step(wanted, q, k, v, y, **options, backend="reference"))
    assert o.abs().min() > 0
    sums = [(s[..., :width] + s[..., width + 1 : -2]) * torch.exp2(s[..., -1:]) for s in (states, wanted)]
    torch.testing.assert_close(*sums)
