"""A saved model of transformers on SeT attention, taught without labels by the softmax attention that it had.  MODEL is
a folder with the model and its tokenizer or image processor; --data is a file or folder of text, of which every line is
a sample, or a folder of images.  Every tenth sample is held out."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from transformers import AutoImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import write_atomically
from ..convert import Schedule, Transfer, TransferReport, transfer_attention
from ..convert.students import Collate
from .arguments import check_range
from .errors import RecipeError
from .images import read_image, stack
from .lm import files_of, read
from .training import load_weights, read_json
from .wordpiece import load_tokenizer

HELD_OUT = 10  # one of so many samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH")
    parser.add_argument("--pattern", default="*", help="which files of a folder, as '*.txt'")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text; the rest is cut")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, report and model")
    parser.add_argument("--references", type=int, default=64, help="per head")
    parser.add_argument("--iterations", type=int, default=1, help="of Sinkhorn")
    parser.add_argument("--epsilon", type=float, default=0.05, help="where every head's ε starts")
    parser.add_argument("--fixed-epsilon", action="store_true", help="do not learn ε")
    parser.add_argument("--learn-log-mass", action="store_true", help="learn the references' masses")
    parser.add_argument("--skip", default="", metavar="REGEX", help="layers to leave, by name")
    parser.add_argument("--steps", type=int, default=300, help="of stage 1: every layer on the teacher's inputs")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of stage 1")
    parser.add_argument("--no-projections", action="store_true", help="leave those of queries and keys as they are")
    parser.add_argument("--tune-steps", type=int, default=200, help="of stage 2: layers end to end; 0: no stage 2")
    parser.add_argument("--tune-learning-rate", type=float, default=2e-3, help="of stage 2: a share of a tensor's size")
    parser.add_argument("--tune-all", action="store_true", help="stage 2 learns all weights, not only those layers'")
    parser.add_argument("--lora-rank", type=int, default=0, help="of adapters (peft) in stage 2; 0: weights learn")
    parser.add_argument(
        "--pooling", choices=["mean", "first"], default="mean", help="of hidden states that are compared"
    )
    parser.add_argument("--hidden", action="store_true", help="stage 2 matches all hidden states")
    parser.add_argument("--max-error", type=float, help="leave the dearest layers softmax, down to this relative error")
    parser.add_argument(
        "--recording", type=Path, metavar="FOLDER",
        help="keep the teacher's answers there, or learn from those that another run has left; large",
    )  # fmt: skip
    parser.add_argument("--curve", action="store_true", help="measure the error of 1, 2, ... converted layers")
    parser.add_argument("--batch-size", type=int, default=32, help="per device")
    parser.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step")
    parser.add_argument("--precision", choices=["float32", "bf16", "fp16"], default="float32", help="mixed precision")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, per device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in --output")


def run(args: argparse.Namespace) -> TransferReport:
    """What the converted model has in common with the original; it is saved in --output/model."""
    check_arguments(args)
    how = transfer_of(args)
    teacher = load_teacher(args.model)
    processor, data, collate = samples_of(args, teacher)
    own = {"num_references": args.references, "num_iters": args.iterations, "epsilon": args.epsilon,
           "learn_epsilon": not args.fixed_epsilon, "learn_log_mass": args.learn_log_mass}  # fmt: skip
    train, held_out = split(data)
    processes = PartialState(cpu=args.cpu)
    check_run(args, processes)
    try:
        model, report = transfer_attention(
            teacher, train, held_out, collate, args.output, how, resume=args.resume, skip=skip_of(args),
            recording=args.recording, **own,
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if processes.is_main_process:
        print(report)
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(args.output / "model")
        processor.save_pretrained(args.output / "model")
    return report


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("references", "length", "batch_size", "accumulate"):
        check_range(args, name, 1)
    for name in ("iterations", "steps", "tune_steps", "lora_rank", "save_every", "workers"):
        check_range(args, name, 0)
    for name in ("learning_rate", "tune_learning_rate", "epsilon"):
        check_range(args, name, 0, open_low=True)
    check_range(args, "seed", 0, 2**32 - 1)
    if args.max_error is not None:
        check_range(args, "max_error", 0)


def transfer_of(args: argparse.Namespace) -> Transfer:
    shared = {
        "batch_size": args.batch_size, "save_every": args.save_every, "accumulate": args.accumulate,
        "precision": args.precision, "workers": args.workers, "seed": args.seed, "cpu": args.cpu,
    }  # fmt: skip
    match = Schedule(args.steps, args.learning_rate, **shared)
    return Transfer(
        match, Schedule(args.tune_steps, args.tune_learning_rate, **shared),
        projections=not args.no_projections, tune_all=args.tune_all, lora_rank=args.lora_rank, pooling=args.pooling,
        hidden=args.hidden, max_error=args.max_error, curve=args.curve,
    )  # fmt: skip


def skip_of(args: argparse.Namespace) -> Callable[[str, nn.Module], bool] | None:
    try:
        pattern = re.compile(args.skip)
    except re.error as error:
        raise RecipeError(f"--skip must be a regular expression, got {args.skip!r}: {error}") from error
    return (lambda name, module: pattern.search(name) is not None) if args.skip else None


def check_run(args: argparse.Namespace, processes: PartialState) -> None:
    """--output holds no run, or one of these arguments that --resume goes on with."""
    path, passing = args.output / "arguments.json", {"resume", "output", "workers", "cpu", "recording"}
    own = {name: str(value) for name, value in vars(args).items() if name not in passing}
    if path.is_file() and not args.resume:
        raise RecipeError(f"--output {args.output} holds a run: add --resume, or name another")
    if path.is_file():
        saved = read_json(path)
        for name in sorted(own.keys() | saved.keys()):
            if own.get(name) != saved.get(name):
                raise RecipeError(f"{path} is of another run: {name} is {saved.get(name)}, now {own.get(name)}")
    elif args.resume:
        raise RecipeError(f"--resume: {args.output} holds no run")
    processes.wait_for_everyone()  # all look before one writes
    if processes.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(own, indent=2) + "\n")


def load_teacher(folder: Path) -> PreTrainedModel:
    """The model of the class that the folder's configuration names."""
    config = read_json(folder / "config.json")
    names = config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if config.get("setformer"):
        raise RecipeError(f"{folder} holds a model that was converted already")
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise RecipeError(f"{folder / 'config.json'} must name one of transformers' models, got architectures={names}")
    return load_weights(kind, folder)


class Lines(Dataset):
    """Texts, tokenized."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.encoded = tokenizer(texts, truncation=True, max_length=length)

    def __len__(self) -> int:
        return len(self.encoded["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.encoded.items()}


class Images(Dataset):
    """Images by path, as the model's own processor makes them."""

    def __init__(self, paths: list[Path], processor: Any) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.processor(read_image(self.paths[index]), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels[0]}


def samples_of(args: argparse.Namespace, teacher: PreTrainedModel) -> tuple[Any, Dataset, Collate]:
    """Processor, samples, and how they become a batch."""
    if teacher.main_input_name == "pixel_values":
        try:
            processor = AutoImageProcessor.from_pretrained(args.model)
        except Exception as error:  # of transformers
            raise RecipeError(f"{args.model} holds no image processor that can be read: {error}") from error
        paths = [path for path in files_of(args.data, args.pattern) if path.suffix.lower() in IMG_EXTENSIONS]
        return processor, Images(paths, processor), stack
    tokenizer = load_tokenizer(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lines = [line.strip() for path in files_of(args.data, args.pattern) for line in read_text(path).splitlines()]
    data = Lines([line for line in lines if line], tokenizer, args.length)
    return tokenizer, data, lambda rows: dict(tokenizer.pad(rows, return_tensors="pt"))


def read_text(path: Path) -> str:
    try:
        return read(path).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}") from error


def split(data: Dataset) -> tuple[Dataset, Dataset]:
    """What to learn from, and what to measure on."""
    size = len(data)  # type: ignore[arg-type]
    if size < 2:
        raise RecipeError(f"--data must hold at least 2 samples, got {size}")
    held = range(0, size, min(HELD_OUT, size))
    return Subset(data, [i for i in range(size) if i not in held]), Subset(data, held)
