"""What the pages of docs/ show of timm, transformers, torchvision and ONNX runs as they show it."""

from __future__ import annotations

from pathlib import Path

import docs_pages
import pytest


@pytest.mark.parametrize("page", docs_pages.pages(with_extras=True))
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in docs_pages.extras_of(page):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    docs_pages.run(page)
