"""Images for encoders: random crops without labels, and folders named by class for a linear probe."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SEEDS = 3
HELD_OUT = 10
SMALLEST = 0.4  # a crop's side, as a part of the image's shorter one


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def sources(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """By the name of each folder in `folder` (or of itself, where it has none), files to learn from and every tenth."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] or [folder]
    found = {path.name: files_in(path) for path in inside}
    found = {name: files for name, files in found.items() if len(files) >= HELD_OUT}
    if not found:
        raise ValueError(f"{folder} must hold a folder of {HELD_OUT} images ({', '.join(sorted(ENDINGS))}) or more")
    train = {name: [file for i, file in enumerate(files) if i % HELD_OUT] for name, files in found.items()}
    return train, {name: files[::HELD_OUT] for name, files in found.items()}


class Crop(NamedTuple):
    """A square of an image: its side as a part of the shorter one, where it lies (0 to 1), whether it is mirrored."""

    path: Path
    side: float
    left: float
    top: float
    mirrored: bool


def drawn(sources: dict[str, list[Path]], count: int, seed: int) -> list[Crop]:
    """As many crops of every source, give or take one."""
    draw, files = random.Random(seed), list(sources.values())
    return [
        Crop(
            draw.choice(files[i % len(files)]), draw.uniform(SMALLEST, 1), draw.random(), draw.random(),
            draw.random() < 0.5,
        )
        for i in range(count)
    ]  # fmt: skip


def opened(path: Path) -> Any:
    """RGB; what is transparent is white."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGBA")
    behind = Image.new("RGBA", image.size, (255, 255, 255, 255))
    behind.alpha_composite(image)
    return behind.convert("RGB")


def pixels(image: Any, size: int) -> Tensor:
    """[3, size, size], uint8."""
    small = image.resize((size, size), 3)  # bicubic
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def cropped(image: Any, crop: Crop, size: int) -> Tensor:
    side = max(1, round(crop.side * min(image.size)))
    left, top = round(crop.left * (image.width - side)), round(crop.top * (image.height - side))
    x = pixels(image.crop((left, top, left + side, top + side)), size)
    return x.flip(-1) if crop.mirrored else x


def crops(asked: Sequence[Crop], size: int) -> list[Tensor]:
    """[3, size, size] each, in their order; every file is opened once."""
    found: dict[int, Tensor] = {}
    path, image = None, None
    for i in sorted(range(len(asked)), key=lambda i: asked[i].path):
        if asked[i].path != path:
            path, image = asked[i].path, opened(asked[i].path)
        found[i] = cropped(image, asked[i], size)
    return [found[i] for i in range(len(asked))]


def whole(path: Path, size: int) -> Tensor:
    """[3, size, size]: the image in the middle of a white square."""
    from PIL import Image

    image = opened(path)
    square = Image.new("RGB", (max(image.size),) * 2, (255, 255, 255))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return pixels(square, size)


def collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a vision model of transformers takes."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return {"pixel_values": (torch.stack(list(rows)) / 255 - mean) / std}


class Labelled(NamedTuple):
    """A task: images [3, size, size] each, and their classes [N], int64."""

    name: str
    images: list[Tensor]
    classes: Tensor


def labelled(folder: Path, size: int) -> Labelled:
    """Every folder in `folder` is a class."""
    by_class = [files_in(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if len(by_class) < 2 or min(map(len, by_class)) < 3:
        raise ValueError(f"{folder} must hold two folders or more, named by class, of three images or more each")
    images = [whole(path, size) for files in by_class for path in files]
    return Labelled(folder.name, images, torch.tensor([i for i, files in enumerate(by_class) for _ in files]))


@torch.no_grad()
def features(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """[N, 2·E]: the class token, and the mean of the patches'."""
    said = [model(**collate(images[i : i + 32])).last_hidden_state for i in range(0, len(images), 32)]
    return torch.cat([torch.cat([x[:, 0], x[:, 1:].mean(1)], -1) for x in said])


def probe(x: Tensor, classes: Tensor, seed: int) -> float:
    """Accuracy on a third of the images, drawn by the seed class by class, of a logistic regression on the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    split = train_test_split(x.numpy(), classes.numpy(), test_size=1 / 3, random_state=seed, stratify=classes.numpy())
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(split[0], split[2])
    return float(fitted.score(split[1], split[3]))


def probes(model: nn.Module, tasks: Sequence[Labelled]) -> list[tuple[str, float]]:
    """A row a task and seed."""
    rows = []
    for task in tasks:
        x = features(model.eval(), task.images)
        rows += [(f"probe_accuracy of {task.name}, seed {s}", probe(x, task.classes, s)) for s in range(SEEDS)]
    return rows
