"""The benchmarks of conversion, on a model that takes seconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.cpu import converted, converted_decoding
from benchmarks.quality import sentiment, transfer
from setformer_kernels.recipes.wordpiece import train_tokenizer

GOOD, BAD = "a good and happy film", "a sad and dull one"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    lines = [f"{i}\t{1.5 if i % 2 else -2}\t{GOOD if i % 2 else BAD} number {i}" for i in range(60)]
    (tmp_path / "snippets.txt").write_text("\n".join([*lines, "no columns"]))
    train_tokenizer(lines, 80).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=80, **sizes)).save_pretrained(tmp_path / "encoder")
    return ["--encoder", str(tmp_path / "encoder"), "--snippets", str(tmp_path / "snippets.txt")]


def test_rows_of_a_transfer(paths: list[str], tmp_path: Path) -> None:
    run = [*paths, "--steps", "4", "--tune-steps", "2", "--out", str(tmp_path), "--name", "x", "--work", str(tmp_path)]
    run += ["--recording", str(tmp_path / "answers")]
    for references in ("4", "8"):
        assert transfer.main([*run, "--references", references, "--curve"]) == 0
    assert transfer.main([*run, "--original"]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    for references in ("4", "8"):
        found = {(row["moment"], row["name"]): float(row["value"]) for row in rows if row["references"] == references}
        assert len(found) == sum(row["references"] == references for row in rows)
        returned = "tuned" if found["tuned", "error"] <= found["matched", "error"] else "matched"
        assert found[returned, "probe_accuracy, seed 2"] > 0.9
        assert found["matched", "cosine"] != found["placed", "cosine"] != found["tuned", "cosine"]
        assert sum(moment == "curve" for moment, _ in found) == 2
        assert sum(name.startswith("error of") for _, name in found) == 2 * 2 * 4
    (original,) = {(row["references"], row["iterations"], row["seed"]) for row in rows if row["moment"] == "original"}
    assert original == ("", "", "")
    conditions = json.loads((tmp_path / "x.json").read_text())["M 8, T 1, seed 0"]
    assert (conditions["held_out_texts"], conditions["train_texts"], conditions["steps"]) == (6, 54, "4")


def test_seeds_are_runs_of_their_own_and_the_task_is_learned(paths: list[str], tmp_path: Path) -> None:
    run = [*paths, "--steps", "1", "--tune-steps", "0", "--out", str(tmp_path), "--name", "x", "--work", str(tmp_path)]
    run += ["--references", "4", "--task-steps", "30", "--task-learning-rate", "3e-3"]
    for seed in ("0", "1"):
        assert transfer.main([*run, "--seed", seed]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    value = {(row["seed"], row["moment"], row["name"]): float(row["value"]) for row in rows}
    assert value["0", "placed", "error"] != value["1", "placed", "error"]
    for seed in range(3):
        assert value["0", "matched", f"fine_tuned_accuracy, seed {seed}"] > 0.9


def test_a_documents_snippets_are_one_text(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("1_1\t1\tone\n1_2\t2\ttwo\nno columns\n2_1\t-1\tthree\n")
    second.write_text("1_1\t-2\tfour\n")
    files = [first, second]
    assert sorted(sentiment.read_snippets(files, documents=True)) == [(-2, "four"), (-1, "three"), (1.5, "one two")]
    assert sorted(sentiment.read_snippets(files)) == [(-2, "four"), (-1, "three"), (1, "one"), (2, "two")]


def test_rows_of_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "TOKENS", 64)
    assert converted.main(["--length", "32", "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    named = [(row["length"], row["batch"], row["model"]) for row in rows]
    assert named == [("32", "2", "softmax"), ("32", "2", "SeT")]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)


def test_rows_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted_decoding, "WIDTH", 32)
    told = ["--context", "8", "--context", "64", "--references", "4", "--seconds", "0.1", "--out", str(tmp_path)]
    assert converted_decoding.main(told) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    kinds = [("softmax", "keys and values"), ("SeT", "keys and values"), ("SeT", "state")]
    named = [(row["context"], row["attention"], row["cache"]) for row in rows]
    assert named == [(c, *kind) for c in ("8", "64") for kind in kinds]
    sizes = [int(row["kept_bytes"]) for row in rows]
    assert sizes[:2] == [4 * 2 * 4 * 8 * 4 * 4] * 2
    assert sizes[3:5] == [8 * n for n in sizes[:2]]
    assert sizes[2] == sizes[5]
