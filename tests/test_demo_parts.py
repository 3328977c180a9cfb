"""The demo's claims hold: same weights and batches for both models, no file in both splits, honest arithmetic."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.tasks import sources, training
from benchmarks.tasks.text import BUCKETS, hashed_grams
from demo import digits, figures, report, text
from demo.models import SET, SOFTMAX, Classifier, build_pair, place_references


def tiny(attention: Any) -> Classifier:
    return Classifier(nn.Linear(1, 16), torch.randn(64, 16), 10, attention, heads=2, depth=2)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twelve packages; every file has a byte pattern that no other file has."""
    rng = np.random.default_rng(0)
    for p in range(12):
        package = tmp_path / f"package{p:02}"
        (package / "tests").mkdir(parents=True)
        (package / "__init__.py").write_bytes(b"")
        for f in range(4 if p == 0 else 9):  # the first has too few files
            (package / f"module{f}.py").write_bytes(rng.bytes(sources.LENGTH * (p + 2) + 17))
        (package / "tests" / "big.py").write_bytes(rng.bytes(sources.LENGTH * 50))
    (tmp_path / "not_a_package").mkdir()
    return tmp_path


def test_both_models_start_from_the_same_weights() -> None:
    softmax, ours = (build_pair(tiny, name, 4, seed=3).state_dict() for name in (SOFTMAX, SET))
    assert set(softmax) < set(ours)
    assert all(torch.equal(softmax[name], ours[name]) for name in softmax)
    assert all("references" in name for name in set(ours) - set(softmax))


def test_swap_changes_the_attention_class_only() -> None:
    softmax, ours = (build_pair(tiny, name, 4, seed=0) for name in (SOFTMAX, SET))
    kinds = [(type(a), type(b)) for a, b in zip(softmax.modules(), ours.modules(), strict=True)]
    assert {b.__name__ for a, b in kinds if a is not b} == {"SeTAttention"}
    x = torch.randn(3, 64, 1)
    assert softmax(x).shape == ours(x).shape == (3, 10)


def test_place_references_moves_the_references_of_every_layer_and_nothing_else() -> None:
    model = build_pair(tiny, SET, 4, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    place_references(model, torch.randn(8, 64, 1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{i}.attention.references" for i in range(2)}
    assert all(len(block.attention._forward_pre_hooks) == 1 for block in model.blocks)  # only the module's own


def test_training_lowers_the_loss() -> None:
    x, y = digits.load()[:2]
    trainer = training.Trainer(build_pair(tiny, SET, 4, seed=0), lambda: (x[:64], y[:64]))
    (run,) = training.train_together({SET: trainer.step}, 60, 60.0, 1e-2)
    assert len(run.losses) == len(run.step_seconds) == 60
    assert run.losses[-1] < 0.7 * run.losses[0]


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert training.rate(0.0) == training.rate(1.0) == 0.0
    assert 0.97 < training.rate(0.1) <= 1.0
    assert all(training.rate(p / 100) > training.rate((p + 1) / 100) for p in range(10, 100))


def recorder(rates: list[float], seconds: float) -> training.Step:
    def step(rate: float) -> tuple[float, float]:
        time.sleep(seconds)
        rates.append(rate)
        return 1.0, seconds

    return step


def test_time_guard_cuts_both_models_at_the_same_step() -> None:
    slow: list[float] = []
    fast: list[float] = []
    steps = {SOFTMAX: recorder(slow, 0.04), SET: recorder(fast, 0.01)}
    runs = training.train_together(steps, 1000, 1.5, 1.0)
    assert training.MIN_STEPS <= len(slow) < 100
    assert slow == fast
    assert [len(run.losses) for run in runs] == [len(slow)] * 2
    assert slow[-1] < 0.1 * max(slow)  # the schedule came to its end


def test_without_time_there_are_still_some_steps() -> None:
    rates: list[float] = []
    training.train_together({SET: recorder(rates, 0.15)}, 1000, -5.0, 1.0)
    assert len(rates) == training.MIN_STEPS


def test_peak_memory_sees_an_allocation() -> None:
    block = torch.ones(64 * 2**20)
    assert training.peak_memory() > block.nbytes


def test_digits_comparison_has_equal_steps_and_is_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "STEPS", 10)
    (_, first), (_, second) = digits.compare(600.0), digits.compare(600.0)
    assert first["steps"] == 10
    assert [row["attention"] for row in first["models"]] == [SOFTMAX, SET]
    assert [row["steps"] for row in first["models"]] == [10, 10]
    for a, b in zip(first["models"], second["models"], strict=True):
        assert a["final_loss"] == pytest.approx(b["final_loss"], rel=1e-3)


def test_corpus_takes_the_largest_packages_and_leaves_tests_out(library: Path) -> None:
    files = sources.package_files(library)
    assert list(files) == [f"package{p:02}" for p in range(4, 12)]
    assert all("tests" not in path.parts for paths in files.values() for path in paths)


def test_no_file_is_in_both_splits(library: Path) -> None:
    corpus = sources.load(library)
    train = b"".join(data.tobytes() for data in corpus.train)
    chunks = [bytes(row.tolist()) for row in corpus.test_tokens]
    assert len(chunks) == 3 * sum(range(6, 14))
    assert not any(chunk[:64] in train or chunk[-64:] in train for chunk in chunks)
    assert corpus.files == (8 * 6, 8 * 3)


def test_corpus_labels_are_right(library: Path) -> None:
    corpus = sources.load(library)
    content = [b"".join(p.read_bytes() for p in (library / name).glob("*.py")) for name in corpus.packages]
    tokens, labels = corpus.sample(16, np.random.default_rng(0))
    assert tokens.shape == (16, sources.LENGTH)
    for rows, classes in ((tokens, labels), (corpus.test_tokens[:16], corpus.test_labels[:16])):
        ends = [(bytes(row[:32].tolist()), bytes(row[-32:].tolist())) for row in rows]  # a window may span two files
        assert all(first in content[k] and last in content[k] for (first, last), k in zip(ends, classes, strict=True))


def test_standard_library_of_this_python_is_enough() -> None:
    corpus = sources.load()
    assert len(corpus.packages) == sources.CLASSES
    assert len(corpus.test_labels) >= 100
    assert corpus.test_labels.unique().numel() == sources.CLASSES


def test_hashed_grams_depend_on_the_last_bytes_only() -> None:
    tokens = torch.randint(256, (2, 40))
    other = tokens.clone()
    other[:, 10] = (other[:, 10] + 1) % 256
    same = hashed_grams(tokens, 3) == hashed_grams(other, 3)
    assert same[:, :10].all()
    assert not same[:, 10:13].any()
    assert same[:, 13:].all()
    assert hashed_grams(tokens, 3).max() < BUCKETS


def test_crossover_is_the_length_from_which_set_always_wins() -> None:
    def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"length": 64 * 2**i, SOFTMAX: a, SET: b} for i, (a, b) in enumerate(pairs)]

    assert figures.crossover(rows((1, 2), (3, 2), (1, 2), (4, 1), (9, 1))) == 512
    assert figures.crossover(rows((2, 1), (3, 2))) == 64
    assert figures.crossover(rows((2, 1), (1, 2))) is None


def test_verdicts_name_the_winner_and_the_noise() -> None:
    assert report.accuracy_verdict(0.9, 0.5, 400) == "accuracy: nn.MultiheadAttention ahead by 40.0 points"
    assert "SeTAttention ahead by 1.0 points, within the noise" in report.accuracy_verdict(0.9, 0.91, 400)
    assert report.ratio_verdict("a step", 2.0, 1.0, "slower", "faster") == "a step: SeTAttention 2.00x faster"
    assert report.ratio_verdict("a step", 1.0, 2.0, "slower", "faster") == "a step: SeTAttention 2.00x slower"


def test_transport_plan_has_the_masses_of_the_definition() -> None:
    model = build_pair(digits.build, SET, digits.REFERENCES, 0)
    plan = figures.transport_plans(model, digits.load()[2][:3])
    assert plan.shape == (3, digits.HEADS, digits.PIXELS, digits.REFERENCES)
    torch.testing.assert_close(plan.sum(-2), torch.full(plan.shape[:2] + plan.shape[3:], 1 / digits.REFERENCES))


def test_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "LENGTHS", (16, 32))
    rows = figures.time_lengths(budget=60.0)
    assert [row["length"] for row in rows] == [16, 32]
    monkeypatch.setattr(figures, "ALWAYS", 16)
    assert [row["length"] for row in figures.time_lengths(budget=-1.0)] == [16]
    figures.plot_lengths(rows, tmp_path / "lengths.png")
    figures.plot_plan(build_pair(digits.build, SET, digits.REFERENCES, 0), tmp_path / "plan.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("lengths.png", "plan.png"))


@pytest.mark.slow
def test_text_model_trains_in_a_process_of_its_own() -> None:
    worker = text.Worker(SET)
    losses = [worker.step(1e-3)[0] for _ in range(2)]
    result = worker.finish()
    assert all(0 < loss < 10 for loss in losses)
    assert 0 <= result["accuracy"] <= 1
    assert result["peak_step_bytes"] > 2**20
    assert worker.process.returncode == 0


def test_text_process_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with status 2"):
        text.Worker("nonsense")
