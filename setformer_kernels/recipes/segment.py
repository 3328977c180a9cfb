"""Semantic segmentation in ADE20K's format: FOLDER/images/{training,validation}/*.jpg and, under the same names,
FOLDER/annotations/{training,validation}/*.png, whose pixels hold 0 (not labelled) or the number of a class from 1."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from transformers import EvalPrediction, UperNetConfig, UperNetForSemanticSegmentation, set_seed

from ..models import VISION_SIZES
from ..models.transformers import SeTformerBackbone, SeTformerConfig
from .arguments import add_training_arguments, check_range, check_training_arguments
from .errors import RecipeError
from .images import MEAN, STD, Augmented, read_image, read_mask, stack
from .training import Job, RecipeTrainer, execute, load_model, load_weights, read_json

IGNORED = 255  # of a label: what is 0 in the file, and padding
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="FOLDER")
    parser.add_argument("--classes", type=int, default=150, help="the largest number of a class")
    parser.add_argument("--model", choices=VISION_SIZES, default="setformer_tiny", help="of a new backbone")
    parser.add_argument("--backbone", type=Path, metavar="MODEL", help="a saved SeTformer for images to start from")
    parser.add_argument("--head-channels", type=int, default=512, help="of the UPerNet head")
    parser.add_argument("--crop-size", type=int, default=512, help="of training; evaluation takes images as they are")
    add_training_arguments(parser, epochs=127, batch_size=16, learning_rate=1e-4)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Mean IoU and pixel accuracy on validation, at the images' own size."""
    check_training_arguments(args)
    check_range(args, "crop_size", 32)
    check_range(args, "classes", 2, IGNORED - 1)
    check_range(args, "head_channels", 1)
    set_seed(args.seed)
    held_out = WholeImages(pairs_of(args.data, "validation"), args.classes, args.seed)
    train = None if args.evaluate else Crops(pairs_of(args.data, "training"), args.classes, args.seed, args.crop_size)
    model = load_model(UperNetForSemanticSegmentation, args.evaluate) if args.evaluate else build(args)
    if model.config.num_labels != args.classes:
        raise RecipeError(f"{args.evaluate} has {model.config.num_labels} classes, --classes is {args.classes}")
    model = with_one_norm(model, PartialState(cpu=args.cpu))
    job = Job(
        model, train, {"": held_out}, stack, MeanIou(args.classes),
        own_arguments={"per_device_eval_batch_size": 1, "batch_eval_metrics": True}, trainer=SegmentationTrainer,
    )  # fmt: skip
    return execute(args, job)


def with_one_norm(model: nn.Module, processes: PartialState) -> nn.Module:
    """On several GPUs the head normalises over what all of them have, as one does; torch has that for GPUs alone."""
    many = processes.num_processes > 1 and processes.device.type == "cuda"
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if many else model


def pairs_of(data: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) paths; every image must have its mask."""
    folder = data / "images" / split
    images = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not images:
        raise RecipeError(f"{folder} holds no images")
    pairs = [(path, data / "annotations" / split / f"{path.stem}.png") for path in images]
    for image, mask in pairs:
        if not mask.is_file():
            raise RecipeError(f"{mask} is missing: the mask of {image}")
    return pairs


class Scenes(Augmented):
    """Images with a class number for every pixel: IGNORED, or 0 to classes − 1."""

    def __init__(self, pairs: list[tuple[Path, Path]], classes: int, seed: int) -> None:
        super().__init__(seed)
        self.pairs, self.classes = pairs, classes

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, tv_tensors.Mask]:
        path, mask_path = self.pairs[index]
        image, mask = read_image(path), read_mask(mask_path)
        if mask.mode not in ("L", "P"):
            raise RecipeError(f"{mask_path} must have one 8-bit number a pixel (mode L or P), got mode {mask.mode}")
        if mask.size != image.size:
            sizes = (f"{width} × {height}" for width, height in (mask.size, image.size))
            raise RecipeError(f"{mask_path} and its image must have one size, got {' and '.join(sizes)}")
        numbers = torch.from_numpy(np.array(mask))[None]
        if int(numbers.max()) > self.classes:
            raise RecipeError(f"{mask_path} has the class {int(numbers.max())}, the largest is {self.classes}")
        return image, tv_tensors.Mask(torch.where(numbers == 0, IGNORED, numbers - 1))

    def sample(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """image [3, h, w] of bytes, mask [1, h, w]."""
        pixels = v2.functional.to_dtype(image, torch.float32, scale=True)
        return {"pixel_values": v2.functional.normalize(pixels, MEAN, STD), "labels": mask[0].long()}


class Crops(Scenes):
    """Square crops of images scaled by 0.5 to 2 (relative to the crop), mirrored half of the time."""

    def __init__(self, pairs: list[tuple[Path, Path]], classes: int, seed: int, size: int) -> None:
        super().__init__(pairs, classes, seed)
        self.size = size
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        self.steps = v2.Compose([v2.RandomCrop(size, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()])

    def transform(self, loaded: tuple[Image.Image, tv_tensors.Mask]) -> dict[str, Tensor]:
        image, mask = v2.functional.to_image(loaded[0]), loaded[1]
        scale = float(torch.empty(()).uniform_(0.5, 2.0)) * self.size / min(image.shape[-2:])
        size = [max(round(side * scale), 1) for side in image.shape[-2:]]
        return self.sample(*self.steps(*(v2.functional.resize(each, size) for each in (image, mask))))


class WholeImages(Scenes):
    """Images as they are, padded at the right and the bottom to multiples of 32."""

    def transform(self, loaded: tuple[Image.Image, tv_tensors.Mask]) -> dict[str, Tensor]:
        image, mask = v2.functional.to_image(loaded[0]), loaded[1]
        padding = [0, 0, -image.shape[-1] % 32, -image.shape[-2] % 32]
        return self.sample(v2.functional.pad(image, padding), v2.functional.pad(mask, padding, fill=IGNORED))


def build(args: argparse.Namespace) -> UperNetForSemanticSegmentation:
    if args.backbone:
        backbone = load_backbone(args.backbone)
        config = backbone.config
    else:
        backbone, config = None, SeTformerConfig.from_size(args.model, out_features=STAGES)
    whole = UperNetConfig(
        backbone_config=config, num_labels=args.classes, hidden_size=args.head_channels,
        auxiliary_in_channels=config.widths[2], loss_ignore_index=IGNORED,
    )  # fmt: skip
    model = UperNetForSemanticSegmentation(whole)
    if backbone is not None:
        model.backbone.load_state_dict(backbone.state_dict())
    return model


def load_backbone(folder: Path) -> SeTformerBackbone:
    if not (folder / "model.safetensors").is_file():
        raise RecipeError(f"{folder / 'model.safetensors'} is missing")
    if read_json(folder / "config.json").get("model_type") != SeTformerConfig.model_type:
        raise RecipeError(f"{folder / 'config.json'} is not of a SeTformer for images")
    config = SeTformerConfig.from_pretrained(folder, out_features=STAGES)
    return load_weights(SeTformerBackbone, folder, config=config)


class SegmentationTrainer(RecipeTrainer):
    """Evaluation hands confusion matrices to the metrics, not logits: they have one shape, and add up.

    UPerNet's head normalises over the batch, which must not be one image: such a rest of the epoch is left out.
    """

    def get_train_dataloader(self) -> DataLoader:
        images, batch = len(self.train_dataset), self._train_batch_size
        if min(images, batch) < 2:
            raise RecipeError(
                "UPerNet's head normalises over the batch: training needs at least 2 images and --batch-size 2, got"
                f" {images} and {batch}"
            )
        self.args.dataloader_drop_last = images % batch == 1 and self.args.world_size == 1  # else it is filled up
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False  # no image is left out of an evaluation

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:  # fmt: skip
        """In training the mean over ranks is that over the labelled pixels of all, of which each has its own number."""
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training and self.accelerator.num_processes > 1:
            labelled = (inputs["labels"] != IGNORED).sum().to(loss.dtype)
            loss = loss * (labelled / self.accelerator.reduce(labelled, "mean"))
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        return loss, confusion(logits.argmax(1), labels, logits.shape[1]), labels.new_zeros(len(labels))


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """predicted and labels [B, h, w] -> how many pixels of class i were called j, [B, classes, classes]."""
    matrices = []
    for p, y in zip(predicted, labels, strict=True):
        kept = y != IGNORED
        pairs = torch.bincount(classes * y[kept] + p[kept], minlength=classes**2)
        matrices.append(pairs.view(classes, classes))
    return torch.stack(matrices)


class MeanIou:
    """Adds up confusion matrices [B, classes, classes]; with compute_result, the scores of all since the last time."""

    def __init__(self, classes: int) -> None:
        self.matrix = np.zeros((classes, classes), np.int64)

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.matrix += prediction.predictions.sum(0).cpu().numpy()
        if not compute_result:
            return {}
        right, union = np.diag(self.matrix), self.matrix.sum(0) + self.matrix.sum(1) - np.diag(self.matrix)
        scores = {
            "miou": float((right[union > 0] / union[union > 0]).mean()),  # over the classes that occur
            "pixel_accuracy": float(right.sum() / max(self.matrix.sum(), 1)),
        }
        self.matrix[:] = 0
        return scores
