"""The pages of docs/ as programs: the Python blocks of a page share a namespace and run in order."""

from __future__ import annotations

import re
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

DOCS = Path(__file__).parents[1] / "docs"
# Only the environment of `make test-models` has these.
EXTRAS = r"^\s*(?:from|import) (?:setformer_kernels\.models\.)?(?:timm|transformers|torchvision|onnx\w*)\b"
_sybil = Sybil([PythonCodeBlockParser()])


def pages(*, with_extras: bool) -> list[str]:
    """The pages with Python in them whose imports need the extras, or do not: names below docs/."""
    texts = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
    code = {name: text for name, text in texts.items() if "```python" in text}
    return sorted(name for name, text in code.items() if bool(re.search(EXTRAS, text, re.MULTILINE)) == with_extras)


def run(page: str) -> None:
    """Every block of the page; an error names the page and the line."""
    for example in _sybil.parse(DOCS / page).examples():
        example.evaluate()
