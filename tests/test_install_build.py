"""Install cannot fail: sdist and wheel build without a compiler, and what they install works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "setformer_kernels")
BUILT = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "build")
NO_COMPILER = dict.fromkeys(("CC", "CXX", "LDSHARED"), "/nonexistent/compiler")
# An editable install of this package would otherwise lend its own extension to the wheel's copy.
USE = """
import sys; sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import torch, setformer_kernels as sk, warnings
assert sk.__file__.startswith({site!r}), sk.__file__
attention, x = sk.SeTAttention(16, 2, batch_first=True, num_references=64), torch.randn(2, 6, 16)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert attention(x, x, x)[0].isfinite().all()
(reason,) = sk.available_backends()["cpu"]
assert "no C++ compiler was found" in reason and "apt install g++" in reason, reason
x = torch.randn(1, 4096, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        attention(x, x, x, need_weights=False)
assert [str(w.message).count("apt install g++") for w in caught] == [1], caught
"""

pytest.importorskip("pybind11", reason="builds run here without isolation and need the build requirements")


def build(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """Run a hook of the build backend in `source`, as pip does; the path of the file it made."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(out)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("WITHOUT its C++ kernels: no C++ compiler" in done.stderr) == ("CXX" in environment), done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of an sdist, unpacked."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=BUILT)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, checkout / name)
    with tarfile.open(build("build_sdist", checkout, out)) as archive:
        archive.extractall(out)
    return next(path for path in out.iterdir() if path.is_dir())


def test_sdist_has_every_source_the_extension_needs(sdist: Path) -> None:
    needed = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".hpp", ".inc", ".cu", ".cuh")
    ]
    needed = [path.relative_to(ROOT) for path in needed if "testing" not in path.parts]
    assert needed
    assert [str(path) for path in needed if not (sdist / path).exists()] == []


def test_wheel_without_a_compiler_installs_and_works(sdist: Path, tmp_path: Path) -> None:
    wheel = build("build_wheel", sdist, tmp_path, **NO_COMPILER)
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", USE.format(site=str(site))]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_wheel_has_the_typing_marker_and_no_tests(sdist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_wheel", sdist, tmp_path, **NO_COMPILER)) as wheel:
        names = wheel.namelist()
    assert {"setformer_kernels/py.typed", "setformer_kernels/_C.missing.txt"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "demo/", "benchmarks/")) or name.endswith(".so")]
