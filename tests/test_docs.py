"""What the pages of docs/ show runs as they show it."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import docs_pages
import pytest
import torch
from torch import nn

ALL = sorted(path.relative_to(docs_pages.DOCS).as_posix() for path in docs_pages.DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", docs_pages.pages(with_extras=False))
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    docs_pages.run(page)


@pytest.mark.parametrize("page", ALL)
def test_the_links_of_a_page_lead_to_files(page: str) -> None:
    path = docs_pages.DOCS / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", ALL)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (docs_pages.DOCS / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:setformer_kernels|csrc|tests|benchmarks|demo|docs)/[\w./-]+)`", text)
    root = docs_pages.DOCS.parent
    missing = [name for name in named if not (root / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", [*ALL, "../README.md"])
def test_the_commands_of_a_page_exist(page: str) -> None:
    text = (docs_pages.DOCS / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n.*?```|`[^`\n]+`", text, re.DOTALL))
    modules = [name for name in re.findall(r"python -m ([\w.]+)", code) if importlib.util.find_spec(name) is None]
    makefile = (docs_pages.DOCS.parent / "Makefile").read_text(encoding="utf-8")
    targets = [
        name for name in re.findall(r"\bmake ([a-z][a-z-]*)", code) if not re.search(rf"^{name}:", makefile, re.M)
    ]
    assert modules == targets == []


def test_the_code_of_the_readme_runs() -> None:
    x, padding = torch.randn(2, 20, 512), torch.zeros(2, 20, dtype=torch.bool)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 1, enable_nested_tensor=False)
    docs_pages.run("../README.md", x=x, padding=padding, model=model, sample=torch.randn(80, 1, 32))


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(docs_pages.DOCS / "tutorial" / "transport_attention.py"), run_name="__main__")
    assert "kernel against reference" in capsys.readouterr().out
