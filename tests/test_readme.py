"""The README and the page of backends show the tables that the committed results and the code give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.common.results import OK, Row, read_csv
from benchmarks.cpu.table import masked, render
from setformer_kernels import available_backends

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_cpu_table_is_that_of_the_results_it_names() -> None:
    names = re.findall(r"\(benchmarks/results/(cpu_\S+\.csv)\)", README)
    assert names, "the README names no results"
    table = render(*read_csv(ROOT / "benchmarks" / "results" / names[0])).strip().split("\n\n")[0]
    missing = [line for line in table.splitlines() if line not in README]
    assert not missing, "\n".join(missing)


def test_causal_and_masked_calls_show_what_they_cost_or_that_nobody_measured() -> None:
    (name,) = set(re.findall(r"\(benchmarks/results/(cpu_\S+\.csv)\)", README))
    table = masked(read_csv(ROOT / "benchmarks" / "results" / name)[0])
    assert ("| causal | 1 | forward |" in README) == bool(table)
    assert table in README
    assert ("not measured yet: causal and masked calls" in README) == (not table)


def test_the_gpu_rows_are_those_of_the_results_they_name() -> None:
    (name,) = set(re.findall(r"\(benchmarks/results/(gpu_\S+)\.md\)", README))
    report = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
    shown = re.findall(r"^\| GPU \|.*$", README, re.MULTILINE)
    assert shown
    assert [line for line in shown if line not in report] == []
    rows, _ = read_csv(ROOT / "benchmarks" / "results" / f"{name}.csv")
    for L in (4096, 16384, 65536):
        (line,) = re.findall(rf"^\| {L} \|.*$", README, re.MULTILINE)
        assert line == headline_of(rows, L)


def headline_of(rows: list[Row], L: int) -> str:
    """Times in us of SeT on Triton at T = 3 and 1 and of the fastest SDPA, and what that is in SeT's."""
    cells = []
    for mode in ("forward", "forward+backward"):
        beside = [r for r in rows if (r.case, r.mode, r.L, r.backend, r.status) == ("headline", mode, L, "triton", OK)]
        own = [next(r for r in beside if (r.impl, r.T) == ("triton", T)) for T in (3, 1)]
        best = min((r for r in beside if r.impl.startswith("sdpa")), key=lambda r: r.median)
        cells += [
            " / ".join(f"{1e6 * r.median:.0f}" for r in (*own, best)),
            f"{best.ratio:.3g}× / {best.ratio_t1:.3g}×",
        ]
    return f"| {L} | {' | '.join(cells)} |"


def test_the_table_of_masks_has_both_iteration_counts() -> None:
    rows = [
        Row("causal", "sdpa", "forward", "time", "s", OK, L=L, ratio=ratio, ratio_t1=2 * ratio)
        for L, ratio in ((256, 0.4), (1024, 0.5))
    ]
    lines = masked(rows).splitlines()
    assert lines[0] == "| mask | T | mode | L = 256 | L = 1024 |"
    assert "| causal | 1 | forward | 0.8× | 1× |" in lines
    assert "| causal | 3 | forward | 0.4× | 0.5× |" in lines
    assert "| window | 3 | forward+backward | – | – |" in lines
    assert masked([]) == ""


def test_the_backends_stand_in_the_order_in_which_auto_tries_them() -> None:
    page = (ROOT / "docs" / "backends.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(available_backends())


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_ratios_and_times_on_pages_are_those_of_the_table(page: Path) -> None:
    quoted = re.findall(r"\d[\d.]*×|\d[\d.]* ms", page.read_text())
    assert [number for number in quoted if number not in README] == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_readme_is_short_and_points_to_pages_that_exist() -> None:
    assert len(README.splitlines()) <= 180
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
