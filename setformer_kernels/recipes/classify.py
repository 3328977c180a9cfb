"""Image classification on an ImageFolder tree: FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png (jpg, webp, ...)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2
from transformers import EvalPrediction, PreTrainedModel, set_seed

from ..models import VISION_SIZES
from ..models.transformers import SeTformerConfig, SeTformerForImageClassification
from .arguments import add_training_arguments, check_range, check_training_arguments
from .errors import RecipeError
from .images import MEAN, STD, Augmented, read_image, stack
from .training import Job, execute, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="FOLDER")
    parser.add_argument("--model", choices=VISION_SIZES, default="setformer_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pool", choices=["mean", "set"], default="mean", help="of the classification head")
    parser.add_argument("--min-scale", type=float, default=0.08, help="least share of an image that a random crop has")
    parser.add_argument("--no-flip", action="store_true", help="for classes that a mirror changes")
    parser.add_argument("--drop-path", type=float, help="stochastic depth of the last block (default: of the model)")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    add_training_arguments(parser, epochs=300, batch_size=128, learning_rate=1e-3)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Top-1 and top-5 accuracy on val."""
    check_arguments(args)
    set_seed(args.seed)
    classes, held_out = samples_of(args.data / "val")
    model = load_model(SeTformerForImageClassification, args.evaluate) if args.evaluate else build(args, classes)
    check_classes(args.data / "val", classes, model)
    train = None
    if not args.evaluate:
        train_classes, samples = samples_of(args.data / "train")
        if train_classes != classes:
            differing = sorted(set(train_classes) ^ set(classes))
            raise RecipeError(f"{args.data}: train and val must have the same classes, they differ in {differing[:5]}")
        if len(classes) < 2:
            raise RecipeError(f"{args.data / 'train'} must have at least 2 classes, got {classes[0]} alone")
        train = LabelledImages(samples, training_transform(args), args.seed)
    evaluation = LabelledImages(held_out, evaluation_transform(args.image_size), args.seed)
    own = {"label_smoothing_factor": args.label_smoothing}
    return execute(args, Job(model, train, {"": evaluation}, stack, accuracies, own_arguments=own))


def check_arguments(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    check_range(args, "image_size", 32)
    for name in ("min_scale", "label_smoothing"):
        check_range(args, name, 0, 1)
    if args.drop_path is not None:
        check_range(args, "drop_path", 0, 0.99)


def samples_of(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names in order, and (path, class number) of every image below folder/CLASS/."""
    try:
        classes, numbers = find_classes(str(folder))
        return classes, make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS)
    except OSError as error:  # torchvision's own FileNotFoundError for a class without images, too
        raise RecipeError(f"{folder} must hold one folder of images for each class: {error}") from error


def check_classes(folder: Path, classes: list[str], model: PreTrainedModel) -> None:
    known = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if known != classes:
        raise RecipeError(
            f"{folder} has {len(classes)} classes ({', '.join(classes[:3])}, ...), the model {len(known)}"
            f" ({', '.join(known[:3])}, ...): they must be the same"
        )


def build(args: argparse.Namespace, classes: list[str]) -> SeTformerForImageClassification:
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    rate = VISION_SIZES[args.model].drop_path_rate if args.drop_path is None else args.drop_path
    config = SeTformerConfig.from_size(args.model, pool=args.pool, drop_path_rate=rate, **names)
    return SeTformerForImageClassification(config)


class LabelledImages(Augmented):
    """Images by path, each with the number of its class."""

    def __init__(self, samples: list[tuple[str, int]], steps: v2.Transform, seed: int) -> None:
        super().__init__(seed)
        self.samples, self.steps = samples, steps

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, number = self.samples[index]
        return read_image(Path(path)), number

    def transform(self, loaded: tuple[Image.Image, int]) -> dict[str, Tensor]:
        return {"pixel_values": self.steps(loaded[0]), "labels": torch.tensor(loaded[1])}


def training_transform(args: argparse.Namespace) -> v2.Transform:
    crop = v2.RandomResizedCrop(args.image_size, (args.min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, *([] if args.no_flip else [v2.RandomHorizontalFlip()]), *tensor_steps()])


def evaluation_transform(size: int) -> v2.Transform:
    """The middle of the image, 0.9 of its shorter side."""
    resize = v2.Resize(round(size / 0.9), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), *tensor_steps()])


def tensor_steps() -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """predictions [N, classes], label_ids [N]."""
    logits, labels = prediction.predictions, prediction.label_ids
    best = np.argsort(-logits, axis=1)[:, :5] == labels[:, None]
    return {"top1": float(best[:, 0].mean()), "top5": float(best.any(1).mean())}
