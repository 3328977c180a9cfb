"""The page on several ranks, as torchrun runs it.  A case of tests/test_distributed.py."""

from __future__ import annotations

import docs_pages


def case_the_page() -> None:
    docs_pages.run("parallel.md")
