"""Cases on several gloo processes: one spawn runs those of all files, as a process and its imports cost seconds."""

from __future__ import annotations

import datetime
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from setformer_kernels import advice

HERE = Path(__file__).parent
TIMEOUT = datetime.timedelta(seconds=60)  # of a collective that another rank never comes to


def run(files: Sequence[Path], ranks: int, folder: Path, timeout: float = 600.0) -> None:
    """Calls all functions `case_*` of the files on every rank; AssertionError with what they raised."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "WORLD_SIZE": str(ranks)}  # which others read
    command = [sys.executable, "-W", "error", *IGNORED, __file__, str(ranks), str(folder / "store")]
    (folder / "store").unlink(missing_ok=True)  # of an earlier start
    processes = [
        subprocess.Popen(
            [*command, str(rank), *map(str, files)], cwd=folder, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {r}:\n{text}" for r, text in enumerate(said) if processes[r].returncode != 0]
    assert not failed, "\n".join(failed)
    assert all("cases passed" in text for text in said), said
    print(said[0])


# torch's own words about itself
WORDS = ("`torch.jit.script:DeprecationWarning", "DTensor random operators may not:UserWarning")
IGNORED = [f"-Wignore:{text}" for text in WORDS]


def cases_of(file: str) -> dict[str, Callable[[], None]]:
    spec = importlib.util.spec_from_file_location(f"cases_of_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {f"{Path(file).name}::{n}": f for n, f in vars(module).items() if n.startswith("case_")}


def main(ranks: int, store: str, rank: int, files: Sequence[str]) -> int:
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=ranks, rank=rank, timeout=TIMEOUT)
    advice.enabled = False  # of slow paths, which are among what is tested
    cases = {name: case for file in files for name, case in cases_of(file).items()}
    assert cases
    failures = 0
    for name, case in cases.items():
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            case()
            print(f"{name}: {time.monotonic() - start:.1f} s")
        except Exception:  # also of the ranks that wait for one that raised
            print(f"--- {name}\n{traceback.format_exc()}", flush=True)
            failures += 1
    print(f"{len(cases) - failures} of {len(cases)} cases passed")
    dist.destroy_process_group()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
