"""Every command of the repository reads its arguments before it does anything, and ends with a sentence where what it
needs is not there."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY = 'if __name__ == "__main__":'
FOLDERS = ("benchmarks", "demo", "setformer_kernels")
PATHS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if ENTRY in path.read_text("utf-8")]
COMMANDS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in PATHS)
# What a machine may lack: each name is an import that fails.
ABSENT = ("triton", "sklearn", "tqdm", "matplotlib", "ot", "geomloss")
BLOCK = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
RUN = BLOCK + "runpy.run_module(sys.argv.pop(1), run_name='__main__')"


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """The exit status of `python -m name arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    for module in [module for module in sys.modules if module == f"{name}.__main__" or module == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_it_is_used_and_does_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(*_: object, **__: object) -> None:
        raise AssertionError("a command that was asked for help started a process or wrote a file")

    monkeypatch.setattr(subprocess, "Popen", written)
    monkeypatch.setattr(Path, "write_text", written)
    assert run_here(monkeypatch, name, "--help") == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(monkeypatch, name, "--no-such-option") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo"], "sklearn, matplotlib, tqdm missing: pip install '.[demo]'"),
        (["benchmarks.compiled.cuda_resources"], "benchmarks.compiled.cuda_resources: needs nvcc and c++filt on PATH"),
        (["benchmarks.compiled.cuda_instructions"], "benchmarks.compiled.cuda_instructions: needs nvcc on PATH"),
        (["benchmarks.compiled.tune", "attention", "--kind", "row"], "triton is missing: pip install '.[triton]'"),
        (["benchmarks.gpu.smoke"], "no GPU backend can run here"),
        (["benchmarks.quality", "--out", "x.csv"], "is missing: pip install '.[demo]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_missing_is_named_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
