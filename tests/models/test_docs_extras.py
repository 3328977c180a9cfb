"""What the pages of docs/ show of timm, transformers and torchvision runs as they show it."""

from __future__ import annotations

from pathlib import Path

import docs_pages
import pytest


@pytest.mark.parametrize("page", docs_pages.pages(with_extras=True))
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    docs_pages.run(page)
