"""SeTformer behind transformers' Auto classes, files and Trainer; BERT and ViT with their attention replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoBackbone, AutoConfig, AutoModel

from setformer_kernels.models import initialize_references, replace_attention
from setformer_kernels.models.transformers import SeTformerBackbone, SeTformerConfig, SeTformerTextConfig

TEXT_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "")
TINY_BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


def auto(task: str) -> type:
    return getattr(transformers, f"AutoModel{task}")


def vision(**changes: object) -> SeTformerConfig:
    sizes = {"widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_references": 4}
    return SeTformerConfig(**{**sizes, "num_labels": 3, "drop_path_rate": 0.0, **changes})


def text(**changes: object) -> SeTformerTextConfig:
    return SeTformerTextConfig(**{**TINY_BERT, "num_references": 4, "num_labels": 3, **changes})


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": mask}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


def test_image_classifier_round_trip(tmp_path: Path) -> None:
    model = auto("ForImageClassification").from_config(vision(pool="set", attention={"num_iters": 1})).eval()
    x = torch.randn(2, 3, 48, 64)
    output = model(x, labels=torch.tensor([0, 2]), output_hidden_states=True)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])))
    folder = saved(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "setformer"
    again = auto("ForImageClassification").from_pretrained(folder)
    torch.testing.assert_close(again(x).logits, output.logits)
    body = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(body(x).last_hidden_state, output.hidden_states[-1])
    # AutoBackbone.from_pretrained of this release asks the hub even for a folder; the class itself does not.
    maps = SeTformerBackbone.from_pretrained(folder, out_features=["stage1", "stage3"])(x).feature_maps
    torch.testing.assert_close(maps[1], output.hidden_states[3])  # the first are the patches
    assert len(maps) == 2


def test_fresh_weights_are_those_of_the_backbone() -> None:
    """transformers draws weights anew after the constructor: what SeT starts from must survive that."""
    model = AutoModel.from_config(vision())
    block = model.backbone.stages[0].blocks[0]
    assert (block.gamma1 == 0.1).all()
    assert (block.attention.position_scale == 4).all()
    torch.testing.assert_close(block.attention.references.norm(dim=-1), torch.ones(2, 4))
    assert ((block.attention.reference_position >= 0) & (block.attention.reference_position <= 1)).all()


def test_a_new_head_leaves_the_loaded_weights_alone(tmp_path: Path) -> None:
    model = auto("ForImageClassification").from_config(vision(pool="set"))
    folder = saved(model, tmp_path)
    other = auto("ForImageClassification").from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert other.head.fc.out_features == 7
    for name, parameter in model.named_parameters():
        if not name.startswith("head.fc"):
            torch.testing.assert_close(other.get_parameter(name), parameter)


def test_a_missing_reference_set_is_drawn_and_the_rest_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = AutoModel.from_config(vision())
    path = saved(model, tmp_path) / "model.safetensors"
    missing = "backbone.stages.0.blocks.0.attention.references"
    save_file({k: v for k, v in load_file(path).items() if k != missing}, path, {"format": "pt"})
    other = AutoModel.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        same = torch.equal(other.get_parameter(name), parameter)
        assert same == (name != missing), name
    torch.testing.assert_close(other.get_parameter(missing).norm(dim=-1), torch.ones(2, 4))


def test_backbone_in_upernet() -> None:
    backbone = vision(out_features=["stage1", "stage2", "stage3", "stage4"])
    assert AutoBackbone.from_config(backbone).channels == [8, 8, 16, 16]
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=6, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    x = torch.randn(2, 3, 64, 96)
    output = model(x, labels=torch.randint(6, (2, 64, 96)))
    assert output.logits.shape == (2, 6, 64, 96)
    output.loss.backward()
    assert model.backbone.setformer.backbone.stages[3].blocks[0].attention.references.grad.any()
    first = AutoBackbone.from_config(vision(out_features=["stage2"]))
    assert len(first.setformer.backbone.stages) == 2


def test_named_sizes() -> None:
    config = SeTformerConfig.from_size("setformer_nano", num_labels=4)
    assert (config.widths[-1], config.num_labels) == (256, 4)
    with pytest.raises(ValueError, match=r"name must be one of setformer_nano, .* got 'huge'"):
        SeTformerConfig.from_size("huge")


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_text_round_trip(task: str, tmp_path: Path) -> None:
    model, x = auto(task).from_config(text()).eval(), tokens()
    again = auto(task).from_pretrained(saved(model, tmp_path))
    torch.testing.assert_close(again(**x)[0], model(**x)[0])
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SeTformerTextConfig)


@pytest.mark.parametrize("task", TEXT_TASKS[:3])
def test_text_losses_and_gradients(task: str) -> None:
    model, x = auto(task).from_config(text()), tokens()
    labels = (
        torch.tensor([0, 2]) if "Sequence" in task else torch.randint(3, (2, 9)).masked_fill(x["input_ids"] < 25, -100)
    )
    output = model(**x, labels=labels)
    want = torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(output.loss, want)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model.train()
    model(**x, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_masked_words_are_tied_and_the_vocabulary_can_grow(tmp_path: Path) -> None:
    model = auto("ForMaskedLM").from_config(text())
    assert model.head.decoder.weight is model.setformer.encoder.embeddings.word.weight
    model.resize_token_embeddings(60)
    assert model(**tokens()).logits.shape == (2, 9, 60)
    again = auto("ForMaskedLM").from_pretrained(saved(model, tmp_path))
    assert again.head.decoder.weight is again.setformer.encoder.embeddings.word.weight


def test_regression() -> None:
    model = auto("ForSequenceClassification").from_config(text(num_labels=1))
    output = model(**tokens(), labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(output.loss, ((output.logits.squeeze(1) - torch.tensor([0.5, 2.0])) ** 2).mean())


class Stripes(torch.utils.data.Dataset):
    """Images of horizontal (0) or vertical (1) stripes in noise."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        wave = torch.sin(torch.arange(32) * 1.5).expand(3, 32, 32)
        noise = 0.3 * torch.randn(3, 32, 32, generator=generator)
        return {"pixel_values": (wave if index % 2 else wave.mT) + noise, "labels": torch.tensor(index % 2)}


def test_trainer_learns_saves_and_resumes(tmp_path: Path) -> None:
    def trainer(steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-3, save_steps=10,
            report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=50, seed=0, save_total_limit=2,
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        transformers.set_seed(0)
        return transformers.Trainer(
            auto("ForImageClassification").from_config(vision(num_labels=2)), arguments, train_dataset=Stripes(),
            eval_dataset=Stripes(),
            compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        )  # fmt: skip

    whole = trainer(20)
    whole.train()
    assert whole.evaluate()["eval_accuracy"] > 0.9
    resumed = trainer(20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_with_its_attention_replaced(implementation: str) -> None:
    config = transformers.BertConfig(**TINY_BERT, num_labels=3, attn_implementation=implementation)
    model = transformers.BertForSequenceClassification(config)
    before = dict(model.named_parameters())
    report = replace_attention(model, num_references=4)
    names = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert report.replaced == dict.fromkeys(names, "BertSelfAttention")
    assert not report.left
    assert str(replace_attention(model)).startswith("nothing replaced")
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    x = tokens()
    model.eval()
    initialize_references(model, **x)
    logits = model(**x).logits
    garbage = torch.where(x["attention_mask"].bool(), x["input_ids"], 7)
    torch.testing.assert_close(model(garbage, x["attention_mask"]).logits, logits)
    torch.testing.assert_close(model(x["input_ids"][1:, :5]).logits, logits[1:])
    rows = x["attention_mask"].bool()[:, None, None].expand(2, 1, 9, 9)
    torch.testing.assert_close(model(x["input_ids"], rows).logits, logits, rtol=1e-4, atol=1e-5)
    model(**x).logits.sum().backward()
    assert after[f"{names[1]}.set_transport.references"].grad.any()


def test_half_replaced_bert_keeps_softmax_where_it_was() -> None:
    model = transformers.BertModel(transformers.BertConfig(**TINY_BERT)).eval()
    x = tokens()
    want = model(**x, output_hidden_states=True).hidden_states
    report = replace_attention(model, skip=lambda name, _: "layer.0" in name, num_references=4)
    assert report.left == {"encoder.layer.0.attention.self": "skipped by the caller"}
    got = model(**x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[1], want[1])
    assert not torch.allclose(got[2], want[2])


def test_vit_with_its_attention_replaced(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    report = replace_attention(model, num_references=5, value_map="rkhs")
    assert list(report.replaced.values()) == ["ViTAttention"] * 2
    assert not report.left
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    attention = model.get_submodule(next(iter(report.replaced)))
    assert attention.set_transport.landmarks.grad.any()
    assert attention.q_proj.weight.grad.any()
    state = torch.load(_save(model, tmp_path / "w.pt"))
    fresh = transformers.ViTForImageClassification(config)
    replace_attention(fresh, num_references=5, value_map="rkhs")
    fresh.load_state_dict(state)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fresh.eval()(x).logits, model.eval()(x).logits)


def _save(model: torch.nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path
