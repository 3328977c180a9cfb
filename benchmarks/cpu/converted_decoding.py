"""Tokens/s of a decoder before and after its attention was replaced: `python -m benchmarks.cpu.converted_decoding`.

Llama with random weights (time does not depend on them), one sequence, behind contexts of several lengths, in rounds
A B C A B C: softmax and SeT attention with all keys and values (DynamicCache), SeT with its sums (StateCache).
Needs what tests/models needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import entry_point
from benchmarks.common.hardware import ROOT
from benchmarks.common.measure import interleave, paired_ratio, quartiles
from benchmarks.common.results import stamp, write_table

CONTEXTS = (512, 2048, 8192)
WIDTH, DEPTH = 512, 4
COLUMNS = (
    "context", "attention", "cache", "tokens_per_s", "q25", "q75", "ratio", "ratio_q25", "ratio_q75", "kept_bytes",
    "rounds",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.cpu.converted_decoding", description=__doc__)
    found.add_argument("--context", type=int, action="append", help=f"only this (repeatable; default: {CONTEXTS})")
    found.add_argument("--references", type=int, default=64)
    found.add_argument("--seconds", type=float, default=20.0, help="of a context")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    found.add_argument("--threads", type=int, default=1)
    return found


def llamas(references: int, context: int) -> dict[str, Any]:
    """The same decoder with either attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from setformer_kernels.models import replace_attention

    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=3 * WIDTH, max_position_embeddings=2 * context,
    )  # fmt: skip
    torch.manual_seed(0)
    softmax = LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    converted = LlamaForCausalLM(config).eval()
    replace_attention(converted, num_references=references)
    return {"softmax": softmax, "SeT": converted}


def kept(cache: Any) -> int:
    """Bytes."""
    held = [t for layer in cache.layers for t in (getattr(layer, "state", None), layer.keys, layer.values)]
    return sum(t.nbytes for t in held if t is not None)


def decoding(model: Any, cache: Any, context: int) -> Callable[[], object]:
    """Answers one more token at every call, behind `context` others."""
    from setformer_kernels.models.transformers.causal import CACHE

    told = {CACHE: cache, "logits_to_keep": 1}
    model(torch.randint(1000, (1, context)), **told)
    token = torch.randint(1000, (1, 1))
    return lambda: model(token, **told)


@torch.inference_mode()
def rows_of(context: int, references: int, seconds: float) -> list[tuple[object, ...]]:
    """A row an attention and cache.  ratio: time of softmax over its time in the same round."""
    from transformers import DynamicCache

    from setformer_kernels.models.transformers import StateCache

    models = llamas(references, context)
    caches = {
        ("softmax", "keys and values"): DynamicCache(config=models["softmax"].config),
        ("SeT", "keys and values"): DynamicCache(config=models["SeT"].config),
        ("SeT", "state"): StateCache(models["SeT"]),
    }
    calls = {name: decoding(models[name[0]], cache, context) for name, cache in caches.items()}
    sizes = {name: kept(cache) for name, cache in caches.items()}
    samples = interleave(calls, seconds)
    rows: list[tuple[object, ...]] = []
    for name, times in samples.items():
        found, ratio = quartiles([1 / t for t in times]), paired_ratio(samples["softmax", "keys and values"], times)
        measured = (found.median, found.q25, found.q75, ratio.median, ratio.q25, ratio.q75)
        rows.append((context, *name, *measured, sizes[name], len(times)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    mark = stamp(args.threads, "cpu")
    rows = [row for context in args.context or CONTEXTS for row in rows_of(context, args.references, args.seconds)]
    path = args.out / f"converted_decoding_{mark.date}.csv"
    write_table(path, COLUMNS, rows, {**asdict(mark), "references": args.references})
    print(path.read_text())
    return 0


if __name__ == "__main__":
    entry_point.run("converted_decoding", main)
