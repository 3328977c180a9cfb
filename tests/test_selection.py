"""The shares that CI takes of the cases on stand-ins: together all, and each with everything that is no such case."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import selection

STAY = ("tests/test_backends.py::test_x[triton-plain-torch.bfloat16]", "tests/test_gpu_command.py::test_parts")
PRODUCT = "test_output_and_every_gradient_within_the_error_budget"


def item(nodeid: str) -> Any:
    """What `selection` reads of a collected test."""
    file, _, rest = nodeid.partition("::")
    name, _, parameters = rest.rstrip("]").partition("[")
    callspec = SimpleNamespace(id=parameters) if parameters else None
    return SimpleNamespace(nodeid=nodeid, path=Path(file), originalname=name, callspec=callspec,
                           get_closest_marker=lambda marker: None)  # fmt: skip


PRODUCTS = [item(f"tests/test_backends.py::{PRODUCT}[triton-case{i}-torch.float32]") for i in range(60)]


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_case_is_in_one_share_and_what_is_no_product_in_all(of: int) -> None:
    shares = [selection.share(f"{k}/{of}") for k in range(1, of + 1)]
    assert all(sum(share.has(case) for share in shares) == 1 for case in PRODUCTS)
    assert all(sum(map(share.has, PRODUCTS)) > 0 for share in shares)
    few = item(f"tests/test_backends.py::{PRODUCT}[triton-plain-torch.float32]")
    cpu = item(f"tests/test_backends.py::{PRODUCT}[cpu-case1-torch.float32]")
    kernel = item("tests/test_triton_causal.py::test_x[one]")
    assert sum(share.has(kernel) for share in shares) == 1
    assert all(share.has(test) for share in shares for test in (few, cpu, *map(item, STAY)))


def test_without_a_share_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(selection.SHARE, raising=False)
    assert all(map(selection.share().has, PRODUCTS))


@pytest.mark.parametrize("given", ["0/3", "4/3", "1", "a/b", "-1/3"])
def test_another_share_is_refused(given: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"{selection.SHARE} must be k/n"):
        selection.share(given)


@pytest.mark.parametrize(("share", "told"), [("2/3", ["again: python -m pytest 'tests/a.py::b[c]'"]), ("", [])])
def test_what_failed_in_a_share_is_told_how_to_run_again(
    share: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(selection.SHARE, share)
    lines: list[str] = []
    reports = {"failed": [SimpleNamespace(nodeid="tests/a.py::b[c]")]}
    reporter = SimpleNamespace(getreports=lambda outcome: reports.get(outcome, []), write_line=lines.append)
    conftest.pytest_terminal_summary(reporter)  # type: ignore[arg-type]
    assert lines == told


def test_the_makefile_says_how_long_the_suites_take() -> None:
    told = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"({selection.MINUTES} minutes on two cores)" in told
    assert f"({selection.MINUTES + selection.MINUTES_REST} minutes)" in told
