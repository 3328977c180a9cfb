"""Run with the Python of an environment that has the installed wheel: its kernels run and agree with the reference."""

from __future__ import annotations

from pathlib import Path

import torch

import setformer_kernels as sk
import setformer_kernels.functional as SF
from setformer_kernels.dispatch import select, typical_problem

assert "site-packages" in Path(sk.__file__).parts, f"not an installed package: {sk.__file__}"
assert select(typical_problem()) == "cpu", sk.available_backends()

torch.manual_seed(0)
q, k, v, y = (torch.randn(shape) for shape in [(2, 4, 50, 16)] * 3 + [(4, 8, 16)])
results = []
for backend in ("cpu", "reference"):
    inputs = [t.clone().requires_grad_() for t in (q, k, v, y)]
    output = SF.set_attention(*inputs, backend=backend)
    output.square().sum().backward()
    results.append([output, *(t.grad for t in inputs)])
for fast, plain in zip(*results, strict=True):
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
x = torch.randn(2, 10, 32)
output, weights = sk.SeTAttention(32, 4, batch_first=True)(x, x, x)
assert output.shape == x.shape
assert weights is not None
assert torch.allclose(weights.sum(-1), torch.ones(2, 10), atol=1e-5)
maps = Path("/proc/self/maps").read_text().splitlines()
pools = {line.split()[-1] for line in maps if "libgomp" in line}
print(f"setformer_kernels {sk.__version__}, torch {torch.__version__}: as the reference; threads of {', '.join(pools)}")
