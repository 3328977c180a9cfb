"""`python -m benchmarks.quality.decoding`: tokens a second of reading a prompt and of generating after it, and the
bytes that are kept of it, of the same decoder with SeT and with softmax attention, at contexts of many lengths.

SeT has its gates and convolutions, softmax its rotary positions and keys and values in memory that is there from the
start.  What a context holds does not change the time of a token, so that of softmax is filled with random numbers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import entry_point, markdown
from benchmarks.common.hardware import ROOT, default_threads
from benchmarks.common.results import Stamp, stamp
from benchmarks.quality.language import Mixing, Rotary
from benchmarks.quality.results import since, write_stamped
from setformer_kernels.models import CausalDecoder, CausalLM, Past

CONTEXTS = (1024, 8192, 65536)
ROUNDS, TOKENS = 7, 8  # interleaved, and tokens generated in each
PIECE = 2048  # tokens of a prompt that SeT reads at once


class Held(NamedTuple):
    """Keys and values [B, H, S, D], of which the first `seen` are there."""

    keys: Tensor
    values: Tensor
    seen: int


class Filling(Rotary):
    """Softmax attention whose keys and values are written into memory that does not grow."""

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, log_decay: Tensor | None = None,
        state: Held | None = None, need_state: bool = False,
    ) -> tuple[Tensor, Held | None]:  # fmt: skip
        if state is None:
            return super().forward(q, k, v)[0], None
        start, end = state.seen, state.seen + q.shape[2]
        state.keys[:, :, start:end], state.values[:, :, start:end] = self.turned(k, start), v
        keys, values = state.keys[:, :, :end], state.values[:, :, :end]
        o = F.scaled_dot_product_attention(self.turned(q, start), keys, values, is_causal=q.shape[2] > 1)
        return o, state._replace(seen=end)


@dataclass(frozen=True)
class Row:
    attention: str
    context: int
    decode_tokens_per_s: float
    decode_q25: float
    decode_q75: float
    prefill_tokens_per_s: float  # nan: longer than --prefill-up-to
    kept_bytes: int  # of the context


def decoder(kind: str, width: int, heads: int, depth: int) -> CausalLM:
    """The model; softmax without gates, and with what `Filling` needs."""
    torch.manual_seed(0)
    model = Mixing(kind, gate=kind == "set", conv=kind == "set").decoder(width, heads, depth)
    if kind == "softmax":
        for block in model.blocks:
            block.attention.transport = Filling(width // heads)
    return CausalLM(model).eval()


def empty(model: CausalDecoder, kind: str, context: int) -> list[Past] | None:
    """What generation starts from: room for the keys of context and of what is generated, or nothing."""
    if kind == "set":
        return None
    attention = model.blocks[0].attention
    heads, size = attention.num_heads, model.width // attention.num_heads
    room = context + (ROUNDS + 1) * TOKENS
    return [Past(None, Held(*torch.randn(2, 1, heads, room, size), 0)) for _ in model.blocks]  # type: ignore[arg-type]


def prefilled(model: CausalLM, kind: str, context: int) -> list[Past]:
    """The past of a prompt; of softmax only as much memory as it takes."""
    if kind == "softmax":
        past = empty(model.decoder, kind, context)
        assert past is not None
        return [Past(None, one.sums._replace(seen=context)) for one in past]  # type: ignore[union-attr,arg-type]
    return read(model, kind, PIECE)[1]


def read(model: CausalLM, kind: str, context: int) -> tuple[float, list[Past]]:
    """Seconds of reading a prompt, and its past."""
    past, tokens = empty(model.decoder, kind, context), torch.randint(256, (1, context))
    start = time.perf_counter()
    for piece in tokens.split(PIECE if kind == "set" else context, 1):
        _, past = model.with_past(piece, past=past)
    assert past is not None
    return time.perf_counter() - start, past


def kept(past: list[Past], context: int) -> int:
    """Bytes of what is kept of context."""
    total = 0
    for inputs, sums in past:
        held: Any = sums
        if isinstance(held, Held):
            total += sum(t[:, :, :context].numel() * t.element_size() for t in held[:2])
        else:
            total += sum(t.nbytes for t in (inputs, held) if t is not None)
    return total


def generating(model: CausalLM, past: list[Past]) -> Callable[[], float]:
    """Generates some tokens more at every call: seconds a token."""
    logits = torch.zeros(1, 1, 256)

    def more() -> float:
        nonlocal past, logits
        start = time.perf_counter()
        for _ in range(TOKENS):
            logits, past = model.with_past(logits[:, -1:].argmax(-1), past=past)
        return (time.perf_counter() - start) / TOKENS

    return more


@torch.no_grad()
def measure(models: dict[str, CausalLM], context: int, prefill_up_to: int) -> list[Row]:
    pasts = {kind: prefilled(model, kind, context) for kind, model in models.items()}
    calls = {kind: generating(model, pasts[kind]) for kind, model in models.items()}
    sizes = {kind: kept(past, context) for kind, past in pasts.items()}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(ROUNDS + 1):
        for kind, call in calls.items():
            seconds = call()
            if turn > 0:  # the first warms up
                times[kind].append(seconds)
    rows = []
    for kind, model in models.items():
        whole = read(model, kind, context)[0] if context <= prefill_up_to else float("nan")
        q25, _, q75 = (1 / q for q in reversed(quantiles(times[kind], n=4)))
        rows.append(Row(kind, context, 1 / median(times[kind]), q25, q75, context / whole, sizes[kind]))
    return rows


def wins(rows: list[Row]) -> int | None:
    """The shortest context from which on SeT generates faster."""
    speeds = {(row.attention, row.context): row.decode_tokens_per_s for row in rows}
    return since({row.context: speeds["set", row.context] > speeds["softmax", row.context] for row in rows})


def render(rows: list[Row], on: Stamp) -> str:
    """A table for a page, and which context SeT wins from."""
    head = ["context", "attention", "generating, tokens/s", "reading, tokens/s", "kept, MB"]
    body = []
    for row in rows:
        speed = f"{row.decode_tokens_per_s:.0f} ({row.decode_q25:.0f} to {row.decode_q75:.0f})"
        reading = "not measured" if math.isnan(row.prefill_tokens_per_s) else f"{row.prefill_tokens_per_s:.0f}"
        body.append([str(row.context), row.attention, speed, reading, f"{row.kept_bytes / 1e6:.2f}"])
    won = wins(rows)
    reached = "at none of these contexts" if won is None else f"from {won} tokens on"
    what = markdown.where(on.cpu, on.threads, on.torch, on.commit, on.date)
    return "\n".join([*markdown.table(head, body), "", f"SeT generates faster {reached}. {what}."])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.decoding", description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--prefill-up-to", type=int, default=8192, help="longest prompt that is read (default: 8192)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=default_threads(), help="torch threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="CSV (default: decoding and date in benchmarks/results)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    on = stamp(arguments.threads, "cpu")
    sizes = (arguments.width, arguments.heads, arguments.depth)
    models = {kind: decoder(kind, *sizes) for kind in ("softmax", "set")}
    rows = [row for context in arguments.contexts for row in measure(models, context, arguments.prefill_up_to)]
    path = arguments.out or ROOT / "benchmarks" / "results" / f"decoding_{on.date}.csv"
    write_stamped(path, rows, on)
    print(f"{render(rows, on)}\n\n{path}")
    return 0


if __name__ == "__main__":
    entry_point.run("benchmarks.quality.decoding", main)
