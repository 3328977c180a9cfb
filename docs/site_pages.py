"""A hook of mkdocs: files of the repository that pages link to stand in the site under repository/.

On GitHub a page's `../benchmarks/README.md` leads there; a site knows only files below its own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TAKEN = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "setformer_kernels/reference/README.md"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "benchmarks" / "results").glob("*.png"))),
)


def on_files(files: Any, config: Any) -> Any:
    for name in TAKEN:
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/")
    if page.file.src_uri.startswith("repository/"):
        return markdown
    return markdown.replace("](" + "../" * (depth + 1), "](" + "../" * depth + "repository/")
