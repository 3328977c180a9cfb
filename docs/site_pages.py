"""A hook of mkdocs: files of the repository that pages link to stand in the site under repository/.

On GitHub a page's `../benchmarks/README.md` leads there; a site knows only files below its own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
DERIVATIONS = "setformer_kernels/reference/README.md"
RESULTS = ROOT / "benchmarks" / "results"


def taken() -> list[Path]:
    """The texts, and the reports, tables and pictures of results."""
    texts = [ROOT / name for name in (*TEXTS, DERIVATIONS)]
    return [*texts, *(path for kind in ("gpu*.md", "*.csv", "*.png") for path in sorted(RESULTS.glob(kind)))]


def on_files(files: Any, config: Any) -> Any:
    for path in taken():
        name = f"repository/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/")
    if page.file.src_uri.startswith("repository/"):
        return markdown.replace("](docs/", "](../")
    return markdown.replace("](" + "../" * (depth + 1), "](" + "../" * depth + "repository/")
