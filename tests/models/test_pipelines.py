"""The models in transformers' pipelines: one input, a batch with padding, and what the task is there for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import built, tokenizer
from transformers import ViTImageProcessor, pipeline

TASKS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
    "feature-extraction": "TextModel",
    "zero-shot-classification": "ForSequenceClassification",
    "image-classification": "ForImageClassification",
    "image-feature-extraction": "Model",
}


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))


def numbers(answer: Any) -> list[float]:
    """The scores or features in what a pipeline answers."""
    if isinstance(answer, dict):
        return numbers(answer.get("scores", answer.get("score")))
    return [x for part in answer for x in numbers(part)] if isinstance(answer, list) else [answer]


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task: str) -> None:
    model = built(TASKS[task])
    call: dict[str, Any] = {}
    if "image" in task:
        parts: dict[str, Any] = {"image_processor": ViTImageProcessor(size={"height": 32, "width": 32})}
        samples: list[Any] = [image(), image()]
    else:
        parts = {"tokenizer": tokenizer()}
        samples = ["hello [MASK]", "hello world hello [MASK] hello"]
    if task == "zero-shot-classification":
        model.config.label2id = {"entailment": 2, "neutral": 1, "contradiction": 0}
        call["candidate_labels"] = ["world", "hello"]
    run = pipeline(task, model=model, device="cpu", **parts)
    alone = [run(sample, **call) for sample in samples]
    together = run(samples, batch_size=2, **call)
    assert len(together) == 2
    for a, b in zip(alone, together, strict=True):
        # the features of the padding come last
        torch.testing.assert_close(numbers(b)[: len(numbers(a))], numbers(a), rtol=1e-4, atol=1e-5)
