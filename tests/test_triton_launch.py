"""Launches that go past Triton's own preparation: the binary, arguments and stream that Triton would have chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process saw whose kernels are not interpreted, and never run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "triton_launches.py")]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_is_the_one_that_triton_would_make(found: dict[str, Any]) -> None:
    assert found["launcher"]
    assert found["wrong"] == []
    assert len(found["kernels"]) > 20
    assert found["short"] > found["total"] / 4


def test_launches_follow_the_current_device_and_stream(found: dict[str, Any]) -> None:
    assert found["elsewhere"] == []


def test_launches_go_by_triton_while_hooks_and_knobs_are_set(found: dict[str, Any]) -> None:
    assert {name: ways for name, ways in found["disturbed"].items() if ways != [True, False, True]} == {}
    assert len(found["disturbed"]) == 6


def test_only_compilers_that_know_a_bound_of_registers_are_asked_for_it(found: dict[str, Any]) -> None:
    assert found["bounds"] == [None, 255, None]
