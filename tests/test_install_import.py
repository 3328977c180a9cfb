"""A fresh process imports the package with nothing optional present, quickly, and `info` tells what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import setformer_kernels as sk

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "import sys; sys.modules['triton'] = None; sys.modules['setformer_kernels._C'] = None\n"
ATTENTION = """
import torch, setformer_kernels as sk, setformer_kernels.functional as SF
q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
o = SF.set_attention(q, k, v, torch.randn(3, 4, 8))
o.sum().backward()
assert o.shape == (2, 3, 5, 8) and all(x.grad.isfinite().all() for x in (q, k, v))
"""
INFO = (
    "import runpy; sys.argv = ['setformer_kernels', 'info']; runpy.run_module('setformer_kernels', run_name='__main__')"
)


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::DeprecationWarning:setformer_kernels", *arguments]
    return subprocess.run(command, cwd=ROOT, check=check, capture_output=True, text=True, timeout=120)


def test_works_without_triton_and_without_the_extension() -> None:
    code = BLOCK + ATTENTION + "reasons = sk.available_backends(); assert reasons['cpu'] and not reasons['reference']"
    run("-c", code)


def test_named_native_backend_without_the_extension_says_why() -> None:
    code = BLOCK + "import torch, setformer_kernels.functional as SF\nx = torch.randn(1, 1, 4, 8)\n"
    failed = run("-c", code + "SF.set_attention(x, x, x, torch.randn(1, 4, 8), backend='cpu')", check=False)
    assert failed.returncode == 1
    assert re.search(r"ValueError: .*'cpu' cannot run.*_C", failed.stderr)


def test_import_adds_nothing_heavy_to_torch() -> None:
    # torch's own flop counter imports triton where that is installed.
    code = (
        "import sys, torch, torch.utils.flop_counter; before = set(sys.modules); "
        "import setformer_kernels; print(*set(sys.modules) - before)"
    )
    added = {name.partition(".")[0] for name in run("-c", code).stdout.split()}
    heavy = {"triton", "sklearn", "matplotlib", "scipy", "ot", "geomloss", "tqdm", "hypothesis", "pytest", "demo"}
    heavy |= {"timm", "transformers", "torchvision", "accelerate"}
    assert "setformer_kernels" in added
    assert not added & heavy


def test_models_need_no_extra() -> None:
    code = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('timm', 'transformers', 'torchvision')]; "
        "import torch; from setformer_kernels.models import *; "
        "assert setformer_nano()(torch.randn(1, 3, 32, 32)).shape == (1, 1000); "
        "replace_attention(torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2)]))"
    )
    run("-c", code)


def test_import_takes_less_than_two_seconds_of_cpu_beyond_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); import setformer_kernels; print(time.process_time() - start)"
    )
    assert float(run("-c", code).stdout) < 2.0


def test_version_is_the_one_of_pyproject() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert sk.__version__ == declared[1]


def test_changelog_has_the_version() -> None:
    assert f"## [{sk.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_info_names_versions_backends_and_the_choice_of_auto() -> None:
    out = run("-m", "setformer_kernels", "info").stdout
    assert f"setformer_kernels {sk.__version__}" in out
    assert f"torch {torch.__version__}" in out
    for name, reasons in sk.available_backends().items():
        expected = "cannot run: " + re.escape("; ".join(reasons)) if reasons else "can run"
        assert re.search(rf"^  {name} +{expected}$", out, re.MULTILINE)
    assert re.search(r"attention float32 cpu +(cpu|reference)$", out, re.MULTILINE)
    for target in ("NVIDIA sm_80, sm_100", r"AMD gfx90a, gfx942 \(ROCm\)"):
        assert re.search(rf"^  {target} +compiled, never run$", out, re.MULTILINE)


def test_info_without_the_extension_gives_the_reason_and_falls_back() -> None:
    out = run("-c", BLOCK + INFO).stdout
    assert re.search(r"^  cpu +cannot run: .+", out, re.MULTILINE)
    assert re.search(r"^  reference +can run$", out, re.MULTILINE)
    assert re.search(r"attention float32 cpu +reference$", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_unknown_command_prints_usage(arguments: list[str]) -> None:
    result = run("-m", "setformer_kernels", *arguments, check=False)
    assert result.returncode == 2
    assert "usage: python -m setformer_kernels" in result.stderr
