"""The pages of docs/ as programs: the Python blocks of a page share a namespace and run in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

DOCS = Path(__file__).parents[1] / "docs"
# Only the environment of `make test-models` has these.
EXTRAS = r"^\s*(?:from|import) (?:setformer_kernels\.models\.)?(timm|transformers|torchvision|onnxruntime)\b"
_sybil = Sybil([PythonCodeBlockParser()])


def extras_of(page: str) -> set[str]:
    """The libraries of EXTRAS that a page imports, itself or by the package's doors to them."""
    return set(re.findall(EXTRAS, (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE))


def pages(*, with_extras: bool) -> list[str]:
    """The pages with Python in them that need the extras, or that do not: names below docs/."""
    found = sorted(path for path in DOCS.rglob("*.md") if "```python" in path.read_text(encoding="utf-8"))
    names = [path.relative_to(DOCS).as_posix() for path in found]
    return [name for name in names if bool(extras_of(name)) == with_extras]


def run(page: str, **given: Any) -> None:
    """Every block of the page, with the names it is given; an error names the page and the line."""
    document = _sybil.parse(DOCS / page)
    document.namespace.update(given)
    for example in document.examples():
        example.evaluate()
