"""A task of sentence encoders: the sign of a snippet's rating, by a linear probe of the vectors and by fine-tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEEDS = 3
PROBE_TEXTS = 2000
WARMUP, HEAD_RATE = 0.1, 10.0  # the new head learns this much faster than what is pretrained

Rated = Sequence[tuple[float, str]]
Collate = Callable[[Sequence[str]], dict[str, Tensor]]


def read_snippets(paths: Sequence[Path], documents: bool = False) -> list[tuple[float, str]]:
    """(rating, text) of each line, in an order drawn once.

    Args:
        documents: of all lines of a document instead, in their order, with the mean of their ratings: those of a file
            that are numbered alike before the underscore.
    """
    found: dict[tuple[Path, str], list[tuple[float, str]]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            number, *rest = line.split("\t", 2)
            if len(rest) == 2:
                document = number.split("_")[0] if documents else f"{len(found)}"
                found.setdefault((path, document), []).append((float(rest[0]), rest[1].strip()))
    rows = [(sum(rating for rating, _ in x) / len(x), " ".join(text for _, text in x)) for x in found.values()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


def signed(rows: Rated) -> tuple[list[str], Tensor]:
    """The texts whose rating has a sign, and whether it is positive [N], int64."""
    kept = [row for row in rows if row[0] != 0]
    return [text for _, text in kept], torch.tensor([int(rating > 0) for rating, _ in kept])


def vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors [B, E]: the mean over a text's tokens."""
    weight = batch["attention_mask"][..., None]
    return F.normalize((model(**batch).last_hidden_state * weight).sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str], collate: Collate) -> Tensor:
    """Unit vectors [N, E]."""
    return torch.cat([vectors(model, collate(texts[i : i + 64])) for i in range(0, len(texts), 64)])


def probe(train: Tensor, signs: Tensor, test: Tensor, wanted: Tensor, seed: int) -> float:
    """Accuracy of a logistic regression on half of the training texts, drawn by the seed."""
    from sklearn.linear_model import LogisticRegression

    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(train) // 2]
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(train[rows].numpy(), signs[rows].numpy())
    return float(fitted.score(test.numpy(), wanted.numpy()))


def probes(model: nn.Module, train: Rated, test: Rated, collate: Collate) -> list[tuple[str, float]]:
    """A row a seed."""
    (texts, signs), (tests, wanted) = signed(train[:PROBE_TEXTS]), signed(test)
    known, asked = embed(model, texts, collate), embed(model, tests, collate)
    return [(f"probe_accuracy, seed {s}", probe(known, signs, asked, wanted, s)) for s in range(SEEDS)]


class Classifier(nn.Module):
    """Two logits [B, 2] from a copy of an encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model)
        self.head = nn.Linear(model.config.hidden_size, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        # Entries of a unit vector are small: at this scale they have variance 1, what a linear layer starts from.
        return self.head(vectors(self.encoder, batch) * math.sqrt(self.head.in_features))


def fine_tuned(
    model: nn.Module, train: Rated, test: Rated, collate: Collate, seed: int, steps: int, learning_rate: float
) -> float:
    """Accuracy on test of a classifier all of whose weights learned on train: AdamW, 32 texts a step, dropout as the
    model's configuration has it, the learning rate warmed up over a tenth of the steps and then falling to 0."""
    (texts, signs), (tests, wanted) = signed(train), signed(test)
    torch.manual_seed(seed)
    classifier = Classifier(model).train()
    groups = [
        {"params": classifier.encoder.parameters(), "lr": learning_rate},
        {"params": classifier.head.parameters(), "lr": HEAD_RATE * learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))
    )
    for _ in range(steps):
        rows = torch.randint(len(texts), (32,)).tolist()
        loss = F.cross_entropy(classifier(collate([texts[i] for i in rows])), signs[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        found = torch.cat([classifier(collate(tests[i : i + 64])).argmax(-1) for i in range(0, len(tests), 64)])
    return float((found == wanted).double().mean())
