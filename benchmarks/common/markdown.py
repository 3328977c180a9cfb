"""Tables for pages, and the words below them that say where they were measured."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def where(cpu: str, threads: int | str, torch: str, commit: str, date: str) -> str:
    """What a table of float32 was measured on: cells of a `results.Stamp`."""
    return f"{cpu}, threads: {threads}, float32; torch {torch}, commit {commit}, {date}"
