"""benchmarks.quality: the generators are right, only the attention differs, training learns, results can be resumed."""

from __future__ import annotations

import csv
import itertools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import nn

from benchmarks.quality import __main__ as command
from benchmarks.quality import results, table, tasks, train
from benchmarks.quality.model import Alone, Elu, Softmax, sinusoids
from benchmarks.tasks import listops, shapes, sources
from setformer_kernels import SeTAttention

ROOT = Path(__file__).resolve().parents[1]
TASKS = {task.name: task for task in tasks.TASKS}
NAMES = {"[MIN": "MIN", "[MAX": "MAX", "[MED": "MED", "[SM": "SM"}
FUNCTIONS = {
    "MIN": lambda *x: min(x),
    "MAX": lambda *x: max(x),
    "MED": lambda *x: int(np.median(x)),
    "SM": lambda *x: int(np.sum(x) % 10),
}


@pytest.fixture(scope="module")
def expressions() -> list[tuple[list[str], int]]:
    words = {token: word for word, token in listops.VOCABULARY.items()}
    return [([words[token] for token in tokens], value) for tokens, value in listops.samples(600, 0)]


def as_python(words: list[str]) -> str:
    """[MAX 1 [SM 2 3 ] ] -> MAX(1,SM(2,3,),)."""
    spelled = {word: f"{name}(" for word, name in NAMES.items()} | {listops.END: "),"}
    text = "".join(spelled.get(word, f"{word},") for word in words)
    return text.rstrip(",")


def test_listops_values_are_those_of_an_independent_evaluation(expressions: list[tuple[list[str], int]]) -> None:
    for words, value in expressions:
        assert eval(as_python(words), {"__builtins__": {}}, FUNCTIONS) == value, " ".join(words)


def test_listops_known_values() -> None:
    cases = {"[MAX 4 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]": 5, "[MED 1 2 ]": 1, "[SM 9 [SM 5 6 ] 3 ]": 3, "7": 7}
    assert {text: listops.value(text.split()) for text in cases} == cases


def test_listops_expressions_keep_the_rules(expressions: list[tuple[list[str], int]]) -> None:
    operators: list[str] = []
    for words, _ in expressions:
        assert listops.MIN_LENGTH <= len(words) <= listops.MAX_LENGTH
        arguments = [0]
        for word in words:
            if word == listops.END:
                assert 2 <= arguments.pop() <= listops.MAX_ARGUMENTS
                continue
            arguments[-1] += 1
            if word in listops.OPERATORS:
                operators.append(word)
                arguments.append(0)
            assert len(arguments) <= listops.MAX_DEPTH  # operators around a word, and the top level
        assert arguments == [1]
    assert len({" ".join(words) for words, _ in expressions}) == len(expressions)
    shares = [operators.count(operator) / len(operators) for operator in listops.OPERATORS]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_listops_classes_and_lengths_are_spread(expressions: list[tuple[list[str], int]]) -> None:
    shares = np.bincount([value for _, value in expressions], minlength=10) / len(expressions)
    assert shares.min() > 0.04
    assert shares.max() < 0.25
    lengths = [len(words) for words, _ in expressions]
    assert min(lengths) < 15
    assert max(lengths) > 450


def test_listops_depth_limit_is_reached_and_kept() -> None:
    always = random.Random(0)
    always.random = lambda: 0.0  # type: ignore[method-assign]
    always.randint = lambda low, high: low  # type: ignore[method-assign]
    words = listops.expression(always)
    assert sum(word in listops.OPERATORS for word in words) == 2 ** (listops.MAX_DEPTH - 1) - 1


def test_listops_batches_hold_training_samples_of_like_lengths() -> None:
    budget = replace(TASKS["listops"].budget, train=100, test=20)
    data = tasks.listops_data(budget)
    found = {tuple(tokens): value for tokens, value in listops.samples(120, tasks.DATA_SEED)[:100]}
    tokens, labels = data.sample(8, np.random.default_rng(0))
    lengths = (tokens != listops.PAD).sum(1)
    for row, length, label in zip(tokens, lengths, labels, strict=True):
        assert found[tuple(row[:length].tolist())] == label
        assert (row[length:] == listops.PAD).all()
    assert not any(tuple(row[row != listops.PAD].tolist()) in found for row in data.tokens)
    assert len(data.tokens) == 20


AREAS = {"disc": math.pi, "ring": math.pi * (1 - 0.55**2), "bar": 4 * 0.35, "cross": 8 * 0.35 - 4 * 0.35**2}


@pytest.mark.parametrize("name", shapes.CLASSES[1:])
def test_shapes_have_the_area_of_their_class(name: str) -> None:
    x, y = np.meshgrid(*2 * [np.linspace(-1.2, 1.2, 400)])
    area = shapes.inside(shapes.CLASSES.index(name), x, y).mean() * 2.4**2
    assert area == pytest.approx(AREAS[name], rel=0.02)


def test_shapes_are_brighter_than_the_noise_exactly_where_the_labels_say() -> None:
    images, labels = shapes.samples(200, 3)
    again, _ = shapes.samples(200, 3)
    assert torch.equal(images, again)
    assert images.shape == labels.shape == (200, shapes.SIDE, shapes.SIDE)
    background = images[labels == 0]
    assert abs(background.mean()) < 0.01
    assert background.std().item() == pytest.approx(shapes.NOISE, rel=0.05)
    for kind in range(1, len(shapes.CLASSES)):
        assert images[labels == kind].mean().item() == pytest.approx(1.0, abs=0.1)
    shares = torch.bincount(labels.flatten()) / labels.numel()
    assert 0.5 < shares[0] < 0.8
    assert shares[1:].min() > 0.02


def test_mean_iou_is_that_of_scikit_learn() -> None:
    labels, predicted = torch.randint(5, (2, 400)).unbind()
    expected = jaccard_score(labels.numpy(), predicted.numpy(), average="macro")
    assert shapes.mean_iou(predicted, labels) == pytest.approx(expected)
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])  # classes that occur nowhere count not
    assert shapes.mean_iou(predicted, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_pixels_put_every_token_on_its_own_patch() -> None:
    _, labels = shapes.samples(3, 0)
    side, classes = shapes.SIDE // tasks.PATCH, len(shapes.CLASSES)
    one_hot = nn.functional.one_hot(labels, classes).float()
    blocks = one_hot.view(3, side, tasks.PATCH, side, tasks.PATCH, classes).transpose(2, 3).reshape(3, side**2, -1)
    head = tasks.Pixels()
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(*head.project.weight.shape))
        head.project.bias.zero_()
        logits = head(nn.functional.pad(blocks, (0, tasks.WIDTH - blocks.shape[-1])))
    assert torch.equal(logits.argmax(-1), labels.flatten())


def test_text_windows_have_their_length_and_every_class() -> None:
    data = TASKS["text"].data(TASKS["text"].budget)
    tokens, labels = data.sample(200, np.random.default_rng(0))
    assert tokens.shape == (200, tasks.TEXT_LENGTH)
    assert data.tokens.shape == (tasks.TEXT_TESTS, tasks.TEXT_LENGTH)
    assert labels.unique().numel() == data.labels.unique().numel() == sources.CLASSES


def test_softmax_is_multihead_attention() -> None:
    ours, theirs = Softmax(16, 2), nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, absent = torch.randn(3, 9, 16), torch.arange(9) >= torch.tensor([[9], [5], [1]])
    expected = theirs(x, x, x, key_padding_mask=absent)[0]
    torch.testing.assert_close(ours(x, x, x, key_padding_mask=absent)[0], expected)


def test_elu_weights_are_the_normalised_products_of_features() -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64).unbind()
    weights = torch.einsum("bhld,bhsd->bhls", nn.functional.elu(q) + 1, nn.functional.elu(k) + 1)
    present = torch.arange(7) < 5
    expected = (weights[..., :5] / weights[..., :5].sum(-1, keepdim=True)) @ v[..., :5, :]
    torch.testing.assert_close(Elu(8, 2).mix(q, k, v, present.expand(2, 7)), expected)


def test_alone_mixes_nothing() -> None:
    module, x = Alone(16, 2), torch.randn(2, 5, 16)
    other = x.clone()
    other[:, 2] += 1.0
    same = (module(x, x, x)[0] == module(other, other, other)[0]).all(-1)
    assert same.tolist() == 2 * [[True, True, False, True, True]]


@pytest.mark.parametrize("variant", train.VARIANTS + train.TO_THE_END, ids=lambda variant: variant.name)
def test_variants_differ_in_the_attention_only_and_padding_changes_nothing(variant: train.Variant) -> None:
    task = TASKS["listops"]
    softmax, model = (train.initial(task, one, 5) for one in (train.SOFTMAX, variant))
    own, shared = model.state_dict(), softmax.state_dict()
    assert all(torch.equal(own[name], shared[name]) for name in shared)
    assert all(re.search(r"reference|landmarks|position_scale", name) for name in set(own) - set(shared))
    tokens = torch.randint(1, 16, (2, 20))
    tokens[0, 12:] = listops.PAD
    model.eval()  # for what a step leaves to the next one
    with torch.no_grad():
        both, alone = model(tokens), model(tokens[:1, :12])
    torch.testing.assert_close(both[:1], alone, atol=2e-5, rtol=1e-4)


def test_variants_are_what_their_names_say() -> None:
    by_name = {variant.name: variant for variant in train.VARIANTS}
    assert len(by_name) == len(train.VARIANTS)
    modules = {name: variant.attention(2)(16, 2) for name, variant in by_name.items() if variant.kind == "set"}
    plain, default = SeTAttention(16, 2, num_iters=3), modules["SeT, no positions"]
    assert default.extra_repr().replace("batch_first=True", "batch_first=False") == plain.extra_repr()
    assert default.bandwidth == plain.bandwidth
    changed = {"T = 0": ("num_iters", 0), "T = 1": ("num_iters", 1), "T = 5": ("num_iters", 5)}
    changed |= {"ε = 0.2": ("epsilon", 0.2), "ε = 0.0125": ("epsilon", 0.0125)}
    changed |= {"M = 16": ("num_references", 16), "RKHS values": ("value_map", "rkhs")}
    for name, (field, value) in changed.items():
        assert getattr(modules[f"SeT, {name}"], field) == value
        assert getattr(modules["SeT, T = 3"], field) == getattr(plain, field)
    assert modules["SeT, T = 3"].position_dim == 2


def test_started_iterations_go_on_from_step_to_step() -> None:
    torch.manual_seed(0)
    started, converged = (
        next(one for one in train.TO_THE_END if one.epsilon == 0.0125 and one.transport == name).attention(0)(16, 2)
        for name in ("started", "converged")
    )
    converged.load_state_dict(started.state_dict())
    x = torch.randn(1, 30, 16)
    with torch.no_grad():
        want = converged(x, x, x)[0]
        away = [(started(x, x, x)[0] - want).norm() for _ in range(300)]
    assert away[-1] < 1e-2 * away[0]
    assert torch.equal(started.eval()(x, x, x)[0], started(x, x, x)[0])


def test_sinusoids_tell_all_positions_apart() -> None:
    for position in (tasks.grid(512), tasks.grid(8, 8)):
        waves = sinusoids(position, tasks.WIDTH)
        assert waves.shape == (len(position), tasks.WIDTH)
        assert torch.cdist(waves, waves).fill_diagonal_(9.0).min() > 0.3


@pytest.mark.parametrize("name", ["softmax", "SeT, T = 3"])
def test_training_beats_chance(name: str) -> None:
    task = TASKS["digits"]
    variant = next(one for one in train.VARIANTS if one.name == name)
    assert train.run(task, variant, 0, replace(task.budget, steps=50, batch=32)).score > 0.2  # of ten classes


def quick(folder: Path, *more: str) -> int:
    threads = torch.get_num_threads()
    code = command.main(["--quick", "--threads", "1", "--out", str(folder), "--name", "quick", *more])
    torch.set_num_threads(threads)
    return code


def test_quick_run_writes_a_row_a_run_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quick.csv"
    assert quick(tmp_path, "--task", "digits") == 0
    assert "| softmax |" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = results.read(path)
    with path.open(newline="") as file:
        columns = next(csv.reader(file))
    assert {"task", "variant", "seed", "metric", "num_iters", "steps", *results.MEASURED, *results.SHARED} <= set(
        columns
    )
    assert [row["variant"] for row in first] == ["softmax", "SeT, T = 3", "SeT, RKHS values"]
    assert first[0]["num_references"] == ""
    assert first[1]["num_references"] == "64"
    for row in first:
        assert 0 <= float(row["score"]) <= 1
        assert row["commit"]
        assert row["cpu"]
    old = {name: cell for name, cell in first[0].items() if name != "transport"}  # before there was such a column
    results.write(path, [old, *first[2:]])  # as if the run had been killed
    assert quick(tmp_path, "--task", "digits") == 0
    assert "1/1 digits, SeT, T = 3, seed 0" in capsys.readouterr().out
    again = {row["variant"]: row["score"] for row in results.read(path)}
    assert again == {row["variant"]: row["score"] for row in first}


def test_every_task_runs_quickly() -> None:
    plan = command.plan(True, ["text", "listops", "shapes"])
    for one in plan[-3:]:
        found = train.run(one.task, one.variant, one.seed, one.budget)
        assert 0 <= found.score <= 1
        assert 0 < found.final_loss < 4


def test_a_plan_holds_what_was_asked_for() -> None:
    found = command.plan(False, ["digits"], ["softmax", "SeT, T = 1"], 2)
    assert [(one.variant.name, one.seed) for one in found] == list(itertools.product(["softmax", "SeT, T = 1"], [0, 1]))
    assert [one.variant.name for one in command.plan(False, ["digits"], ["SeT, started"], 1)] == ["SeT, started"]
    assert not {one.variant.transport for one in command.plan(False)} - {"iterations"}
    assert command.main(["--seeds", "0"]) == 1


def test_bad_results_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["table", str(tmp_path / "none.csv")]) == 1
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert command.main(["table", str(tmp_path / "other.csv")]) == 1
    assert "lacks" in capsys.readouterr().err
    assert quick(tmp_path, "--task", "digits") == 0
    rows = results.read(tmp_path / "quick.csv")
    results.write(tmp_path / "quick.csv", [row | {"steps": "5"} for row in rows])
    assert quick(tmp_path, "--task", "digits") == 1
    assert "another steps" in capsys.readouterr().err


def test_table_cells_are_means_with_spread() -> None:
    rows = [
        {"task": "digits", "variant": "v", "seed": str(seed), "score": score}
        for seed, score in ((1, "0.94"), (0, "0.9"), (2, "0.92"))
    ]
    assert table.scores(rows, "digits", "v") == [90.0, 94.0, 92.0]
    assert table.cell([90.0, 94.0, 92.0]) == "92.0 ± 2.0"
    assert table.cell([90.0]) == "90.0"
    assert table.cell([]) == "not measured"


def test_the_page_of_quality_shows_the_tables_of_complete_results() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    names = list(dict.fromkeys(re.findall(r"\(../benchmarks/results/(quality_\S+\.csv)\)", page)))
    tables = [results.read(ROOT / "benchmarks" / "results" / name) for name in names]
    many = ("softmax", "SeT, T = 0", "SeT, T = 1", "SeT, T = 3", "elu linear")
    plans = (
        command.plan(False),
        command.plan(False, only=("SeT, T = 3", "SeT, RKHS values")),
        command.plan(False, only=many, seeds=9),
    )
    for rows, plan in zip(tables, plans, strict=True):
        assert results.missing(plan, rows) == []
        assert [line for line in table.render(rows).splitlines() if line not in page] == []
