"""A causal language model of text or of any bytes: PATH is a file, or a folder of files.  Every tenth file, or the last
tenth of a single one, is held out, unless --held-out names another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..checkpoints import write_atomically
from ..distributed import context_parallel
from ..models.transformers import SeTformerCausalConfig, SeTformerForCausalLM
from .arguments import add_training_arguments, check_range, check_training_arguments
from .errors import RecipeError
from .language import LanguageTrainer
from .training import Job, execute, load_model
from .wordpiece import load_tokenizer

SIZES = {  # width, blocks, heads, MLP units
    "tiny": (64, 2, 2, 128), "small": (512, 8, 8, 2048), "base": (768, 12, 12, 3072),
}  # fmt: skip
END = 256  # of a file, after the 256 bytes
HELD_OUT = 10  # one of so many files, or so many parts of a single one
PROMPT = 32  # tokens of held-out text that a sample goes on from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="PATH", help="a file, or a folder of files")
    parser.add_argument("--pattern", default="*", help="which files of a folder, as '*.txt'")
    parser.add_argument("--held-out", type=Path, metavar="PATH", help="a file or folder to evaluate on")
    parser.add_argument("--tokenizer", type=Path, help="a saved tokenizer of transformers (default: bytes are tokens)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--references", type=int, default=64, help="per head")
    parser.add_argument("--conv-width", type=int, default=4, help="tokens that the convolution reaches over; 1: none")
    parser.add_argument("--no-gate", action="store_true", help="heads that forget nothing")
    parser.add_argument("--context-parallel", type=int, default=1, metavar="N", help="ranks that share each window")
    parser.add_argument("--samples", type=int, default=2, help="texts to generate at the end")
    parser.add_argument("--sample-tokens", type=int, default=200, help="of each")
    parser.add_argument("--temperature", type=float, default=0.8, help="of samples; 0: the likeliest token")
    parser.add_argument("--prompt", help=f"what samples go on from (default: the first {PROMPT} tokens held out)")
    add_training_arguments(parser, epochs=1, batch_size=32, learning_rate=1e-3)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte and perplexity of the held-out text; prints samples."""
    check_arguments(args)
    set_seed(args.seed)
    vocabulary = Vocabulary(find_tokenizer(args))
    train, held_out = (Windows(part, vocabulary, args.length) for part in split(args))
    model = load_model(SeTformerForCausalLM, args.evaluate) if args.evaluate else build(args, vocabulary)
    if vocabulary.size > model.config.vocab_size:
        raise RecipeError(f"the tokenizer has {vocabulary.size} entries, {args.evaluate} {model.config.vocab_size}")
    job = Job(
        model, None if args.evaluate else train, {"": held_out}, stack, None, vocabulary.tokenizer,
        {"use_cache": True}, partial(LanguageTrainer, length=args.length, parts=args.context_parallel),
    )  # fmt: skip
    measured = execute(args, job)
    context_parallel(model, None)  # samples are one rank's
    if args.samples and PartialState().is_main_process:
        show_samples(args, model, vocabulary, held_out)
    return measured


def check_arguments(args: argparse.Namespace) -> None:
    check_training_arguments(args)
    for name in ("length", "references", "conv_width", "sample_tokens", "context_parallel"):
        check_range(args, name, 1)
    if args.context_parallel > args.length:
        raise RecipeError(f"--context-parallel must be ≤ --length {args.length}, got {args.context_parallel}")
    for name in ("samples", "temperature"):
        check_range(args, name, 0)


def find_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The one asked for, or that of the model; None for bytes."""
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    saved = args.evaluate
    return load_tokenizer(saved) if saved is not None and (saved / "tokenizer_config.json").is_file() else None


@dataclass(frozen=True)
class Vocabulary:
    """Text to tokens and back: bytes and END, or a tokenizer's own, with its end of a text where it has one."""

    tokenizer: PreTrainedTokenizerBase | None

    @property
    def size(self) -> int:
        return END + 1 if self.tokenizer is None else len(self.tokenizer)

    @property
    def end(self) -> int | None:
        return END if self.tokenizer is None else self.tokenizer.eos_token_id

    def encode(self, path: Path | None, data: bytes) -> list[int] | np.ndarray:
        if self.tokenizer is None:
            return np.frombuffer(data, np.uint8)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8, which a tokenizer reads: {error}") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            return bytes(token for token in tokens if token < END).decode(errors="replace")
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


Piece = tuple[Path, slice]  # of a file


def split(args: argparse.Namespace) -> tuple[list[Piece], list[Piece]]:
    """What to train on and what to evaluate on."""
    files, whole = files_of(args.data, args.pattern), slice(None)
    if args.held_out is not None:
        held = files_of(args.held_out, args.pattern)
        unseen = {path.resolve() for path in held}
        train = [path for path in files if path.resolve() not in unseen]
        if not train and not args.evaluate:
            raise RecipeError(f"--held-out {args.held_out} must leave files of {args.data} to train on, got all")
        return [(path, whole) for path in train or files], [(path, whole) for path in held]
    if len(files) > 1:
        held = files[:: min(HELD_OUT, len(files))]
        return [(path, whole) for path in files if path not in set(held)], [(path, whole) for path in held]
    cut = before_a_character(files[0], files[0].stat().st_size * (HELD_OUT - 1) // HELD_OUT)
    return [(files[0], slice(cut))], [(files[0], slice(cut, None))]


def before_a_character(path: Path, cut: int) -> int:
    """The cut, or the first after it that is within no character of UTF-8."""
    following = read(path)[cut : cut + 3]
    return cut + len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))


def files_of(path: Path, pattern: str) -> list[Path]:
    """The file, or those of a folder in order, none of them empty."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob(pattern) if file.is_file() and file.stat().st_size > 0)
    if not found:
        raise RecipeError(f"{path} must be a file, or a folder with files {pattern!r} that are not empty")
    return found


class Windows(Dataset):
    """`length` tokens each and the one after them, of all pieces one after another; a rest too short is left out."""

    def __init__(self, pieces: list[Piece], vocabulary: Vocabulary, length: int) -> None:
        end = [] if vocabulary.end is None else [vocabulary.end]
        parts, size = [], 0
        for path, piece in pieces:
            data = read(path)[piece]
            parts += [np.asarray(vocabulary.encode(path, data), np.int32), np.asarray(end, np.int32)]
            size += len(data)
        self.tokens = torch.from_numpy(np.concatenate(parts))
        self.length, self.tokens_per_byte = length, len(self.tokens) / max(size, 1)
        if len(self) == 0:
            raise RecipeError(
                f"{pieces[0][0]} and {len(pieces) - 1} more files must have more than --length {length} tokens"
                f" together, got {len(self.tokens)}"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[index * self.length : (index + 1) * self.length + 1].long()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error


def stack(rows: list[Tensor]) -> dict[str, Tensor]:
    """The model shifts the labels."""
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "labels": tokens}


def build(args: argparse.Namespace, vocabulary: Vocabulary) -> SeTformerForCausalLM:
    width, depth, heads, hidden = SIZES[args.size]
    return SeTformerForCausalLM(SeTformerCausalConfig(
        vocab_size=vocabulary.size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=hidden, num_references=args.references, conv_width=args.conv_width, gate=not args.no_gate,
        eos_token_id=vocabulary.end,
    ))  # fmt: skip


def show_samples(
    args: argparse.Namespace, model: PreTrainedModel, vocabulary: Vocabulary, held_out: Windows
) -> None:  # fmt: skip
    """Prints texts that go on from a prompt, and writes them into samples.txt."""
    if args.prompt:
        prompt = torch.tensor(np.asarray(vocabulary.encode(None, args.prompt.encode())), dtype=torch.long)
    else:
        prompt = held_out[0][:PROMPT]
    how: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.temperature:
        how |= {"temperature": args.temperature, "top_k": 0}
    texts = []
    for _ in range(args.samples):
        tokens = model.eval().generate(
            prompt[None].to(model.device), attention_mask=torch.ones_like(prompt[None]).to(model.device),
            max_new_tokens=args.sample_tokens, pad_token_id=vocabulary.end or 0, **how,
        )  # fmt: skip
        texts.append(vocabulary.decode(tokens[0].tolist()))
    shown = "".join(f"--- sample {i + 1}\n{text}\n" for i, text in enumerate(texts))
    print(shown, end="")
    write_atomically(args.output / "samples.txt", shown)
