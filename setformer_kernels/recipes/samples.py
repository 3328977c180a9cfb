"""Small data sets in the recipes' formats, to try them on: FOLDER is filled."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from .arguments import check_range
from .errors import RecipeError
from .glue_tasks import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["classify", "detect", "segment", "lm", *(f"glue/{task}" for task in TASKS)])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--size",
        type=int,
        help="training samples (default: all 1347 digits, 160 images of shapes, 48 scenes, 600 texts, 40 files)",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    check_range(args, "seed", 0)
    if args.size is not None:
        check_range(args, "size", 1)
    if args.folder.exists() and not args.folder.is_dir():
        raise RecipeError(f"{args.folder} is not a folder")
    if args.folder.exists() and any(args.folder.iterdir()):
        raise RecipeError(f"{args.folder} is not empty")
    if args.kind == "classify":
        write_digits(args.folder, args.size)
    elif args.kind == "detect":
        write_shapes(args.folder, args.size or 160, args.seed)
    elif args.kind == "segment":
        write_scenes(args.folder, args.size or 48, args.seed)
    elif args.kind == "lm":
        write_texts(args.folder, args.size or 40, args.seed)
    else:
        write_glue(args.folder, args.kind.partition("/")[2], args.size or 600, args.seed)
    print(f"written: {args.folder}")


def write_digits(folder: Path, size: int | None = None) -> None:
    """scikit-learn's handwritten digits as 32 × 32 PNG files: every fourth held out in val/."""
    images, labels = load_digits(return_X_y=True)
    kept = {"train": np.flatnonzero(np.arange(len(labels)) % 4)[:size], "val": np.arange(0, len(labels), 4)}
    for split, rows in kept.items():
        for row in rows:
            pixels = Image.fromarray((images[row].reshape(8, 8) * (255 / 16)).astype(np.uint8))
            path = folder / split / f"digit_{labels[row]}" / f"{row:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").save(path)


def write_scenes(folder: Path, size: int, seed: int = 0) -> None:
    """Discs without red and squares without green on noise, 64 to 96 pixels a side; a quarter as many to validate."""
    draw = np.random.default_rng(seed)
    for split, count in (("training", size), ("validation", max(size // 4, 1))):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            image, mask = scene(draw)
            name = f"ADE_{'train' if split == 'training' else 'val'}_{n + 1:08}"
            Image.fromarray(image).save(folder / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(folder / "annotations" / split / f"{name}.png")


def scene(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [h, w, 3] and class numbers [h, w], 1 background, 2 disc, 3 square, with a border without label."""
    h, w = draw.integers(64, 97, 2)
    image = draw.integers(0, 60, (h, w, 3)) + draw.integers(0, 60, 3)
    mask = np.ones((h, w), np.uint8)
    rows, columns = np.mgrid[:h, :w]
    for number in (2, 3):
        radius = draw.integers(10, 16)
        y, x = draw.integers(radius, h - radius), draw.integers(radius, w - radius)
        a, b = abs(rows - y), abs(columns - x)
        inside = a**2 + b**2 <= radius**2 if number == 2 else np.maximum(a, b) <= radius
        image[inside] = draw.integers(130, 256, 3) * (np.arange(3) != number - 2)
        mask[inside] = number
    mask[:2] = 0
    return image.astype(np.uint8), mask


SHAPES = [  # as in COCO, the ids have gaps
    {"supercategory": "shape", "id": 7, "name": "disc"},
    {"supercategory": "shape", "id": 9, "name": "square"},
]


def write_shapes(folder: Path, size: int, seed: int = 0) -> None:
    """A bright disc and a bright square on plain 64 × 64 images, in COCO's layout; a quarter as many to validate."""
    draw = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train2017", size), ("val2017", max(size // 4, 1))):
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for n in range(1, count + 1):
            name = f"{n:012}.jpg"
            images.append({"license": 1, "file_name": name, "height": 64, "width": 64, "id": n})
            pixels = np.full((64, 64, 3), draw.integers(0, 40), np.uint8)
            for left, category in zip((0, 32), draw.permutation(2), strict=True):
                row = paint_shape(draw, pixels, int(category), left)
                annotations.append({**row, "image_id": n, "id": len(annotations) + 1})
            Image.fromarray(pixels).save(folder / split / name, quality=95)
        content = {
            "info": {"description": "shapes"}, "licenses": [{"id": 1, "name": "none"}], "images": images,
            "annotations": annotations, "categories": SHAPES,
        }  # fmt: skip
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def paint_shape(draw: np.random.Generator, pixels: np.ndarray, category: int, left: int) -> dict[str, Any]:
    """A disc (0) or a square (1) in the columns from left to left + 32 of pixels [64, 64, 3], and its annotation."""
    radius = int(draw.integers(10, 15))
    y, x = int(draw.integers(radius, 64 - radius)), left + int(draw.integers(radius, 32 - radius))
    corners = (48, 4)[category]
    angles = (np.arange(corners) + 0.5) * (2 * np.pi / corners)
    reach = radius / np.cos(np.pi / corners)  # of the corners; the sides touch the circle
    points = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], 1)  # coordinates of pixels' edges
    rows, columns = np.mgrid[:64, :64] + 0.5 - np.array([y, x])[:, None, None]
    inside = rows**2 + columns**2 <= radius**2 if category == 0 else np.maximum(abs(rows), abs(columns)) <= radius
    pixels[inside] = draw.integers(170, 256, 3) * (np.arange(3) != category)
    return {
        "segmentation": [points.flatten().round(2).tolist()], "iscrowd": 0, "category_id": SHAPES[category]["id"],
        "bbox": [x - radius, y - radius, 2 * radius, 2 * radius],
        "area": corners / 2 * float(reach**2 * np.sin(2 * np.pi / corners)),
    }  # fmt: skip


GOOD, BAD = ("good", "bright", "happy", "fine", "lovely"), ("bad", "dull", "sad", "poor", "awful")
THINGS = ("film", "book", "song", "plan", "day", "house", "meal", "story", "city", "garden")


def sentence(draw: random.Random, words: tuple[str, ...]) -> str:
    a, b = draw.sample(THINGS, 2)
    return f"the {a} and the {b} were {draw.choice(words)} , {draw.choice(words)} and {draw.choice(words)}"


def write_texts(folder: Path, size: int, seed: int = 0) -> None:
    """`size` files of ten sentences each."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(size):
        lines = [sentence(draw, draw.choice((GOOD, BAD))) for _ in range(10)]
        (folder / f"{n:04}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pair(draw: random.Random, good: bool) -> tuple[str, str]:
    """Two sentences: both good, or not both."""
    moods = (GOOD, GOOD) if good else draw.choice([(GOOD, BAD), (BAD, GOOD), (BAD, BAD)])
    first, second = (sentence(draw, mood) for mood in moods)
    return first, second


def rows_of(task: str, draw: random.Random, size: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """(sentences, label) of made-up examples: whether a sentence is good, or two of them both."""
    for i in range(size):
        if task in ("cola", "sst2"):
            yield (sentence(draw, GOOD if i % 2 else BAD),), str(i % 2)
        elif task == "mnli":
            label = ("entailment", "neutral", "contradiction")[i % 3]
            first, second = pair(draw, label != "contradiction")
            yield (first, f"who knows whether {second} ?" if label == "neutral" else second), label
        elif task == "stsb":
            yield pair(draw, bool(i % 2)), f"{(4.0 if i % 2 else 1.0) + draw.uniform(-1, 1):.3f}"
        else:
            classes = TASKS[task].classes
            assert classes is not None
            good = classes.index("entailment") if "entailment" in classes else 1
            yield pair(draw, i % 2 == good), classes[i % 2]


# Header and a line of each task's files, as GLUE has them; {0} is the line's number, {a} and {b} the sentences.
LAYOUTS = {
    "cola": ("", "gen{0}\t{label}\t\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{0}\t{0}\t{a}\t{b}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{0}\tmain\tmade\t2012\t{0}\tnone\tnone\t{a}\t{b}\t{label}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{0}\t{0}\t{0}\t{a}\t{b}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{0}\t{0}\t{0}e\tmade\t()\t()\t()\t()\t{a}\t{b}\t{label}\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{0}\t{a}\t{b}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{0}\t{a}\t{b}\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{0}\t{a}\t{b}\t{label}"),
}


def write_glue(folder: Path, task: str, size: int, seed: int = 0) -> None:
    """train.tsv of `size` examples, and the dev files of a third of that each."""
    folder.mkdir(parents=True, exist_ok=True)
    header, line = LAYOUTS[task]
    fill: Callable[..., str] = line.format
    for n, file in enumerate(("train.tsv", *TASKS[task].evaluations.values())):
        rows = rows_of(task, random.Random(1000 * seed + n), size if n == 0 else size // 3)
        lines = [fill(i, a=texts[0], b=texts[-1], label=label) for i, (texts, label) in enumerate(rows)]
        (folder / file).write_text("\n".join([*([header] if header else []), *lines]) + "\n", encoding="utf-8")
