"""Attention transfer: what layers and heads answer, the two losses, hybrids, and a whole run that resumes."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from setformer_kernels import SeTAttention
from setformer_kernels.convert import (
    LayerMatching,
    OutputMatching,
    Schedule,
    Transfer,
    attention_errors,
    conversion_curve,
    hybrid_of,
    make_student,
    output_agreement,
    place_references,
    transfer_attention,
)
from setformer_kernels.convert.adapters import adapted
from setformer_kernels.convert.fitting import fit
from setformer_kernels.convert.hybrid import Converted, within
from setformer_kernels.convert.layers import recorded, taught
from setformer_kernels.convert.students import layers_of, learning, new_parameters, query_key_parameters
from setformer_kernels.models.transformers import from_pretrained
from setformer_kernels.models.transport import SetTransport

WIDTH, HEADS, WORDS = 32, 4, 40
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
                         "intermediate_size": 48}  # fmt: skip
OWN: dict[str, Any] = {"num_references": 6, "learn_epsilon": True}


def bert(kind: type = BertModel, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "value.weight", "attention.output.dense.weight")):
                parameter.mul_(10)  # attention that is far from uniform, and felt
    return model


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def texts(count: int, length: int = 9) -> list[dict[str, Tensor]]:
    """Rows of different lengths."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(1, WORDS, (length,), generator=draw)
        mask = (torch.arange(length) < length - i % 4).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask})
    return rows


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def inputs_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    if kind == "bert":
        return stack(texts(3))
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16)}
    if kind == "timm":
        return {"x": torch.randn(3, 3, 32, 32)}
    padding = torch.arange(9) >= torch.tensor([[9], [6], [4]])
    return {"src": torch.randn(3, 9, WIDTH), "src_key_padding_mask": padding}


def timm_vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes).eval()


BUILT = {"bert": bert, "vit": vit, "encoder": encoder, "timm": timm_vit}


@pytest.mark.parametrize("kind", BUILT)
def test_a_taught_student_is_the_teacher(kind: str) -> None:
    """Every layer gets the teacher's inputs, so what comes out is what the teacher returns."""
    teacher, batch = BUILT[kind](), inputs_of(kind)
    student, report = make_student(teacher, **OWN)
    layers = layers_of(student, report)
    assert len(layers) == 2
    with torch.no_grad():
        with recorded(teacher, layers) as (said, _):
            wanted = teacher(**batch)
        with taught(student.eval(), layers, said) as (own, _):
            got = student(**batch)
        plain = student(**batch)
    wanted, got, plain = (x if isinstance(x, Tensor) else x.last_hidden_state for x in (wanted, got, plain))
    alive: Any = slice(None)
    if kind == "bert":
        alive = batch["attention_mask"].bool()
    elif kind == "encoder":
        alive = ~batch["src_key_padding_mask"]
    torch.testing.assert_close(got[alive], wanted[alive])
    assert not torch.allclose(plain[alive], wanted[alive], rtol=0.01)
    assert all(not torch.equal(own[name][0], said[name][0]) for name in layers)


@pytest.mark.parametrize("kind", BUILT)
def test_heads_mixed_by_the_output_projection_are_the_layers_answer(kind: str) -> None:
    model, batch = BUILT[kind](), inputs_of(kind)
    projections = {"bert": None, "vit": "o_proj", "encoder": "out_proj", "timm": "proj"}
    student, report = make_student(model, **OWN)
    for each in (model, student.eval()):
        layers = layers_of(student, report)
        with torch.no_grad(), recorded(each, layers, heads=True) as (own, heads):
            each(**batch)
        for name in layers:
            out = projections[kind]
            mixed = heads[name][0]
            if out is not None:
                linear = each.get_submodule(f"{name}.{out}")
                mixed = nn.functional.linear(mixed, linear.weight, linear.bias)
            torch.testing.assert_close(mixed, own[name][0])


def test_errors_of_heads_are_their_definition() -> None:
    teacher, batches = bert(), [stack(texts(4)), stack(texts(6))]
    student, report = make_student(teacher, **OWN)
    layers = layers_of(student, report)
    found = attention_errors(teacher, student.eval(), layers, batches)
    assert [(e.layer, e.head) for e in found] == [(name, h) for name in layers for h in range(HEADS)]
    wrong, of = torch.zeros(HEADS), torch.zeros(HEADS)
    for batch in batches:  # the first layer, whose inputs are the embeddings
        x = teacher.embeddings(batch["input_ids"])
        mask = batch["attention_mask"].bool()
        wanted = teacher.encoder.layer[0].attention.self(x, mask[:, None, None])[0]
        got = student.encoder.layer[0].attention.self(x, batch["attention_mask"])[0]
        a, b = (each[mask].unflatten(-1, (HEADS, -1)) for each in (wanted, got))
        wrong, of = wrong + (a - b).square().sum((0, 2)), of + a.square().sum((0, 2))
    torch.testing.assert_close(torch.tensor([e.error for e in found[:HEADS]]), (wrong / of).sqrt().detach())
    assert all(e.error < 1e-6 for e in attention_errors(teacher, hybrid_of(teacher, student, []), [], batches))


def test_layers_learn_from_their_own_error_alone() -> None:
    teacher, batch = bert(), stack(texts(8))
    student, report = make_student(teacher, **OWN)
    layers = layers_of(student, report)
    names = new_parameters(teacher, student)
    assert len(names) == 4  # references and log_epsilon of two layers
    matching = LayerMatching(teacher, student, layers)
    alone = LayerMatching(teacher, student, layers[:1])
    assert not matching.train().student.training
    with learning(student, names):
        matching(**batch)["loss"].backward()
        first = {name: student.get_parameter(name).grad.clone() for name in names if name.startswith(layers[0])}
        assert all(student.get_parameter(name).grad.any() for name in names)
        assert all(p.grad is None for name, p in student.named_parameters() if name not in names)
        student.zero_grad()
        alone(**batch)["loss"].backward()
        for name, gradient in first.items():
            torch.testing.assert_close(student.get_parameter(name).grad, 2 * gradient)  # a mean over two layers
    assert all(p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert set(matching.state_dict()) == {f"student.{name}" for name, _ in student.named_parameters()}


def test_values_of_fused_projections_do_not_learn_with_queries_and_keys() -> None:
    teacher, batch = encoder(), inputs_of("encoder")
    student, report = make_student(teacher, **OWN)
    layers = layers_of(student, report)
    names = query_key_parameters(student, layers)
    assert names == [f"{layer}.{name}" for layer in layers for name in ("in_proj_weight", "in_proj_bias")]
    with learning(student, names, values=False):
        LayerMatching(teacher, student, layers)(**batch)["loss"].backward()
    gradient = student.get_parameter(names[0]).grad
    assert gradient[: 2 * WIDTH].any()
    assert not gradient[2 * WIDTH :].any()
    assert query_key_parameters(*_student("bert"))[0].endswith("self.query.weight")
    assert query_key_parameters(*_student("vit"))[0].endswith("q_proj.weight")


def test_values_of_projections_in_gpt2s_layout_do_not_learn() -> None:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.c_attn, model.attn.set_transport = Conv1D(3 * WIDTH, WIDTH), SeTAttention(WIDTH, HEADS)
    names = query_key_parameters(model, ["attn"])
    assert {"attn.c_attn.weight", "attn.c_attn.bias"} < set(names)
    with learning(model, names, values=False):
        model.attn.c_attn(torch.ones(2, WIDTH)).sum().backward()
    gradient = model.attn.c_attn.weight.grad
    assert gradient[:, : 2 * WIDTH].all()
    assert not gradient[:, 2 * WIDTH :].any()
    model.attn.c_attn = Conv1D(2 * WIDTH, WIDTH)  # fewer heads of keys and values
    model.attn.set_transport = SetTransport(HEADS, WIDTH // HEADS, torch.empty(0), {})
    with pytest.raises(ValueError, match="the query and key projections of attn have no known names"):
        query_key_parameters(model, ["attn"])


def _student(kind: str) -> tuple[nn.Module, list[str]]:
    student, report = make_student(BUILT[kind](), **OWN)
    return student, layers_of(student, report)


@pytest.mark.parametrize("hidden", [False, True])
def test_whole_models_are_matched(hidden: bool) -> None:
    batch = stack(texts(4))
    for kind in (BertModel, BertForSequenceClassification):
        teacher = bert(kind)
        same = OutputMatching(teacher, bert(kind), hidden=hidden)
        assert same(**batch)["loss"].item() == pytest.approx(0, abs=1e-6)
        student, _ = make_student(teacher, **OWN)
        matching = OutputMatching(teacher, student, "first", hidden)
        before = matching(**batch)["loss"].item()
        optimizer = torch.optim.Adam(student.parameters(), 1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            matching(**batch)["loss"].backward()
            optimizer.step()
        assert matching(**batch)["loss"].item() < 0.5 * before


def test_what_padding_holds_changes_no_loss() -> None:
    teacher, rows = bert(), texts(8)
    student, report = make_student(teacher, **OWN)
    losses = LayerMatching(teacher, student, layers_of(student, report)), OutputMatching(teacher, student, hidden=True)
    batch = stack(rows)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    for loss in losses:
        torch.testing.assert_close(loss(**other)["loss"], loss(**batch)["loss"])


def test_agreement_of_a_model_with_itself_and_with_another() -> None:
    teacher, batches = bert(), [stack(texts(16))]
    same = output_agreement(teacher, teacher, batches)
    assert same == pytest.approx({"error": 0, "cosine": 1, "correlation": 1, "nearest": 1}, abs=1e-6)
    student, _ = make_student(teacher, **OWN)
    other = output_agreement(teacher, student.eval(), batches)
    assert 0.05 < other["error"] < 2
    assert other["cosine"] < 1 > other["correlation"]
    assert "top1" in output_agreement(bert(BertForSequenceClassification), bert(BertForSequenceClassification), batches)


def test_layers_are_converted_in_the_order_of_their_cost() -> None:
    teacher, batches = bert(num_hidden_layers=3), [stack(texts(16))]
    student, report = make_student(teacher, **OWN)
    layers = layers_of(student, report)
    curve = conversion_curve(teacher, student, layers, batches, **OWN)
    assert [step.alone for step in curve] == sorted(step.alone for step in curve)
    whole = output_agreement(teacher, student.eval(), batches)["error"]
    assert curve[-1].error == pytest.approx(whole, rel=1e-5)
    chosen = within(curve, curve[1].error)
    assert set(chosen) == {step.layer for step in curve[:2]} or curve[2].error <= curve[1].error
    assert within([Converted("a", 0.1, 0.1), Converted("b", 0.2, 0.3), Converted("c", 0.3, 0.2)], 0.25) == ["a"]
    mixed = hybrid_of(teacher, student, chosen[:1], **OWN)
    got = {e[:2]: e.error for e in attention_errors(teacher, mixed, chosen[:1], batches)}
    want = {e[:2]: e.error for e in attention_errors(teacher, student, layers, batches)}
    assert got == pytest.approx({(chosen[0], head): want[chosen[0], head] for head in range(HEADS)})
    assert output_agreement(teacher, hybrid_of(teacher, student, [], **OWN), batches)["error"] < 1e-6


def how(match: int, tune: int, **changes: Any) -> Transfer:
    schedule = {"batch_size": 8, "cpu": True}
    return Transfer(Schedule(match, 2e-2, **schedule), Schedule(tune, 1e-3, **schedule, save_every=4), **changes)


def test_a_transfer_lowers_every_error_and_its_result_is_saved(tmp_path: Path) -> None:
    teacher, said = bert(), []
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    options = how(30, 20, curve=True, max_error=10.0)
    model, report = transfer_attention(
        teacher, texts(40), texts(24), stack, tmp_path, options, progress=said.append, **OWN
    )
    mean = {m: sum(e.error for e in errors) / len(errors) for m, errors in report.layers.items()}
    assert list(mean) == ["placed", "matched"]
    assert mean["matched"] < 0.8 * mean["placed"]
    assert report.outputs["matched"]["error"] < report.outputs["placed"]["error"]
    assert report.outputs["tuned"]["error"] < report.outputs["hybrid"]["error"]
    assert report.converted == [step.layer for step in report.curve]
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert said[0].startswith("placed: error ")
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert [(row["moment"], row["layer"]) for row in rows] == [
        (m, e.layer) for m, all in report.layers.items() for e in all
    ]
    assert "| layers | the last one |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    model.save_pretrained(tmp_path / "model")
    again = from_pretrained(str(tmp_path / "model")).eval()
    assert output_agreement(model, again, [stack(texts(8))])["error"] < 1e-6


def test_a_run_that_was_cut_resumes_to_the_same_weights(tmp_path: Path) -> None:
    run = (bert(), texts(20), texts(8), stack)
    whole, _ = transfer_attention(*run, tmp_path / "whole", how(8, 8), **OWN)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "tune" / "checkpoint-8")
    (tmp_path / "cut" / "tune" / "checkpoint-6").mkdir()  # as if killed while writing it
    again, _ = transfer_attention(*run, tmp_path / "cut", how(8, 8), resume=True, **OWN)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert (tmp_path / "cut" / "match" / "checkpoint-8").is_dir()
    assert not (tmp_path / "cut" / "match" / "checkpoint-9").exists()  # of a stage that was at its end
    with pytest.raises(ValueError, match="holds the checkpoints of a run: resume it"):
        transfer_attention(*run, tmp_path / "cut", how(8, 8), **OWN)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_the_second_stage_steps_by_a_share_of_each_weights_size(factor: float, tmp_path: Path) -> None:
    """Of two steps on one batch the first has a learning rate of 0, the second moves every number by all of it."""
    teacher = bert()
    with torch.no_grad():
        for layer in teacher.encoder.layer:
            layer.attention.self.value.weight *= factor
    run = (teacher, texts(8), texts(8), stack)
    start, report = transfer_attention(*run, tmp_path / "start", how(0, 0), **OWN)
    one = replace(how(0, 2), tune=Schedule(2, 1e-2, batch_size=8, cpu=True))
    model, _ = transfer_attention(*run, tmp_path / "run", one, **OWN)
    old = start.get_submodule(report.converted[0]).value.weight
    step = (model.get_submodule(report.converted[0]).value.weight - old).abs().median() / old.square().mean().sqrt()
    assert float(step.detach()) == pytest.approx(1e-2, rel=0.05)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_second_stage_that_makes_it_worse_is_undone(rank: int, tmp_path: Path) -> None:
    if rank:
        pytest.importorskip("peft")
    run, said = (bert(), texts(20), texts(8), stack), []
    wild = replace(how(4, 6, lora_rank=rank), tune=Schedule(6, 3.0, batch_size=8, cpu=True))
    model, report = transfer_attention(*run, tmp_path / "wild", wild, progress=said.append, **OWN)
    matched, _ = transfer_attention(*run, tmp_path / "matched", how(4, 0), **OWN)
    assert not report.outputs["tuned"]["error"] <= report.outputs["matched"]["error"]
    assert report.returned == "matched"
    assert "undone" in said[-1]
    assert "the model is that of 'matched'" in (tmp_path / "wild" / "report.md").read_text()
    torch.testing.assert_close(model.state_dict(), matched.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("tune_all", [False, True])
def test_adapters_are_merged(tune_all: bool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher = bert()
    model, report = transfer_attention(
        teacher, texts(20), texts(16), stack, tmp_path, how(4, 12, lora_rank=4, tune_all=tune_all), **OWN
    )  # fmt: skip
    assert report.outputs["tuned"]["error"] < report.outputs["matched"]["error"]
    student, _ = make_student(teacher, **OWN)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in student.named_parameters()}
    for name, rank in ("attention.self.value", 4), ("output.dense", 4 * tune_all):
        new, old = (m.encoder.layer[0].get_submodule(name).weight for m in (model, teacher))
        assert torch.linalg.matrix_rank((new - old).detach(), rtol=1e-3) == rank


@pytest.mark.parametrize("tune_all", [False, True])
def test_the_second_stage_changes_the_converted_layers_alone(tune_all: bool, tmp_path: Path) -> None:
    """Sensitive weights elsewhere, as a vision transformer's embedding of patches, are what makes it diverge."""
    teacher, run = bert(), (texts(20), texts(8), stack)
    one = {"skip": lambda name, _: "layer.1" in name, **OWN}
    start, _ = transfer_attention(teacher, *run, tmp_path / "start", how(0, 0), **one)
    model, report = transfer_attention(teacher, *run, tmp_path / "run", how(0, 4, tune_all=tune_all), **one)
    (layer,) = report.converted
    old = dict(start.named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    inside = {name for name in old if name.startswith(f"{layer}.") and not name.endswith("key.bias")}
    assert inside <= changed
    assert (changed - inside <= {f"{layer}.key.bias"}) != tune_all


def test_a_missing_peft_is_told_before_anything_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    run = (bert(), texts(20), texts(8), stack)
    with pytest.raises(ModuleNotFoundError, match=r"adapters need peft: pip install peft, or train the weights"):
        transfer_attention(*run, tmp_path / "run", how(2, 2, lora_rank=2), **OWN)
    assert not (tmp_path / "run").exists()
    transfer_attention(*run, tmp_path / "first", how(1, 0, lora_rank=2), **OWN)


def test_adapters_without_a_place_are_refused_before_anything_learns(tmp_path: Path) -> None:
    """The projections of nn.MultiheadAttention are plain weights."""
    pytest.importorskip("peft")
    teacher = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    rows = [torch.randn(12, 16) for _ in range(8)]
    run = (teacher, rows, rows, lambda rows: {"src": torch.stack(rows)})
    with pytest.raises(ValueError, match=r"lora_rank must be 0, or tune_all: the converted layers have no nn.Linear"):
        transfer_attention(*run, tmp_path / "layers", how(2, 2, lora_rank=2), **OWN)
    assert not (tmp_path / "layers").exists()
    with pytest.raises(ValueError, match=r"lora_rank must be 0: the model has no nn.Linear"):
        adapted(nn.ReLU())
    transfer_attention(*run, tmp_path / "all", how(2, 2, lora_rank=2, tune_all=True), **OWN)


def test_what_bad_input_gets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher must have softmax attention that can be replaced"):
        make_student(nn.Sequential(nn.Linear(3, 3)))
    teacher = bert()
    student, report = make_student(teacher, **OWN)
    with pytest.raises(ValueError, match="all 1 samples together have fewer in encoder"):
        place_references(student, texts(4)[3:], lambda rows: stack(rows) | {"attention_mask": torch.eye(1, 9).long()})
    with pytest.raises(ValueError, match="teacher must have the student's architecture, it has no encoder"):
        LayerMatching(vit(), student, layers_of(student, report))
    small = bert(hidden_size=16)
    with pytest.raises(ValueError, match="teacher must have the student's shapes: encoder"):
        LayerMatching(small, student, layers_of(student, report))(**stack(texts(2)))
    with pytest.raises(ValueError, match="pooling must be one of mean, first, got 'max'"):
        OutputMatching(teacher, student, pooling="max")
    with pytest.raises(ValueError, match="held_out must hold at least one sample"):
        transfer_attention(teacher, texts(4), [], stack, tmp_path, how(1, 1))
    with pytest.raises(ValueError, match="learning_rate must be > 0, got 0"):
        Schedule(1, 0.0)
    with pytest.raises(ValueError, match="max_error must be ≥ 0, got nan"):
        Transfer(max_error=float("nan"))
    matching = OutputMatching(teacher, student)
    fit(matching, new_parameters(teacher, student), texts(8), stack, tmp_path / "a", Schedule(1, 1e-3, 4, cpu=True))
    with pytest.raises(ValueError, match="the checkpoint must hold what learns here"):
        fit(matching, ["pooler.dense.bias"], texts(8), stack, tmp_path / "a", Schedule(2, 1e-3, 4, cpu=True), True)
