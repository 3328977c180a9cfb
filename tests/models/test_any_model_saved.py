"""Converted models of every kind, saved and loaded by their own classes and the Auto classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks.conversion.census import built, fitting
from setformer_kernels.models import replace_attention
from setformer_kernels.models.transformers import from_pretrained
from setformer_kernels.models.transformers.attention import ADDITIVE

AUTO = {
    "Qwen3ForCausalLM": "AutoModelForCausalLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "BartForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "Dinov2ForImageClassification": "AutoModelForImageClassification",
    "Wav2Vec2ForCTC": "AutoModelForCTC",
    "CLIPModel": "AutoModel",
    "DeepseekV3ForCausalLM": "AutoModelForCausalLM",
    "PatchTSTModel": "AutoModel",
}


def first(outputs: Any) -> Tensor:
    return next(x for x in outputs.values() if isinstance(x, Tensor) and x.is_floating_point())


def qwen(tmp_path: Path, **own: Any) -> transformers.PreTrainedModel:
    model = built(transformers.Qwen3ForCausalLM)
    replace_attention(model, num_references=4, **own)
    model.save_pretrained(tmp_path)
    return model


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["setformer"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", AUTO)
@torch.no_grad()
def test_what_was_saved_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    model = built(getattr(transformers, name))
    given, _ = fitting(model)
    softmax = first(model(**given))
    assert replace_attention(model, num_references=4, epsilon=0.1, learn_epsilon=True).replaced
    want = first(model(**given))
    assert not torch.allclose(want, softmax)
    model.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors"}
    for load in (type(model).from_pretrained, getattr(transformers, AUTO[name]).from_pretrained, from_pretrained):
        again = load(str(tmp_path)).eval()
        assert type(again) is type(model)
        torch.testing.assert_close(first(again(**given)), want)


@torch.no_grad()
def test_a_loaded_decoder_generates_what_it_did(tmp_path: Path) -> None:
    model, x = qwen(tmp_path), torch.randint(3, 30, (1, 5))
    told = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(from_pretrained(str(tmp_path)).eval().generate(x, **told), model.generate(x, **told))


def test_masks_of_numbers_stay_numbers(tmp_path: Path) -> None:
    """Of a model that knows no other: the implementation that it has is not in its file, which names the import."""
    model = built(transformers.PatchTSTModel)
    replace_attention(model, num_references=4)
    kinds = {m.config._attn_implementation for m in model.modules() if hasattr(m, "set_transport")}
    model.save_pretrained(tmp_path)
    again = transformers.PatchTSTModel.from_pretrained(tmp_path)
    loaded = {m.config._attn_implementation for m in again.modules() if hasattr(m, "set_transport")}
    assert loaded == kinds
    assert "import setformer_kernels" in json.loads((tmp_path / "config.json").read_text())["attn_implementation"]
    assert ADDITIVE not in (tmp_path / "config.json").read_text()


def test_a_folder_of_another_release_is_refused_with_what_to_do(tmp_path: Path) -> None:
    qwen(tmp_path)
    rewrite(tmp_path, format=2)
    with pytest.raises(ValueError, match=r"format 1 or older, got 2: .* newer release of setformer-kernels, upgrade"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    rewrite(tmp_path, format=1, layers={"layers.0.self_attn": {"num_references": 4, "curvature": 1.0}})
    with pytest.raises(ValueError, match=r"got curvature for layers\.0\.self_attn: upgrade it"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    rewrite(tmp_path, layers=["layers.0.self_attn"])
    with pytest.raises(ValueError, match=r"config\.setformer must be what replace_attention wrote"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_attention_that_transformers_no_longer_lets_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    qwen(tmp_path)
    monkeypatch.setattr(Qwen3Attention, "forward", lambda self, hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match=r"got .*layers\.0\.self_attn: no rule for Qwen3Attention.*release that saved"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
