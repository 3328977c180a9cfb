"""One small pre-norm transformer; which attention it has is the only thing that differs between two runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.tasks.encoder import Block
from setformer_kernels import SeTAttention

Attention = Callable[..., nn.MultiheadAttention]

SOFTMAX, SET = "nn.MultiheadAttention", "SeTAttention"


def attention_named(name: str, num_references: int) -> Attention:
    """The whole swap is this line: another class with the same constructor, call and parameter names."""
    return {SOFTMAX: nn.MultiheadAttention, SET: partial(SeTAttention, num_references=num_references)}[name]


class Classifier(nn.Module):
    """Embed tokens, add learned positions, run the blocks, average over the tokens, normalise, classify."""

    def __init__(
        self, embed: nn.Module, position: Tensor, classes: int, attention: Attention, *, heads: int, depth: int
    ) -> None:
        super().__init__()
        width = position.shape[1]
        self.embed = embed  # tokens of any kind -> [B, length, width]
        self.position = nn.Parameter(position)  # [length, width]
        self.blocks = nn.Sequential(*(Block(width, heads, partial(attention, batch_first=True)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, classes]."""
        x = self.blocks(self.embed(tokens) + self.position)
        return self.head(self.norm(x.mean(1)))


def build_pair(build: Callable[[Attention], Classifier], name: str, num_references: int, seed: int) -> Classifier:
    """The model `name`, with the same initial weights in both models wherever both have the parameter."""
    torch.manual_seed(seed)
    softmax = build(attention_named(SOFTMAX, num_references))
    model = build(attention_named(name, num_references))
    model.load_state_dict(softmax.state_dict(), strict=False)
    return model


@torch.no_grad()
def place_references(model: Classifier, tokens: Tensor) -> None:
    """Put every layer's references on the k-means centres of its keys for some sample tokens (no labels used)."""

    def place(module: SeTAttention, args: tuple[Tensor, ...]) -> None:
        module.initialize_references(args[0])

    layers = [module for module in model.modules() if isinstance(module, SeTAttention)]
    handles = [layer.register_forward_pre_hook(place) for layer in layers]  # a layer sees its predecessors' new ones
    model(tokens)
    for handle in handles:
        handle.remove()
