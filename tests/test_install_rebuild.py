"""An edit of a source compiles again what includes it, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "setformer_kernels")
# Writes down what each source includes, and compiles nothing.
COMPILER = """#!/bin/sh
last= source= object=
for word in "$@"; do
  case "$last" in -c) source=$word ;; -o) object=$word ;; esac
  last=$word
done
case " $* " in
*" -shared "*) : > "$object" ;;
*" -c "*) echo "$source" >> "$COMPILED"; exec g++ "$@" -E -MF "${object%.o}.d" ;;
*) exec g++ "$@" ;;
esac
"""

# Says where its toolkit is, writes down what it compiles with which flags, and that all includes launch.cuh.
NVCC = """#!/bin/sh
case " $* " in
*" --split-compile=0 "*) test -z "$OLD_NVCC" || exit 1 ;;
esac
case " $* " in
*" --dryrun "*) echo '#$ TOP=toolkit' >&2; exit 0 ;;
esac
last= source= object= record=
for word in "$@"; do
  case "$last" in -c) source=$word ;; -o) object=$word ;; -MF) record=$word ;; esac
  last=$word
done
echo "$source.nvcc" >> "$COMPILED"
echo "$*" >> "$COMPILED.flags"
echo "$object : $source csrc/cuda/launch.cuh" > "$record"
: > "$object"
"""

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="stands on g++'s record of what a source includes"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, and a compiler in it."""
    pytest.importorskip("pybind11")
    for name in INPUTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for built in (tmp_path / "setformer_kernels").glob("_C*"):
        built.unlink()
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    return tmp_path


EDITABLE = ("-c", "import setuptools.build_meta as backend; backend.build_editable('wheels')")  # as pip install -e


def compiled(tree: Path, *command: str, **environment: str) -> list[str]:
    """What a build in `tree` compiles, in alphabetical order."""
    record = tree / "compiled.txt"
    record.write_text("")
    compiler = {"CC": str(tree / "compiler"), "CXX": str(tree / "compiler"), "COMPILED": str(record)}
    chosen = {"SETFORMER_KERNELS_CUDA": "0", "SETFORMER_KERNELS_CPU_BUILD": "native"} | environment
    done = subprocess.run(
        [sys.executable, *(command or ("setup.py", "build_ext"))],
        cwd=tree,
        env=os.environ | compiler | chosen,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WITHOUT" not in done.stderr, done.stderr
    return sorted(Path(source).stem for source in record.read_text().splitlines())


def test_only_what_includes_an_edited_file_is_compiled_again(tree: Path) -> None:
    everything = compiled(tree)
    assert {"bindings", "dispatch", "attention", "sinkhorn"} < set(everything)
    assert len(everything) == len(set(everything)), "one instruction set: each source once"
    assert compiled(tree) == []
    header = tree / "csrc" / "cpu" / "transport_backward.h"
    header.write_text(header.read_text() + "// edited\n")
    of_every_processor = [name for name in compiled(tree) if name != "bf16"]
    assert of_every_processor == ["attention_backward", "masked_backward", "packed", "sinkhorn"]
    (tree / "csrc" / "cuda" / "launch.cuh").touch()
    assert compiled(tree) == []


def test_another_editable_install_compiles_the_bindings_alone(tree: Path) -> None:
    """pip gives pybind11 a folder of its own each time, which the kernels know nothing of."""
    import pybind11

    (tree / "wheels").mkdir()
    assert {"bindings", "attention"} < set(compiled(tree, *EDITABLE))
    assert compiled(tree, *EDITABLE) == []
    shutil.copytree(Path(pybind11.__file__).parent, tree / "elsewhere" / "pybind11")
    assert compiled(tree, *EDITABLE, PYTHONPATH=str(tree / "elsewhere")) == ["bindings"]


@pytest.fixture
def nvcc(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvcc, which the build finds."""
    made = tree / "toolkit" / "bin" / "nvcc"
    made.parent.mkdir(parents=True)
    made.write_text(NVCC)
    made.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tree / "toolkit"))
    monkeypatch.setenv("SETFORMER_KERNELS_CUDA_ARCHS", "90")
    return made


def test_of_the_cuda_kernels_too_only_what_includes_an_edited_file(tree: Path, nvcc: Path) -> None:
    sources = sorted(path.stem for path in (tree / "csrc" / "cuda").glob("*.cu"))
    first = [Path(name).stem for name in compiled(tree, SETFORMER_KERNELS_CUDA="1") if name.endswith(".cu")]
    assert first == sources
    assert compiled(tree, SETFORMER_KERNELS_CUDA="1") == []
    (tree / "csrc" / "cuda" / f"{sources[0]}.cu").touch()
    assert compiled(tree, SETFORMER_KERNELS_CUDA="1") == [f"{sources[0]}.cu"]
    (tree / "csrc" / "cuda" / "launch.cuh").touch()
    assert [Path(name).stem for name in compiled(tree, SETFORMER_KERNELS_CUDA="1")] == sources
    assert compiled(tree, SETFORMER_KERNELS_CUDA="1", SETFORMER_KERNELS_CUDA_ARCHS="80") == [f"{s}.cu" for s in sources]


@pytest.mark.parametrize("old", ["", "1"])
def test_the_kernels_of_a_file_are_compiled_side_by_side_where_nvcc_can(tree: Path, nvcc: Path, old: str) -> None:
    compiled(tree, SETFORMER_KERNELS_CUDA="1", OLD_NVCC=old)
    calls = (tree / "compiled.txt.flags").read_text().splitlines()
    assert calls
    assert all(("--split-compile=0" in call.split()) == (not old) for call in calls)


def test_another_choice_of_instruction_sets_compiles_what_is_missing(tree: Path) -> None:
    compiled(tree)
    more = compiled(tree, SETFORMER_KERNELS_CPU_BUILD="all")
    assert "dispatch" in more
    assert "bindings" not in more


def test_an_unknown_choice_is_refused(tree: Path) -> None:
    environment = os.environ | {"SETFORMER_KERNELS_CPU_BUILD": "fast", "SETFORMER_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "SETFORMER_KERNELS_CPU_BUILD must be all or native, got 'fast'" in done.stderr
