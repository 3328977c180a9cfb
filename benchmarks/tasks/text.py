"""Bytes as vectors: each byte's own and those of the bytes before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64
BUCKETS, GRAMS = 8192, (2, 3, 4, 6)
STD = 0.02  # of embeddings and positions at the start, as in GPT-2


class ByteEmbedding(nn.Module):
    """bytes [B,L] -> [B,L,WIDTH]: the byte's own vector plus hashed vectors of the last `GRAMS` bytes up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, WIDTH)
        self.grams = nn.ModuleDict({str(n): nn.Embedding(BUCKETS, WIDTH) for n in GRAMS})
        for table in (self.byte, *self.grams.values()):
            nn.init.normal_(table.weight, std=STD)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens)
        for n, table in self.grams.items():
            x = x + table(hashed_grams(tokens, int(n)))
        return x


def hashed_grams(tokens: Tensor, n: int) -> Tensor:
    """Bucket of the `n` bytes that end at each position (shorter at the start): [B,L] in [0, BUCKETS)."""
    code = torch.zeros_like(tokens)
    for back in range(n):
        shifted = nn.functional.pad(tokens, (back, 0))[:, : tokens.shape[1]]
        code = (code * 1_000_003 + shifted + 1) % 2_147_483_647
    return code % BUCKETS
