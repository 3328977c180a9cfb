"""How tests run a recipe and read what it left."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from setformer_kernels.recipes.__main__ import main


def recipe(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a recipe that refuses its input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def fails_quietly(*arguments: object) -> str:
    """As `fails`, where no test captures what is written."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([str(argument) for argument in arguments]) == 2
    return said.getvalue()


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.json").read_text())
