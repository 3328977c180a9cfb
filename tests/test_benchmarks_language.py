"""benchmarks.quality's language models: what they see and start from, their table, and their speed is measured."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.quality import __main__ as command
from benchmarks.quality import decoding, language, results, steps, table

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_language_models_shows_the_table_of_its_results() -> None:
    page = (ROOT / "docs" / "language_model.md").read_text()
    (name,) = set(re.findall(r"\(../benchmarks/results/(quality_\S+\.csv)\)", page))
    rows = results.read(ROOT / "benchmarks" / "results" / name)
    assert results.missing(command.plan(False, list(language.BY_NAME)), rows) == []
    assert [line for line in table.render(rows).splitlines() if line not in page] == []


@pytest.mark.parametrize("name", language.MIXINGS)
def test_language_models_see_the_past_alone(name: str) -> None:
    model = language.initial(name, 0).model.eval()
    x = torch.randint(256, (2, 12))
    other = torch.cat([x[:, :7], torch.randint(256, (2, 5))], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(other)[:, :7], model(x)[:, :7])
        assert not torch.allclose(model(other)[:, 7:], model(x)[:, 7:])


def test_language_models_start_alike() -> None:
    models = [language.initial(name, 3).state_dict() for name in language.MIXINGS]
    for name in set.intersection(*(set(one) for one in models)):
        assert all(torch.equal(one[name], models[0][name]) for one in models), name
    assert not torch.equal(language.initial("SeT causal", 4).state_dict()["model.decoder.word.weight"],
                           models[0]["model.decoder.word.weight"])  # fmt: skip


def test_gated_elu_is_its_recurrence() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(1, 2, 9, dtype=torch.float64)
    o = language.GatedElu()(q, k, v, log_decay=decay)[0]
    sums, total = torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(1, 2, 4, dtype=torch.float64)
    for i in range(9):
        a, b = nn.functional.elu(q[:, :, i]) + 1, nn.functional.elu(k[:, :, i]) + 1
        fade = decay[:, :, i, None].exp()
        sums, total = sums * fade[..., None] + b[..., None] * v[:, :, i, None], total * fade + b
        want = (a[..., None, :] @ sums).squeeze(-2) / (a * total).sum(-1, keepdim=True)
        torch.testing.assert_close(o[:, :, i], want)


def test_rotary_positions_are_relative_and_its_cache_is_the_keys() -> None:
    attention, (q, k, v) = language.Rotary(8), (torch.randn(1, 2, 6, 8) for _ in range(3))
    scores = [attention.turned(q, first) @ attention.turned(k, first).mT for first in (0, 50)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
    whole, state, parts = attention(q, k, v)[0], None, []
    for i in range(6):
        o, state = attention(*(x[:, :, i : i + 1] for x in (q, k, v)), state=state, need_state=True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)


def test_bits_of_a_byte() -> None:
    labels = torch.tensor([[0, 1], [2, 2]])
    uniform = torch.zeros(4, 256)
    assert language.bits(nn.Identity(), uniform, labels.view(4, 1)) == pytest.approx(8.0)


def test_language_models_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["SeT causal, gate, conv", "softmax, rotary"]
    chosen = [word for name in names for word in ("--variant", name)]
    assert command.main(["run", "--quick", "--task", "lm", *chosen, "--out", str(tmp_path), "--name", "x"]) == 0
    shown = capsys.readouterr().out
    assert "length 256: bits per byte |" in shown
    assert "Bits per byte, mean" in shown
    for name in names:
        assert 4.0 < float(re.search(rf"\| {name} \| ([0-9.]+) \|", shown).group(1)) < 9.0
    assert all(one.task.name not in language.BY_NAME for one in command.plan(False))


def test_decoding_goes_on_from_the_prompt_that_was_read() -> None:
    """Softmax with its keys in memory that is there from the start, and SeT in pieces: as one call of the whole."""
    x = torch.randint(256, (1, 12))
    for kind in ("softmax", "set"):
        model = decoding.decoder(kind, 16, 2, 2)
        with torch.no_grad():
            past = decoding.empty(model.decoder, kind, 12)
            for piece in x.split([9, 1, 1, 1], 1):
                logits, past = model.with_past(piece, past=past)
            torch.testing.assert_close(logits[:, -1], model(x)[:, -1], rtol=1e-4, atol=1e-5)


def test_decoding_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "16", "--heads", "2", "--depth", "1", "--threads", "1", "--prefill-up-to", "16"]
    assert decoding.main([*small, "--contexts", "16", "64", "--out", str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert "SeT generates faster" in shown
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = {(row["attention"], row["context"]): row for row in csv.DictReader(file)}
    assert rows["set", "16"]["kept_bytes"] == rows["set", "64"]["kept_bytes"]
    assert 4 * int(rows["softmax", "16"]["kept_bytes"]) == int(rows["softmax", "64"]["kept_bytes"]) == 64 * 32 * 4
    assert rows["set", "64"]["prefill_tokens_per_s"] == "nan" != rows["set", "16"]["prefill_tokens_per_s"]


def test_where_set_wins() -> None:
    def rows(*speeds: float) -> list[decoding.Row]:
        kinds = [("set", speed) for speed in speeds] + [("softmax", 10.0)] * len(speeds)
        return [decoding.Row(kind, n % len(speeds), speed, 0, 0, 0, 0) for n, (kind, speed) in enumerate(kinds)]

    assert decoding.wins(rows(5, 11, 12)) == 1
    assert decoding.wins(rows(11, 9, 12)) == 2
    assert decoding.wins(rows(11, 12, 9)) is None


def test_training_steps_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "16", "--heads", "2", "--depth", "1", "--threads", "1", "--seconds", "0"]
    assert steps.main([*small, "--lengths", "16", "48", "--out", str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert "A step with SeT takes less" in shown
    assert re.search(r"\| 48 \| [0-9.]+ \([0-9.]+ to [0-9.]+\) \| ", shown)
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = {(row["attention"], row["length"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {(kind, length) for kind in ("softmax", "set") for length in ("16", "48")}
    for row in rows.values():
        assert 0 < float(row["step_q25"]) <= float(row["step_ms"]) <= float(row["step_q75"])
        assert (row["rounds"], row["threads"]) == ("3", "1")
    assert rows["set", "16"]["ratio"] == "1.0" != rows["softmax", "16"]["ratio"]


def test_training_steps_train() -> None:
    """Every parameter gets a gradient, and the loss of these tokens falls."""
    for kind in steps.MIXINGS:
        trainer = steps.training(kind, 32, 16, 2, 1)
        losses = [trainer.step(1e-2)[0] for _ in range(5)]
        assert losses[-1] < losses[0]
        assert all(p.grad is not None for p in trainer.model.parameters())


def test_where_steps_take_less() -> None:
    def rows(*ratios: float) -> list[steps.Row]:
        own = {"softmax": ratios, "set": [1.0] * len(ratios)}
        return [steps.Row(kind, n, 1, 1, 1, ratio, 3, 16, 2, 1) for kind in own for n, ratio in enumerate(own[kind])]

    assert steps.wins(rows(0.5, 1.1, 1.2)) == 1
    assert steps.wins(rows(1.1, 0.9, 1.2)) == 2
    assert steps.wins(rows(1.1, 1.2, 0.9)) is None
