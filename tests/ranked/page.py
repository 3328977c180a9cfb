"""The page on several ranks, as torchrun runs it.  A case of tests/test_distributed.py."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("sybil") is not None:  # which reads pages

    def case_the_page() -> None:
        import docs_pages

        docs_pages.run("parallel.md")
