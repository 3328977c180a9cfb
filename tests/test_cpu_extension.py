"""The extension itself: instruction sets chosen at run time, one OpenMP runtime, and life without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from setformer_kernels.backends import _extension, cpu
from setformer_kernels.backends._extension import MODULE, REASON, view
from setformer_kernels.problem import Operands, Problem

built = pytest.mark.skipif(MODULE is None, reason=REASON or "extension loaded")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@built
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "import torch; from setformer_kernels import _C; print(_C.cpu_isa())"
    for isa in ("generic", "avx2", "avx512", "avx512bf16", "amx"):
        if MODULE.has_cpu_isa(isa):
            assert python(code, SETFORMER_KERNELS_CPU_ISA=isa).stdout.strip() == isa


@built
def test_an_unknown_instruction_set_is_refused() -> None:
    before = MODULE.cpu_isa()
    assert not MODULE.set_cpu_isa("mmx")
    assert MODULE.cpu_isa() == before


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_extension() -> None:
    code = (
        "import torch; from setformer_kernels.backends import cpu; torch.set_num_threads(2);"
        "from setformer_kernels.problem import Sinkhorn;"
        "torch.randn(600, 600) @ torch.randn(600, 600);"
        "cpu.sinkhorn(Sinkhorn(torch.randn(8, 200, 200), num_iters=20));"
        "print(len(__import__('os').listdir('/proc/self/task')))"
    )
    if not MODULE.has_openmp():
        pytest.skip("built without OpenMP")
    alone = python("import torch; torch.set_num_threads(2); torch.randn(600, 600) @ torch.randn(600, 600);"
                   "print(len(__import__('os').listdir('/proc/self/task')))")  # fmt: skip
    assert python(code).stdout == alone.stdout  # a second runtime would start threads of its own


def test_without_the_extension_the_reference_runs_and_the_reason_is_told() -> None:
    code = (
        "import sys; sys.modules['setformer_kernels._C'] = None;"
        "import torch, setformer_kernels as sk, setformer_kernels.functional as SF;"
        "x = torch.randn(1, 2, 5, 4); SF.set_attention(x, x, x, torch.randn(2, 3, 4));"
        "print(sk.available_backends()['cpu'][0])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "extension" in result.stdout


@built
def test_the_extension_names_its_operands_as_python_does() -> None:
    assert Operands._fields[:-1] == MODULE.OPERANDS


@built
def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "OPERANDS", MODULE.OPERANDS[::-1])
    module, why = _extension._load()
    assert module is None
    assert "another version" in why


@built
def test_a_wrong_tensor_is_named() -> None:
    tensors = [None] * len(MODULE.OPERANDS)
    key = torch.zeros(1, 2, 3, 4)
    tensors[1] = tensors[2] = view(key)
    tensors[3] = view(torch.zeros(2, 5, 4))
    tensors[MODULE.OPERANDS.index("epsilon")] = view(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="'epsilon' has the wrong dtype"):
        MODULE.attention(tuple(tensors), (1.0,) * 5, False, 1, 0.0, 0, 1, None, None, None)


def test_limits_are_told() -> None:
    assert any(
        "references" in r for r in cpu.unsupported_reasons(Problem("attention", "cpu", torch.float32, 64, 64, 5000))
    )
    assert any(
        "head dims" in r for r in cpu.unsupported_reasons(Problem("attention", "cpu", torch.float32, 5000, 64, 64))
    )
    assert any("cuda" in r for r in cpu.unsupported_reasons(Problem("attention", "cuda", torch.float32, 64, 64, 64)))
    assert any("int64" in r for r in cpu.unsupported_reasons(Problem("attention", "cpu", torch.int64, 64, 64, 64)))
    assert any("num_iters" in r for r in cpu.unsupported_reasons(Problem("causal", "cpu", torch.float32, num_iters=2)))


@built
def test_probes_measure_something() -> None:
    assert MODULE.fma_peak(0.01, 1) > 1e8
    assert MODULE.exp_rate(0.01, 1) > 1e6
    assert MODULE.copy_bandwidth(0.01, 1, 1 << 20) > 1e7
