"""Tokens/s of an encoder before and after its attention was replaced: `python -m benchmarks.cpu.converted`.

BERT of all-MiniLM-L6-v2's sizes with random weights (time does not depend on them) and positions for 8192 tokens, its
attention softmax (transformers' sdpa) or SeT, forward, in rounds A B A B.  Needs what tests/models needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.measure import interleave, paired_ratio, quartiles
from benchmarks.common.results import stamp, write_table

LENGTHS = (128, 512, 2048, 8192)
TOKENS = 8192  # of a batch
COLUMNS = ("length", "batch", "model", "tokens_per_s", "q25", "q75", "ratio", "ratio_q25", "ratio_q75", "rounds")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.cpu.converted", description=__doc__)
    found.add_argument("--length", type=int, action="append", help=f"only this (repeatable; default: {LENGTHS})")
    found.add_argument("--references", type=int, default=64)
    found.add_argument("--seconds", type=float, default=40.0, help="of a length")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    found.add_argument("--threads", type=int, default=1)
    return found


def rows_of(length: int, references: int, seconds: float) -> list[tuple[object, ...]]:
    """A row a model.  ratio: softmax's time over SeT's in the same round."""
    from transformers import BertConfig, BertModel

    from setformer_kernels.models import replace_attention

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        max_position_embeddings=max(LENGTHS),
    )  # fmt: skip
    softmax, converted = BertModel(config).eval(), BertModel(config).eval()
    replace_attention(converted, num_references=references)
    batch = max(TOKENS // length, 1)
    ids = torch.randint(config.vocab_size, (batch, length))
    calls = {"softmax": lambda: softmax(input_ids=ids), "SeT": lambda: converted(input_ids=ids)}
    with torch.inference_mode():
        samples = interleave(calls, seconds)
    ratio = paired_ratio(samples["softmax"], samples["SeT"])
    rows: list[tuple[object, ...]] = []
    for name, times in samples.items():
        found = quartiles([batch * length / t for t in times])
        own = (ratio.median, ratio.q25, ratio.q75) if name == "SeT" else (1.0, 1.0, 1.0)
        rows.append((length, batch, name, found.median, found.q25, found.q75, *own, len(times)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    mark = stamp(args.threads, "cpu")
    rows = [row for length in args.length or LENGTHS for row in rows_of(length, args.references, args.seconds)]
    path = args.out / f"converted_speed_{mark.date}.csv"
    write_table(path, COLUMNS, rows, {**asdict(mark), "references": args.references})
    print(path.read_text())
    return 0


if __name__ == "__main__":
    entry_point.run("converted", main)
