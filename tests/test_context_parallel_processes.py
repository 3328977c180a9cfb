"""Context parallel calls of real processes, on gloo: tests/ranks_processes.py has what they do, in one start each."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
CASES = ("attention", "dropout", "scan", "repeats", "groups", "disagreement", "foreign_context", "killed")
SECONDS = 240


@functools.cache
def outcome(size: int) -> list[dict[str, str]]:
    """What each process wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), str(HERE.parent)
        paths = os.pathsep.join([root, str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        # an empty CUDA_VISIBLE_DEVICES: gloo's tensors are on the CPU, whatever else there is
        settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "error::FutureWarning", str(HERE / "ranks_processes.py")]
        processes = [
            subprocess.Popen([*command, str(rank), str(size), name], env=settings, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=SECONDS)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        files = [folder / f"{rank}.json" for rank in range(size)]
        return [json.loads(f.read_text()) if f.exists() else {"": text} for f, text in zip(files, said, strict=True)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes(size: int, name: str) -> None:
    found = outcome(size)
    ranks = found[:-1] if name == "killed" else found
    assert all(name in rank for rank in ranks), found
    assert not any(rank[name] for rank in ranks), "\n".join(rank[name] for rank in ranks)
