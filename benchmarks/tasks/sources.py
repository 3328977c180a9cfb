"""(b) the data: this Python's own standard library as bytes; which package does a chunk of source come from?

Train and test never share a file.  Packages and split depend on the Python that runs the demo, so both are reported.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LENGTH = 2048  # bytes in a chunk, and tokens in a sequence
CLASSES = 8
MIN_FILES = 8
TEST_SHARE = 0.3
MAX_TEST_CHUNKS = 240
NOT_PROSE = {"encodings", "pydoc_data", "site-packages", "test"}  # tables, generated text, other people's code
SEED = 0


@dataclass
class Corpus:
    """Bytes of whole files; `train` one array a class, `test` chunks [N, length] with their class [N]."""

    packages: list[str]
    train: list[np.ndarray]
    test_tokens: Tensor
    test_labels: Tensor
    files: tuple[int, int]  # train, test
    length: int = LENGTH

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the training files [batch_size, length], every class equally often, and their classes."""
        labels = rng.integers(len(self.train), size=batch_size)
        windows = []
        for label in labels:
            data = self.train[label]
            start = rng.integers(len(data) - self.length + 1)
            windows.append(data[start : start + self.length])
        return torch.from_numpy(np.stack(windows)).long(), torch.from_numpy(labels)


def package_files(library: Path) -> dict[str, list[Path]]:
    """The `CLASSES` largest packages by bytes, tests left out, with at least `MIN_FILES` files of a chunk or more."""
    found: dict[str, list[Path]] = {}
    for package in sorted(library.iterdir()):
        if package.name in NOT_PROSE or not (package / "__init__.py").exists():
            continue
        sources = [path for path in sorted(package.rglob("*.py")) if path.stat().st_size >= LENGTH]
        sources = [path for path in sources if not any("test" in part for part in path.relative_to(package).parts)]
        if len(sources) >= MIN_FILES:
            found[package.name] = sources
    largest = sorted(found, key=lambda name: sum(p.stat().st_size for p in found[name]), reverse=True)[:CLASSES]
    return {name: found[name] for name in sorted(largest)}


def read(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


def chunks(data: np.ndarray, length: int) -> np.ndarray:
    """The whole chunks of one file, without overlap: [N, length]."""
    count = len(data) // length
    return data[: count * length].reshape(count, length)


def load(library: Path | None = None, length: int = LENGTH, max_test_chunks: int = MAX_TEST_CHUNKS) -> Corpus:
    """Split each package's files at random, `TEST_SHARE` of the files for the test."""
    files = package_files(library or Path(sysconfig.get_paths()["stdlib"]))
    rng = random.Random(SEED)
    train, test, count = [], [], [0, 0]
    for label, paths in enumerate(files.values()):
        paths = rng.sample(paths, len(paths))
        cut = max(1, round(TEST_SHARE * len(paths)))
        train.append(np.concatenate([read(path) for path in paths[cut:]]))
        test += [(chunk, label) for path in paths[:cut] for chunk in chunks(read(path), length)]
        count = [count[0] + len(paths) - cut, count[1] + cut]
    test = rng.sample(test, min(len(test), max_test_chunks))
    tokens = torch.from_numpy(np.stack([chunk for chunk, _ in test])).long()
    return Corpus(list(files), train, tokens, torch.tensor([label for _, label in test]), (count[0], count[1]), length)
