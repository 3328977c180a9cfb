"""The language-model recipe on made-up sentences: what it learns, resuming, tokenizers, samples, and bad input."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from recipe_helpers import fails, metrics, recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from setformer_kernels.recipes.lm import END, Vocabulary, Windows, files_of, read, split
from setformer_kernels.recipes.samples import GOOD, write_texts
from setformer_kernels.recipes.wordpiece import train_tokenizer

SMALL = ["--size", "tiny", "--references", 8, "--length", 64, "--batch-size", 16, "--sample-tokens", 20, "--cpu"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder, 40)
    return folder


def test_sentences_are_learned_and_the_saved_model_scores_the_same(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["lm", texts, *SMALL, "--output", tmp_path / "run"]
    recipe(*run, "--epochs", 1, "--learning-rate", "1e-2", "--samples", 1, "--temperature", 0)
    measured = metrics(tmp_path / "run")
    assert measured["bits_per_byte"] < 4.3  # of 8 at the start
    assert measured["perplexity"] == pytest.approx(2 ** (measured["bits_per_byte"] / tokens_a_byte(texts)), rel=1e-4)
    sample = (tmp_path / "run" / "samples.txt").read_text()
    held_out = (texts / "0000.txt").read_text()
    assert sample.startswith(f"--- sample 1\n{held_out[:32]}")
    assert sample in capsys.readouterr().out
    recipe("lm", texts, *SMALL, "--output", tmp_path / "again", "--evaluate", tmp_path / "run" / "model")
    assert metrics(tmp_path / "again") == pytest.approx(measured)


def tokens_a_byte(texts: Path) -> float:
    """Tokens a byte of the held-out files."""
    held = files_of(texts, "*")[::10]
    return 1 + len(held) / sum(path.stat().st_size for path in held)


def test_a_run_resumes_to_the_same_weights(texts: Path, tmp_path: Path) -> None:
    run = ["lm", texts, *SMALL, "--samples", 0, "--save-every", 2, "--epochs", 0.2, "--output", tmp_path]
    recipe(*run)
    want = load_file(tmp_path / "model" / "model.safetensors")
    for path in tmp_path.glob("checkpoint-*"):
        if path.name != "checkpoint-2":  # as if killed while writing it
            (path / "complete").unlink()
    recipe(*run, "--resume")
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(value, want[name]), name
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.eos_token_id, config.use_cache) == (END, True)


def test_a_tokenizer_of_words(texts: Path, tmp_path: Path) -> None:
    sentences = "".join(path.read_text() for path in texts.iterdir()).split("\n")
    tokenizer = train_tokenizer(sentences, 80)
    tokenizer.save_pretrained(tmp_path / "words")
    switches = ["--precision", "bf16", "--gradient-checkpointing", "--accumulate", 2, "--no-gate", "--conv-width", 2]
    run = ["lm", texts, *SMALL, "--length", 16, "--epochs", 0.2, "--tokenizer", tmp_path / "words", *switches]
    recipe(*run, "--prompt", "the film", "--output", tmp_path / "run")
    measured = metrics(tmp_path / "run")
    assert 1.0 < measured["perplexity"] < 80.0
    assert measured["bits_per_byte"] < measured["loss"]  # a token is many bytes
    assert (tmp_path / "run" / "samples.txt").read_text().count("the film") >= 2
    again = ["--output", tmp_path / "again", "--evaluate", tmp_path / "run" / "model"]
    recipe("lm", texts, *SMALL, "--length", 16, "--samples", 0, *again)  # with the tokenizer beside it
    assert metrics(tmp_path / "again") == pytest.approx(measured, rel=0.02)  # without bfloat16


def test_windows_overlap_in_the_token_that_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(10)))
    (tmp_path / "b").write_bytes(b"\xff")
    rows = Windows([(tmp_path / "a", slice(None)), (tmp_path / "b", slice(None))], Vocabulary(None), 4)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 256, 255, 256]]
    assert rows.tokens_per_byte == 13 / 11
    assert Vocabulary(None).decode([*"é".encode(), END, 255]) == "é�"


def test_one_file_is_split_and_another_held_out(texts: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.bin"
    one.write_bytes(bytes(range(256)) * 8)
    recipe("lm", one, *SMALL, "--samples", 0, "--epochs", 1, "--output", tmp_path / "one")
    recipe("lm", one, *SMALL, "--samples", 0, "--held-out", texts, "--output", tmp_path / "two", "--evaluate",
           tmp_path / "one" / "model")  # fmt: skip
    assert metrics(tmp_path / "one")["loss"] != metrics(tmp_path / "two")["loss"]


def test_what_is_held_out_is_not_trained_on_and_no_character_is_cut(texts: Path, tmp_path: Path) -> None:
    some = texts / "0003.txt"
    train, held = split(Namespace(data=texts, pattern="*", held_out=some, evaluate=None))
    assert [path for path, _ in held] == [some]
    assert sorted([some, *(path for path, _ in train)]) == files_of(texts, "*")
    wide = tmp_path / "wide.txt"
    for n in range(30, 33):
        wide.write_text("日" * n)
        for part in split(Namespace(data=wide, pattern="*", held_out=None, evaluate=None)):
            assert set(read(wide)[part[0][1]].decode()) == {"日"}


def test_what_bad_texts_get(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(data: Path, *more: object) -> str:
        return fails(capsys, "lm", data, *SMALL, "--output", tmp_path / "out", *more)

    assert f"{tmp_path / 'no'} must be a file, or a folder with files '*'" in message(tmp_path / "no")
    assert "a folder with files '*.md'" in message(texts, "--pattern", "*.md")
    short = tmp_path / "short"
    short.write_text("short")
    assert "must have more than --length 64 tokens together, got 5" in message(short)
    short.write_text("")
    assert "must have more than --length 64 tokens together, got 1" in message(short)
    assert "must leave files of" in message(texts, "--held-out", texts)
    assert "--length must be ≥ 1, got 0" in message(texts, "--length", 0)
    assert "--temperature must be ≥ 0, got -1" in message(texts, "--temperature", -1)
    assert "--context-parallel must be ≥ 1, got 0" in message(texts, "--context-parallel", 0)
    assert "--context-parallel must be ≤ --length 64, got 65" in message(texts, "--context-parallel", 65)
    assert "--context-parallel must divide the number of ranks, 1, got 2" in message(texts, "--context-parallel", 2)
    assert f"{texts} holds no tokenizer" in message(texts, "--tokenizer", texts)
    train_tokenizer(GOOD, 60).save_pretrained(tmp_path / "words")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff" * 100)
    assert f"{binary} is not UTF-8" in message(binary, "--tokenizer", tmp_path / "words")


def test_no_other_recipe_shares_what_is_no_window(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe("glue", "sst2", "data", "--output", "out", "--context-parallel", 2)
    assert ended.value.code == 2
    assert "unrecognized arguments: --context-parallel 2" in capsys.readouterr().err
