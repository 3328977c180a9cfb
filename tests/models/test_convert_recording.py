"""A teacher's answers that were recorded stand for the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_helpers import fails, recipe
from test_convert import OWN, bert, how, stack, texts, vit
from test_recipe_convert import SHORT, words  # noqa: F401
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from setformer_kernels.convert import LayerMatching, OutputMatching, Recording, make_student, record_teacher
from setformer_kernels.convert.students import layers_of
from setformer_kernels.convert.transfer import transfer_attention


def taught(teacher: nn.Module) -> tuple[nn.Module, list[str]]:
    student, report = make_student(teacher, **OWN)
    return student, layers_of(student, report)


def images(count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    return [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(count)]


@pytest.mark.parametrize("kind", ["hidden states", "logits", "images"])
def test_losses_and_gradients_are_those_beside_the_teacher(kind: str, tmp_path: Path) -> None:
    rows = images(70) if kind == "images" else texts(70)
    teacher = (
        vit() if kind == "images" else bert(BertModel if kind == "hidden states" else BertForSequenceClassification)
    )
    student, layers = taught(teacher)
    kept = record_teacher(teacher, rows, stack, tmp_path, layers, hidden=True, progress=lambda _: None)
    numbered, chosen = kept.samples(rows), [66, 3, 12, 64]
    batch = kept.collate(stack)([numbered[i] for i in chosen])
    for matching in (LayerMatching(teacher, student, layers), OutputMatching(teacher, student, hidden=True)):
        found, grads = [], []
        for given in (stack([rows[i] for i in chosen]), batch):
            matching.zero_grad()
            loss = matching(**given)["loss"]
            loss.backward()
            found.append(loss.detach())
            grads.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        torch.testing.assert_close(found[1], found[0])
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_transfer_by_a_recording_never_runs_the_teacher_in_a_step(tmp_path: Path) -> None:
    teacher, rows = bert(), texts(40)
    plain, _ = transfer_attention(teacher, rows, texts(8), stack, tmp_path / "plain", how(6, 4), **OWN)
    record_teacher(teacher, rows, stack, tmp_path / "kept", taught(teacher)[1], hidden=True)
    calls: list[Any] = []
    handle = teacher.register_forward_hook(lambda module, *_: calls.append(module))  # the student's too: it is a copy
    run = (teacher, rows, texts(8), stack, tmp_path / "recorded", how(6, 4))
    model, _ = transfer_attention(*run, recording=tmp_path / "kept", **OWN)
    handle.remove()
    assert sum(module is teacher for module in calls) <= 6  # of measurements on the samples that are held out
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_recording_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    teacher, rows, said = bert(), texts(130), []
    layers = taught(teacher)[1]
    record_teacher(teacher, rows, stack, tmp_path, layers, progress=said.append)
    assert said == [f"teacher: {n} of 130 samples recorded" for n in (64, 128, 130)]
    (tmp_path / "answers-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no complete recording"):
        Recording(tmp_path)
    said.clear()
    record_teacher(teacher, rows, stack, tmp_path, layers, progress=said.append)
    assert said == ["teacher: 128 of 130 samples recorded"]


def test_half_precision_is_half_the_size(tmp_path: Path) -> None:
    teacher, rows = bert(), texts(8)
    student, layers = taught(teacher)
    losses = []
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        kept = record_teacher(teacher, rows, stack, folder, layers, dtype=dtype, progress=lambda _: None)
        batch = kept.collate(stack)(list(kept.samples(rows)))
        losses.append(LayerMatching(teacher, student, layers)(**batch)["loss"].item())
    whole, half = (
        sum(f.stat().st_size for f in (tmp_path / str(d)).glob("answers*")) for d in (torch.float32, torch.float16)
    )
    assert half < 0.7 * whole
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_what_is_another_recording_is_refused(tmp_path: Path) -> None:
    teacher, rows = bert(), texts(8)
    layers = taught(teacher)[1]
    kept = record_teacher(teacher, rows, stack, tmp_path, layers, progress=lambda _: None)
    with pytest.raises(ValueError, match="is of 8 samples, got 7"):
        kept.samples(rows[:7])
    with pytest.raises(ValueError, match="is of other samples"):
        kept.collate(stack)([(1, rows[0])])
    with pytest.raises(ValueError, match="is another recording: it lacks hidden states"):
        kept.check(teacher, 8, layers, True)
    other = bert()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.add_(1)
    with pytest.raises(ValueError, match="is another recording: teacher is"):
        kept.check(other, 8, layers, False)
    with pytest.raises(ValueError, match="holds another recording"):
        record_teacher(other, rows, stack, tmp_path, layers)
    with pytest.raises(ValueError, match="it has no encoder"):
        record_teacher(vit(), images(2), stack, tmp_path / "vit", layers)
    (tmp_path / "recording.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Recording(tmp_path)


def test_the_recipe_records_and_learns_from_what_is_there(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    run = [
        "convert",
        words / "model",
        "--data",
        words / "texts",
        "--length",
        24,
        *SHORT,
        "--recording",
        tmp_path / "kept",
    ]
    recipe(*run, "--output", tmp_path / "a")
    assert "samples recorded" in capsys.readouterr().out
    recipe(*run, "--references", 4, "--output", tmp_path / "b")
    assert "samples recorded" not in capsys.readouterr().out
    assert "it lacks hidden states" in fails(capsys, *run, "--hidden", "--output", tmp_path / "c")


def test_a_stage_reads_what_it_compares_and_no_more(tmp_path: Path) -> None:
    teacher, rows = bert(), texts(4)
    student, layers = taught(teacher)
    kept = record_teacher(teacher, rows, stack, tmp_path, layers, progress=lambda _: None)
    numbered = list(kept.samples(rows))
    of_layers = kept.collate(stack, LayerMatching(teacher, student, layers).reads)(numbered)["recorded"]
    of_output = kept.collate(stack, OutputMatching(teacher, student).reads)(numbered)["recorded"]
    assert set(of_layers) == {f"layer.{name}.0" for name in layers}
    assert set(of_output) == {"output.hidden"}
