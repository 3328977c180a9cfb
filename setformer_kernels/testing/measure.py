"""What the budget's tests measure: a backend's results beside the float64 reference and the float32 model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional as SF
from ..problem import HYPER
from .budget import Tensors, assert_half_of_the_digits, assert_within_budget, cast, gradients, model_inputs
from .cases import ALL_CASES, CASES, MASKED_CASES, Case, make

LARGE = 64  # entries
SMALL = (*HYPER, "reference_log_mass", "reference_position")  # gradients of a few numbers a head
SMALL_CASES, MASKED_SMALL_CASES = (
    tuple(case.name for case in cases if case.P or case.tensors or case.log_mass) for cases in (CASES, MASKED_CASES)
)
# Draws of the inputs of 24 heads that make one typical error: its logarithm then has a standard deviation of 0.16.
DRAWS = 4


class Measured(NamedTuple):
    fast: Tensors
    exact: Tensors
    model: Tensors

    def only(self, keep: Callable[[str, Tensor], bool]) -> Measured:
        """Without the results that are not to be kept."""
        return self._replace(fast={name: value for name, value in self.fast.items() if keep(name, value)})

    def check(self, what: str) -> None:
        """Large results within the budget; a few numbers, which `small_gradients` judges, to half of the digits."""
        assert_within_budget(*self.only(large), what)
        assert_half_of_the_digits(*self, what)


def fits(case: Case, dtype: torch.dtype) -> bool:
    """float16 holds no value above 65504 and none below 6e-8."""
    return dtype != torch.float16 or 1e-3 <= case.scale <= 10


def large(name: str, value: Tensor) -> bool:
    """Whether the norm of a result's rounding errors is a property of the code, not of the draw."""
    return value.numel() >= LARGE or name == "output"


def single(name: str, value: Tensor) -> bool:
    """Whether a gradient is one number a head or problem, which only a typical error says something of."""
    return name in HYPER


def _normal(shape: tuple[int, ...], draw: int) -> Tensor:
    """float64 on the default device."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def beside(
    function: Callable[..., Tensor], inputs: dict[str, Any], dtype: torch.dtype, cotangent: Tensor, backend: str
) -> Measured:
    """`function(backend=, **inputs)` by `backend` and by the reference."""
    exact, model = model_inputs(functools.partial(function, backend="reference"), inputs, dtype, cotangent)
    return Measured(_fast(function, inputs, dtype, cotangent, backend), exact, model)


def _fast(
    function: Callable[..., Tensor], inputs: dict[str, Any], dtype: torch.dtype, cotangent: Tensor, backend: str
) -> Tensors:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return gradients(functools.partial(function, backend=backend), cast(inputs, wide, dtype), cotangent)


@functools.cache
def expected(
    case_name: str, dtype: torch.dtype, device: torch.device, draw: int = 0
) -> tuple[dict[str, Any], Tensor, Tensors, Tensors]:
    """(inputs, cotangent, float64 result, float32 model) on the default device, which `device` names for the cache."""
    case = ALL_CASES[case_name]
    tokens, keywords = make(case, draw)
    cotangent = _normal((case.B, case.H, case.L, case.E), draw)
    reference = functools.partial(SF.set_attention, backend="reference")
    return (tokens | keywords, cotangent, *model_inputs(reference, tokens | keywords, dtype, cotangent))


def attention(
    case: Case, dtype: torch.dtype, backend: str, draw: int = 0, function: Callable[..., Tensor] = SF.set_attention
) -> Measured:
    """Output and every gradient, of `set_attention` or of a function that is to be the same."""
    inputs, cotangent, exact, model = expected(case.name, dtype, torch.get_default_device(), draw)
    return Measured(_fast(function, inputs, dtype, cotangent, backend), exact, model)


def many_heads(case: Case) -> Case:
    """The case with few tokens for each of 24 heads."""
    return replace(case, B=1, H=24, L=32, S=32)


def small_gradients(
    case: Case, dtype: torch.dtype, backend: str, draw: int = 0, draws: int = DRAWS,
    function: Callable[..., Tensor] = SF.set_attention,
) -> Measured:  # fmt: skip
    """The gradients SMALL of many heads, [draws, H, ..]."""
    short, found = many_heads(case), []
    for i in range(draws):
        tokens, keywords = make(short, draw * draws + i)
        cotangent = _normal((short.B, short.H, short.L, short.E), draw * draws + i)
        found.append(beside(function, tokens | keywords, dtype, cotangent, backend))
    names = [name for name in SMALL if name in found[0].fast]
    fast, exact, model = (
        {n: torch.stack([r[n] for r in results]) for n in names} for results in zip(*found, strict=True)
    )
    return Measured(fast, exact, model)


READ = (*("kernel", "bandwidth", "epsilon", "reference_position", "position_scale", "backend"),
        *("query_position", "dropout_p", "seed"))  # fmt: skip


def halves(query: Tensor, key: Tensor, value: Tensor, references: Tensor, **options: Any) -> Tensor:
    """`set_attention` as `set_read` of `set_transport`."""
    carried = {name: option for name, option in options.items() if name not in READ[-3:]}
    memory = SF.set_transport(key, value, references, **carried)
    return SF.set_read(query, memory, references, **{name: options[name] for name in READ if name in options})


def _pool(query: Tensor | None = None, query_position: Tensor | None = None, **keywords: Any) -> Tensor:
    return SF.set_pool(**{k: v for k, v in keywords.items() if k not in ("dropout_p", "seed", "causal")})


def pooling(case: Case, dtype: torch.dtype, backend: str, draw: int = 0) -> Measured:
    """set_pool and every gradient."""
    tokens, keywords = make(case, draw)
    inputs = {k: v for k, v in (tokens | keywords).items() if not k.startswith("query")}
    cotangent = _normal((case.B, case.H, case.M, case.E), draw)
    return beside(_pool, inputs, dtype, cotangent, backend)


def _weights(value: Tensor | None = None, **keywords: Any) -> Tensor:
    return SF.set_attention_weights(**keywords)


def weights(case: Case, dtype: torch.dtype, backend: str, draw: int = 0) -> Measured:
    """set_attention_weights and every gradient."""
    tokens, keywords = make(case, draw)
    inputs = {name: t for name, t in (tokens | keywords).items() if name != "value"}
    return beside(_weights, inputs, dtype, _normal((case.B, case.H, case.L, case.S), draw), backend)


FEATURES = {  # N, R, D, center
    "plain": (100, 7, 16, False),
    "square": (65, 64, 64, False),
    "one": (1, 1, 5, False),
    "wide": (33, 16, 256, False),
    "centred": (100, 7, 16, True),
    "centred_square": (65, 64, 64, True),
    "centred_few": (33, 3, 6, True),
}


def _features(key: Tensor, landmarks: Tensor, **keywords: Any) -> Tensor:
    return SF.nystrom_features(key, landmarks, **keywords)  # "key" is cast to the token dtype


def features(name: str, tensor_bandwidth: bool, dtype: torch.dtype, backend: str, draw: int = 0) -> Measured:
    """nystrom_features; with many heads where the bandwidth's gradient is looked at."""
    n, r, d, center = FEATURES[name]
    heads = 24 if tensor_bandwidth else 3
    key, landmarks = _normal((2, heads, n, d), draw), _normal((heads, r, d), draw + 1)
    key[0, 0, 0] = 0
    if center:
        landmarks[0, 0] = 0
    inputs: dict[str, Any] = {"key": key, "landmarks": landmarks, "center": center}
    if tensor_bandwidth:
        inputs["bandwidth"] = torch.linspace(0.7, 1.5, heads, dtype=torch.float64)
    return beside(_features, inputs, dtype, _normal((2, heads, n, r), draw + 2), backend)


SINKHORN = ("plain", "masses", "minus_infinity", "wide", "relaxed", "tolerance")


def sinkhorn(kind: str, num_iters: int, dtype: torch.dtype, backend: str, draw: int = 0) -> Measured:
    """The plan of `functional.sinkhorn` and every gradient, for 128 problems."""
    l = 2 * _normal((16, 8, 37, 21), draw)
    inputs: dict[str, Any] = {"log_kernel": 100 * l if kind == "wide" else l}
    if kind in ("masses", "relaxed"):
        inputs |= {
            "log_a": _normal((16, 8, 37), draw + 1).log_softmax(-1),
            "log_b": _normal((16, 8, 21), draw + 2).log_softmax(-1),
        }
    if kind == "relaxed":
        # Not both near 1: after 7 iterations one such problem would make nine tenths of the squares of all 128.
        relaxations = 0.2 + 0.7 * _normal((2, 16, 8), draw + 3).sigmoid()
        inputs |= {"key_relaxation": relaxations[0], "reference_relaxation": relaxations[1]}
    if kind == "minus_infinity":
        l[0, 0, 3], l[0, 1, :, 2], l[1, 0, 4, 5] = -math.inf, -math.inf, -math.inf
    keywords: dict[str, Any] = {"num_iters": num_iters} | ({"tol": 0.3} if kind == "tolerance" else {})

    def plan(log_kernel: Tensor, backend: str, **given: Any) -> Tensor:
        f, g = SF.sinkhorn(log_kernel, backend=backend, **given, **keywords)
        return (log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()

    return beside(plan, inputs, dtype, _normal(tuple(l.shape), draw + 4), backend)
