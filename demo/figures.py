"""(c) two pictures: time against length, and which pixels of a digit are transported to which reference."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

import setformer_kernels.functional as SF
from benchmarks.tasks.digits import load

from .digits import REFERENCES
from .models import SET, SOFTMAX, Classifier, attention_named

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ALWAYS = 1024  # seconds in all up to here
WIDTH, HEADS, NUM_REFERENCES = 256, 4, 64
ROUNDS = 5
SIDE = 8  # pixels along a digit's edge
SHOWN = 8  # references drawn for each digit
COLORS = {SOFTMAX: "tab:orange", SET: "tab:blue"}


@torch.no_grad()
def time_lengths(budget: float) -> list[dict[str, Any]]:
    """Median forward seconds of both modules at every length; the rounds alternate, so that noise hits both alike.

    After `budget` seconds no length above `ALWAYS` is started; the rows say what was measured.
    """
    torch.manual_seed(0)
    modules = {name: attention_named(name, NUM_REFERENCES)(WIDTH, HEADS, batch_first=True) for name in (SOFTMAX, SET)}
    rows, start = [], time.perf_counter()
    for length in tqdm(LENGTHS, desc="  lengths", unit="length"):
        if length > ALWAYS and time.perf_counter() - start > budget:
            break
        x = torch.randn(1, length, WIDTH)
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(ROUNDS if length < 8192 else 2):
            for name, module in modules.items():
                seconds[name].append(time_forward(module, x))
        rows.append({"length": length} | {name: statistics.median(s) for name, s in seconds.items()})
    return rows


def time_forward(module: nn.Module, x: Tensor) -> float:
    """Seconds of one call; short calls are repeated to last 5 ms."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < 0.005:
        module(x, x, x, need_weights=False)
        calls += 1
    return (time.perf_counter() - start) / calls


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """The shortest length from which on SeT is faster at every measured length; None if softmax wins the longest."""
    best = None
    for row in reversed(rows):
        if row[SET] >= row[SOFTMAX]:
            break
        best = row["length"]
    return best


def plot_lengths(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    lengths = [row["length"] for row in rows]
    for name, color in COLORS.items():
        axes.loglog(lengths, [1000 * row[name] for row in rows], "o-", color=color, label=name, base=2)
    meets = crossover(rows)
    if meets is not None:
        axes.axvline(meets, color="0.6", linestyle=":", label=f"SeT faster from length {meets} on")
    axes.set_yscale("log", base=10)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("sequence length")
    axes.set_ylabel("forward, ms (median)")
    axes.set_title(f"Self-attention module, width {WIDTH}, {HEADS} heads, float32, threads: {torch.get_num_threads()}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def transport_plans(model: Classifier, pixels: Tensor) -> Tensor:
    """The plan of the last layer for digits [N,64,1]: [N,H,64,M], the mass of each pixel that goes to each reference.

    It is exp(ℓ + f + g) after the layer's own number of Sinkhorn iterations, so its columns sum to b = 1/M.
    """
    *before, last = model.blocks
    attention = last.attention
    tokens = last.norm1(nn.Sequential(*before)(model.embed(pixels) + model.position))
    weight, bias = attention.in_proj_weight.chunk(3)[1], attention.in_proj_bias.chunk(3)[1]
    keys = nn.functional.linear(tokens, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    cosines = nn.functional.normalize(keys, dim=-1) @ nn.functional.normalize(attention.references, dim=-1).mT
    log_kernel = (torch.exp(attention.bandwidth * (cosines - 1)) - 1) / attention.epsilon
    f, g = SF.sinkhorn(log_kernel, num_iters=attention.num_iters)
    return torch.exp(log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2))


def sharpest(plans: Tensor) -> Tensor:
    """The references, those first whose mass comes from the fewest pixels (lowest entropy of a column): [M]."""
    columns = plans / plans.sum(1, keepdim=True)
    return torch.special.entr(columns).sum(1).mean(0).argsort()


def plot_plan(model: Classifier, path: Path) -> None:
    """A row a digit: the image, each pixel's main reference as a colour, and where some references get their mass."""
    _, _, images, labels = load()
    digits = torch.tensor([int((labels == digit).nonzero()[0]) for digit in (0, 1, 4, 8)])
    plans = transport_plans(model, images[digits])[:, 0]  # head 0: [4,64,M]
    shown = sharpest(plans)[:SHOWN]
    figure, axes = plt.subplots(len(digits), 2 + SHOWN, figsize=(1.25 * (2 + SHOWN), 5.6), constrained_layout=True)
    for row, (image, plan) in zip(axes, zip(images[digits], plans, strict=True), strict=True):
        row[0].imshow(image.view(SIDE, SIDE).numpy(), cmap="gray_r")
        row[1].imshow(plan.argmax(-1).view(SIDE, SIDE).numpy(), cmap="tab20", vmin=0, vmax=REFERENCES - 1)
        for axis, reference in zip(row[2:], shown, strict=True):
            axis.imshow(plan[:, reference].view(SIDE, SIDE).numpy(), cmap="viridis", vmin=0)
    titles = ["digit", "main reference", *(f"to reference {int(reference)}" for reference in shown)]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("Transport plan of the last layer, head 0: which pixels go to which reference", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
