"""The recipe that converts a saved model: text and images, what it leaves, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_helpers import fails, recipe
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from setformer_kernels.convert import output_agreement
from setformer_kernels.models.transformers import from_pretrained
from setformer_kernels.recipes.samples import write_digits, write_texts
from setformer_kernels.recipes.wordpiece import train_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHORT = ["--references", 8, "--steps", 6, "--tune-steps", 4, "--batch-size", 8, "--cpu"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts/ and a model/ that reads them."""
    folder = tmp_path_factory.mktemp("words")
    write_texts(folder / "texts", 8)
    lines = [line for path in sorted((folder / "texts").iterdir()) for line in path.read_text().splitlines()]
    train_tokenizer(lines, 200).save_pretrained(folder / "model")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=200, max_position_embeddings=32, **SIZES)).save_pretrained(folder / "model")
    return folder


def test_a_text_model_is_converted_saved_and_loaded(words: Path, tmp_path: Path) -> None:
    run = ["convert", words / "model", "--data", words / "texts", "--length", 24, *SHORT, "--output", tmp_path]
    recipe(*run, "--curve", "--max-error", 9, "--skip", r"layer\.1\.")
    report = (tmp_path / "report.md").read_text()
    assert "| encoder.layer.0.attention.self |" in report
    assert "left encoder.layer.1.attention.self: skipped by the caller" in report
    model = from_pretrained(str(tmp_path / "model")).eval()
    assert list(model.config.setformer["layers"]) == ["encoder.layer.0.attention.self"]
    assert model.encoder.layer[0].attention.self.set_transport.log_epsilon.shape == (4,)
    teacher = BertModel.from_pretrained(words / "model").eval()
    batch = {"input_ids": torch.randint(5, 100, (6, 12))}
    assert 0 < output_agreement(teacher, model, [batch])["error"] < 0.5
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())


def test_an_image_model_is_converted(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 40)
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **SIZES)).save_pretrained(
        tmp_path / "vit"
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    data = ["--data", tmp_path / "digits" / "train"]
    recipe("convert", tmp_path / "vit", *data, *SHORT, "--tune-steps", 0, "--output", tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| outputs | error | top1 | cosine | correlation | nearest |" in report
    assert "| tuned |" not in report
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()


def test_what_bad_input_gets(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(model: Path, *more: object, data: Path = words / "texts", output: str = "out") -> str:
        return fails(capsys, "convert", model, "--data", data, *SHORT, "--output", tmp_path / output, *more)

    assert f"{tmp_path / 'config.json'} cannot be read" in message(tmp_path)
    assert "--references must be ≥ 1, got 0" in message(words / "model", "--references", 0)
    assert "--skip must be a regular expression, got '('" in message(words / "model", "--skip", "(")
    assert "none holds no run" in message(words / "model", "--resume", output="none")
    short = tmp_path / "short.txt"
    short.write_text("a\nb\n")
    said = message(words / "model", "--references", 64, data=short, output="short")
    assert "all 1 samples together have fewer in encoder.layer.0" in said
    assert "pass more data, or a smaller num_references" in said
    assert "holds a run: add --resume" in message(words / "model", output="short")
    said = message(words / "model", "--resume", output="short", data=short)
    assert "is of another run: references is 64, now 8" in said
    short.write_text("a\n")
    assert "--data must hold at least 2 samples, got 1" in message(words / "model", data=short)
    short.write_bytes(b"\xff\n")
    assert f"{short} is not UTF-8" in message(words / "model", data=short)
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["Nothing"]}')
    assert "must name one of transformers' models, got architectures=['Nothing']" in message(tmp_path)
    config.write_text('{"architectures": ["BertModel"], "setformer": {"layers": {}}}')
    assert "holds a model that was converted already" in message(tmp_path)
