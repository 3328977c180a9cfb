"""`python .ci/repair.py WHEEL FOLDER`: a manylinux wheel in FOLDER, with the OpenMP runtime beside the extension.

auditwheel would give libgomp a name of its own, and a process two pools of threads, torch's and ours, on its cores.
Under its plain name (and the run path that setup.py links in) the loader takes the one that torch has loaded, and the
copy only where torch's has another name, as in its older wheels.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OPENMP = "libgomp.so.1"
FOLDER = "lib"  # beside the extension; setup.py's run path


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def unpacked(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "wheel", "unpack", "--dest", str(folder), str(wheel))
    (found,) = folder.iterdir()
    return found


def add_openmp(package: Path) -> None:
    """Copies the OpenMP runtime that the extension was linked with beside it."""
    (extension,) = package.glob("_C.*.so")
    found = re.search(rf"{re.escape(OPENMP)} => (\S+)", run("ldd", str(extension)))
    if found is None:
        sys.exit(f"{extension.name} is not linked with {OPENMP}: was the compiler without OpenMP?")
    (package / FOLDER).mkdir()
    shutil.copy(Path(found[1]).resolve(), package / FOLDER / OPENMP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        repaired, contents = Path(temporary, "repaired"), Path(temporary, "contents")
        command = ("auditwheel", "repair", "--exclude", OPENMP, "--wheel-dir", str(repaired), str(arguments.wheel))
        print(run(sys.executable, "-m", *command))
        (wheel,) = repaired.iterdir()
        tree = unpacked(wheel, contents)
        add_openmp(tree / "setformer_kernels")
        arguments.folder.mkdir(parents=True, exist_ok=True)
        print(run(sys.executable, "-m", "wheel", "pack", "--dest-dir", str(arguments.folder), str(tree)))


if __name__ == "__main__":
    main()
