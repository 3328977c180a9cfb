"""GLUE: one of the nine tasks from FOLDER/train.tsv and FOLDER/dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv)."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ..models.transformers import SeTformerForSequenceClassification, SeTformerTextConfig
from .arguments import add_training_arguments, check_range, check_training_arguments
from .errors import RecipeError
from .glue_tasks import TASKS, Example, GlueTask, read_examples
from .training import Job, execute, load_model, load_weights, read_json
from .wordpiece import SPECIAL, load_tokenizer, train_tokenizer

SIZES = {  # width, blocks, heads, MLP units: those of BERT's sizes
    "tiny": (128, 2, 2, 512), "small": (512, 4, 8, 2048), "base": (768, 12, 12, 3072),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, metavar="FOLDER")
    parser.add_argument("--size", choices=SIZES, default="base", help="of a new encoder")
    parser.add_argument("--references", type=int, default=64, help="of a new encoder, per head")
    parser.add_argument("--pretrained", type=Path, metavar="MODEL", help="a saved SeTformer for text and its tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="a saved tokenizer (default: WordPiece of the training texts)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="most entries of a WordPiece made here")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text; the rest is cut")
    add_training_arguments(parser, epochs=3, batch_size=32, learning_rate=1e-4)


def run(args: argparse.Namespace) -> dict[str, float]:
    """The task's own metrics on dev."""
    check_training_arguments(args)
    check_range(args, "references", 1)
    check_range(args, "vocabulary", len(SPECIAL) + 1)
    check_range(args, "max_length", 4)  # [CLS] a [SEP] and, of a pair, [SEP]
    set_seed(args.seed)
    task = TASKS[args.task]
    held_out = {name: read_examples(args.data / file, task) for name, file in task.evaluations.items()}
    examples = None if args.evaluate else read_examples(args.data / "train.tsv", task)
    tokenizer = find_tokenizer(args, examples)
    model = load_model(SeTformerForSequenceClassification, args.evaluate) if args.evaluate else build(args, tokenizer)
    check_fit(args, model, tokenizer, task)
    sets = {name: Texts(rows, tokenizer, args.max_length, task) for name, rows in held_out.items()}
    train = None if examples is None else Texts(examples, tokenizer, args.max_length, task)
    collate = partial(pad, tokenizer)
    return execute(args, Job(model, train, sets, collate, partial(score, task), tokenizer))


class Texts(Dataset):
    """Examples, tokenized: one sentence, or two with a separator and token types."""

    def __init__(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, task: GlueTask
    ) -> None:  # fmt: skip
        sentences = [[row.sentences[i] for row in examples] for i in range(len(task.sentences))]
        self.encoded = tokenizer(*sentences, truncation=True, max_length=max_length)
        self.labels = [row.label if task.classes is None else int(row.label) for row in examples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**{name: values[index] for name, values in self.encoded.items()}, "labels": self.labels[index]}


def pad(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as long as its longest text."""
    return dict(tokenizer.pad(rows, return_tensors="pt"))


def find_tokenizer(args: argparse.Namespace, examples: list[Example] | None) -> PreTrainedTokenizerFast:
    """The one asked for, that of the model or of the run that goes on, or a new one."""
    saved = args.tokenizer or args.evaluate or args.pretrained or args.output / "tokenizer"
    processes = PartialState(cpu=args.cpu)
    if examples is not None and saved == args.output / "tokenizer" and not args.resume and processes.is_main_process:
        texts = (sentence for row in examples for sentence in row.sentences)
        train_tokenizer(texts, args.vocabulary).save_pretrained(saved)
    processes.wait_for_everyone()
    return load_tokenizer(saved)


def build(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> SeTformerForSequenceClassification:
    task = TASKS[args.task]
    names = {} if task.classes is None else {"id2label": dict(enumerate(task.classes))}
    labels = {"num_labels": 1, "problem_type": "regression"} if task.classes is None else {
        "num_labels": len(task.classes), "problem_type": "single_label_classification", **names}  # fmt: skip
    if args.pretrained:
        if read_json(args.pretrained / "config.json").get("model_type") != SeTformerTextConfig.model_type:
            raise RecipeError(f"{args.pretrained / 'config.json'} is not of a SeTformer for text")
        return load_weights(
            SeTformerForSequenceClassification, args.pretrained, "setformer.encoder.", ignore_mismatched_sizes=True,
            **labels,
        )  # fmt: skip
    width, depth, heads, hidden = SIZES[args.size]
    config = SeTformerTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=hidden, num_references=args.references, max_position_embeddings=args.max_length,
        pad_token_id=tokenizer.pad_token_id, **labels,
    )  # fmt: skip
    return SeTformerForSequenceClassification(config)


def check_fit(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: GlueTask
) -> None:  # fmt: skip
    """The model's classes, vocabulary and length are those of the task, the tokenizer and the arguments."""
    config, source = model.config, args.evaluate or args.pretrained or "the model"
    wanted = ["LABEL_0"] if task.classes is None else list(task.classes)
    known = [config.id2label[i] for i in range(config.num_labels)]
    if known != wanted:
        raise RecipeError(f"{source} has the classes {', '.join(known)}; {args.task} has {', '.join(wanted)}")
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(f"the tokenizer has {len(tokenizer)} entries, {source} only {config.vocab_size}")
    if args.max_length > config.max_position_embeddings:
        raise RecipeError(f"--max-length {args.max_length}: {source} has {config.max_position_embeddings} positions")


def score(task: GlueTask, prediction: EvalPrediction) -> dict[str, float]:
    """predictions [N, classes] or [N, 1], label_ids [N]."""
    logits = torch.from_numpy(np.asarray(prediction.predictions))
    predicted = logits.squeeze(-1) if task.classes is None else logits.argmax(-1)
    return task.score(predicted.numpy(), prediction.label_ids)
