"""`python -m benchmarks.gpu.smoke`: every GPU kernel once, on small sizes; what compute-sanitizer watches."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import setformer_kernels.functional as SF
from benchmarks.common import entry_point
from setformer_kernels import dispatch
from setformer_kernels.problem import Problem

B, H, L, S, D, E, M, P = 2, 2, 70, 130, 48, 32, 20, 2  # ragged everywhere: tiles have tails in every direction
USUAL = 64
NARROW, LONG = 16, 4096  # of one head, whose bundles go side by side on the smallest device
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# B, S and ε: a cluster of several blocks; more heads than blocks run at a time; the log domain; heads whose blocks take
# the whole device, more than its clusters do.
USUAL_SIZES = ((1, 600, 0.05), (200, 20, 0.05), (1, 70, 0.001), (8, 4096, 0.05))


def _leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


def usual(backend: str, device: str, dtype: torch.dtype, *, heads: int, keys: int, epsilon: float) -> Tensor:
    """Attention with M = D = E = 64, for which the CUDA kernels are compiled apart."""
    x = [_leaf(heads, 2, keys, USUAL, dtype=dtype, device=device) for _ in range(3)]
    y = _leaf(2, USUAL, USUAL, dtype=torch.float32, device=device)
    return SF.set_attention(*x, y, epsilon=epsilon, num_iters=3, backend=backend)


def attention(backend: str, device: str, dtype: torch.dtype, *, causal: bool, rich: bool) -> Tensor:
    """One attention call; `rich` with a mask, positions, hyperparameters as tensors and dropout."""
    keys = L if causal else S
    q, k = (_leaf(B, H, n, D, dtype=dtype, device=device) for n in (L, keys))
    v = _leaf(B, H, keys, E, dtype=dtype, device=device)
    y = _leaf(H, M, D, dtype=torch.float32, device=device)
    options = {}
    if rich:
        single = {"dtype": torch.float32, "device": device}
        options = {
            "key_mask": torch.arange(keys, device=device).expand(B, keys) % 3 > 0,
            "reference_log_mass": _leaf(H, M, **single),
            "bandwidth": torch.full((H,), 1.1, **single, requires_grad=True),
            "epsilon": torch.full((H,), 0.1, **single, requires_grad=True),
            "query_position": torch.rand(L, P, **single),
            "key_position": torch.rand(keys, P, **single),
            "reference_position": torch.rand(H, M, P, **single, requires_grad=True),
            "dropout_p": 0.1,
        }
    return SF.set_attention(q, k, v, y, num_iters=1 if causal else 3, causal=causal, backend=backend, **options)


def masked(backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """Attention under a float mask that learns."""
    q, k = (_leaf(B, H, n, D, dtype=dtype, device=device) for n in (L, S))
    v, y = _leaf(B, H, S, E, dtype=dtype, device=device), _leaf(H, M, D, dtype=torch.float32, device=device)
    mask = _leaf(L, S, dtype=torch.float32, device=device)
    return SF.set_attention(q, k, v, y, num_iters=2, attn_mask=mask, backend=backend)


def streamed(backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """A scan with gates, and one more token on the state that it leaves."""
    q, k = (_leaf(B, H, L, D, dtype=dtype, device=device) for _ in range(2))
    v, y = _leaf(B, H, L, E, dtype=dtype, device=device), _leaf(H, M, D, dtype=torch.float32, device=device)
    decay = -torch.rand(B, H, L, device=device, dtype=torch.float32)
    options = {"log_decay": decay.requires_grad_(), "output_final_state": True, "backend": backend}
    o, state = SF.set_causal(q, k, v, y, **options)
    assert state is not None
    with torch.no_grad():
        last = SF.set_step(state.clone(), q[:, :, 0], k[:, :, 0], v[:, :, 0], y, backend=backend)
    return torch.cat((o, last.unsqueeze(2)), 2)


def side_by_side(backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """A scan of one head, long enough for its bundles to go side by side."""
    q, k, v = (_leaf(1, 1, LONG, NARROW, dtype=dtype, device=device) for _ in range(3))
    y = _leaf(1, NARROW, NARROW, dtype=torch.float32, device=device)
    return SF.set_attention(q, k, v, y, num_iters=1, causal=True, backend=backend)


def packed(backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """A causal pack of three sequences, one of them empty."""
    q, k = (_leaf(L + S, H, D, dtype=dtype, device=device) for _ in range(2))
    v, y = _leaf(L + S, H, E, dtype=dtype, device=device), _leaf(H, M, D, dtype=torch.float32, device=device)
    cu = torch.tensor([0, L, L, L + S], dtype=torch.int32, device=device)
    return SF.set_attention_varlen(q, k, v, y, cu, cu, num_iters=1, causal=True, backend=backend)


def converged(backend: str, device: str, dtype: torch.dtype, *, method: str) -> Tensor:
    """Transport from a pass and iterations or Newton's steps, with the gradient of the fixed point."""
    k, v = _leaf(B, H, S, D, dtype=dtype, device=device), _leaf(B, H, S, E, dtype=dtype, device=device)
    y = _leaf(H, M, D, dtype=torch.float32, device=device)
    return SF.set_pool(k, v, y, num_iters=8, method=method, grad="implicit", backend=backend)


def newton(backend: str, device: str) -> Tensor:
    """Potentials of given costs, by Newton's method."""
    l = _leaf(3, S, M, dtype=torch.float32, device=device)
    f, g = SF.sinkhorn(l, num_iters=8, method="newton", grad="implicit", backend=backend)
    return torch.cat([f, g], dim=-1)


def features(backend: str, device: str, dtype: torch.dtype) -> Tensor:
    """Nyström features."""
    landmarks = _leaf(H, M, D, dtype=torch.float32, device=device)
    return SF.nystrom_features(_leaf(B, H, S, D, dtype=dtype, device=device), landmarks, backend=backend)


def sinkhorn(backend: str, device: str, rows: int) -> Tensor:
    """Potentials of a few problems."""
    f, g = SF.sinkhorn(_leaf(3, rows, M, dtype=torch.float32, device=device), num_iters=5, backend=backend)
    return torch.cat([f, g], dim=-1)


def calls(device: str) -> Iterator[tuple[Problem, Callable[[str], Tensor]]]:
    """(problem, call of a backend's name) for everything above."""
    for op, dtype, call in ragged_calls(device):
        yield Problem(op, device, dtype, D=D, E=E, M=M, num_iters=1 if "causal" in op else 3), call
    for dtype, method in itertools.product((torch.bfloat16, torch.float32), ("sinkhorn", "newton")):
        problem = Problem("pool", device, dtype, D=D, E=E, M=M, num_iters=8, converged="implicit")
        yield problem, partial(converged, device=device, dtype=dtype, method=method)
    yield (
        Problem("sinkhorn", device, torch.float32, M=M, num_iters=8, converged="implicit"),
        partial(newton, device=device),
    )
    for dtype, (heads, keys, epsilon) in itertools.product((torch.bfloat16, torch.float16, torch.float32), USUAL_SIZES):
        sizes = {"D": USUAL, "E": USUAL, "M": USUAL, "B": heads, "H": 2, "L": keys, "N": keys}
        problem = Problem("attention", device, dtype, num_iters=3, **sizes)
        yield problem, partial(usual, device=device, dtype=dtype, heads=heads, keys=keys, epsilon=epsilon)


def ragged_calls(device: str) -> Iterator[tuple[str, torch.dtype, Callable[[str], Tensor]]]:
    """(op, dtype, call of a backend's name), sizes that are multiples of nothing."""
    for dtype in (torch.bfloat16, torch.float32):
        for op, rich in itertools.product(("attention", "causal"), (False, True)):
            options = {"device": device, "dtype": dtype, "causal": op == "causal", "rich": rich}
            yield op, dtype, partial(attention, **options)
        for op, call in (
            ("masked", masked), ("causal", streamed), ("causal", side_by_side), ("packed_causal", packed),
            ("features", features),
        ):  # fmt: skip
            yield op, dtype, partial(call, device=device, dtype=dtype)
    for rows in (30, 1000):
        yield "sinkhorn", torch.float32, partial(sinkhorn, device=device, rows=rows)


def main(argv: list[str] | None = None) -> int:
    """Forward and backward of everything the GPU backends run; 1 where a result is not finite."""
    names = [name for name in dispatch.NATIVE if name != "cpu"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=names, action="append", help="only this one (repeatable)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="tokens of this type only")
    arguments = parser.parse_args(argv)
    ran = 0
    for name in arguments.backend or names:
        for problem, call in calls(arguments.device):
            ways = problem, replace(problem, backward=True)
            if any(dispatch.NATIVE[name].unsupported_reasons(way) for way in ways):
                continue
            if arguments.dtype and problem.op != "sinkhorn" and problem.dtype != DTYPES[arguments.dtype]:
                continue
            what = f"{name} {problem.op} {problem.dtype} D={problem.D} M={problem.M}"
            print(what, flush=True)  # the last one printed is the one that did not return
            output = call(name)
            output.float().square().sum().backward()
            if not output.isfinite().all():
                print(f"{what}: not finite", file=sys.stderr)
                return 1
            ran += 1
    if not ran:
        raise entry_point.NotHereError(f"no GPU backend can run here: {dispatch.available_backends()}")
    print(f"{ran} calls, forward and backward")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.gpu.smoke", main)
