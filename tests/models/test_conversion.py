"""Models of transformers after `replace_attention`: saved, they load as SeT attention, and as nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import built, tokenizer
from torch import Tensor, nn

from setformer_kernels import SeTAttention
from setformer_kernels.models import replace_attention
from setformer_kernels.models.transformers import from_pretrained

BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
       "image_size": 32, "patch_size": 8}  # fmt: skip


def bert(kind: str = "Model", **changes: Any) -> transformers.PreTrainedModel:
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**{**BERT, **changes})).eval()


def vit() -> transformers.PreTrainedModel:
    return transformers.ViTModel(transformers.ViTConfig(**VIT)).eval()


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 50, (2, 7))}


def timm_wrapper() -> transformers.PreTrainedModel:
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments)
    return transformers.TimmWrapperModel(config)


class Torch(transformers.PreTrainedModel):
    """A model with torch's own attention."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__(config)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.post_init()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


HOSTS = {
    "bert": (bert, ids),
    "classifier": (lambda: bert("ForSequenceClassification"), ids),
    "vit": (vit, image),
    "timm": (timm_wrapper, image),
    "torch": (lambda: Torch(transformers.PretrainedConfig()), lambda: {"x": torch.randn(2, 5, 16)}),
}


@pytest.mark.parametrize("host", HOSTS)
def test_what_was_saved_loads_as_it_was(host: str, tmp_path: Path) -> None:
    build, inputs = HOSTS[host]
    model, x = build().eval(), inputs()
    softmax = model(**x)[0]
    replace_attention(model, num_references=5, epsilon=0.1)
    want = model(**x)[0]
    assert not torch.allclose(softmax, want)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder)
        torch.testing.assert_close(model(**x)[0], want)


@pytest.mark.parametrize("part", ["", "bert", "bert.encoder"])
def test_a_part_that_was_converted_is_saved_with_the_whole(part: str, tmp_path: Path) -> None:
    model, x = bert("ForTokenClassification"), ids()
    replace_attention(model.get_submodule(part), num_references=4, value_map="rkhs")
    model.save_pretrained(tmp_path)
    for load in (transformers.AutoModelForTokenClassification.from_pretrained, from_pretrained):
        torch.testing.assert_close(load(str(tmp_path))(**x)[0], model(**x)[0])
    body = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(body(**x)[0], model.bert(**x)[0])


def test_layers_converted_one_by_one(tmp_path: Path) -> None:
    model, x = bert(), ids()
    replace_attention(model, skip=lambda name, _: "layer.1" in name, num_references=4)
    model.save_pretrained(tmp_path / "half")
    half = transformers.BertModel.from_pretrained(tmp_path / "half")
    torch.testing.assert_close(half(**x)[0], model(**x)[0])
    assert sum("set_transport" in name for name in half.state_dict()) == 1
    replace_attention(half, num_references=6, learn_epsilon=True)
    half.save_pretrained(tmp_path / "whole")
    whole = transformers.BertModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(whole(**x)[0], half(**x)[0])
    assert [a.attention.self.set_transport.num_references for a in whole.encoder.layer] == [4, 6]


def test_a_part_with_a_configuration_of_its_own(tmp_path: Path) -> None:
    decoder = bert("LMHeadModel", is_decoder=True, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(encoder=vit(), decoder=decoder).eval()
    replace_attention(model, num_references=4)
    x = {**image(), "decoder_input_ids": torch.tensor([[1, 2]])}
    model.save_pretrained(tmp_path)
    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**x)[0], model(**x)[0])
    assert "bert.encoder.layer.1.crossattention.self" in again.decoder.config.setformer["layers"]


def test_a_checkpoint_without_references_gets_new_ones(tmp_path: Path) -> None:
    """They are drawn as SeT attention draws them, not left as memory was."""
    model = bert()
    model.save_pretrained(tmp_path)
    replace_attention(model, num_references=4)
    again = transformers.BertModel.from_pretrained(tmp_path, config=model.config)
    references = again.encoder.layer[0].attention.self.set_transport.references
    torch.testing.assert_close(references.norm(dim=-1), torch.ones(4, 4))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_does_not_bring_softmax_back(implementation: str, tmp_path: Path) -> None:
    model, x = bert(), ids()
    replace_attention(model, num_references=4)
    want = model(**x)[0]
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**x)[0], want)
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=implementation)
    torch.testing.assert_close(loaded(**x)[0], want)


@pytest.mark.parametrize("host", ["bert", "vit"])
def test_attention_weights_of_a_converted_model(host: str) -> None:
    build, inputs = HOSTS[host]
    model, x = build().eval(), inputs()
    replace_attention(model, num_references=4)
    if host == "bert":
        x["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    weights = model(**x, output_attentions=True).attentions
    assert len(weights) == 2
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))
        assert host != "bert" or not w[1, ..., 4:].any()


def test_a_copy_is_converted_too() -> None:
    model, x = bert(), ids()
    plain = bert()
    replace_attention(model, num_references=4)
    torch.testing.assert_close(copy.deepcopy(model)(**x)[0], model(**x)[0])
    other = transformers.BertModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**x)[0], model(**x)[0])
    with pytest.raises(
        RuntimeError, match=r"Unexpected key.* \"encoder.layer.0.attention.self.set_transport.references"
    ):
        plain.load_state_dict(model.state_dict())


def test_from_pretrained_of_a_model_that_was_not_converted(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved after replace_attention, got .* architectures=\['BertModel'\]"):
        from_pretrained(str(tmp_path))


def test_trainer_checkpoints(tmp_path: Path) -> None:
    model = bert("ForSequenceClassification")
    replace_attention(model, num_references=4)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, per_device_train_batch_size=2,
    )  # fmt: skip
    data = [{"input_ids": torch.randint(1, 50, (7,)), "labels": torch.tensor(i % 2)} for i in range(4)]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    x = ids()
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(again(**x)[0], model.eval()(**x)[0])
    resumed = transformers.Trainer(again, arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(again.eval()(**x)[0], model(**x)[0])


FRESH = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModel, AutoModelForImageClassification, BertModel, logging, pipeline
logging.set_verbosity_error()
answers = {}
for name, load in {
    "plain": lambda: BertModel.from_pretrained("converted"),
    "auto": lambda: AutoModel.from_pretrained("converted"),
    "own": lambda: AutoModel.from_pretrained("own"),
}.items():
    try:
        answers[name] = type(load()).__name__
    except ValueError as error:
        answers[name] = str(error)
try:
    torch.export.load("attention.pt2")
except RuntimeError:
    answers["exported"] = "refused"
answers["before"] = "setformer_kernels" in sys.modules
answers["trusted"] = type(AutoModelForImageClassification.from_pretrained("own", trust_remote_code=True)).__module__
answers["pipeline"] = pipeline("text-classification", model="text", trust_remote_code=True, device="cpu")("hello")
BertModel.from_pretrained("converted")  # now that the package is there
answers["exported"] += ", then " + type(torch.export.load("attention.pt2")).__name__
print()  # the question whether to trust ends without a newline
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_process_that_has_not_imported_the_package(tmp_path: Path) -> None:
    """What it says is what to do: which module to import, or to trust the module that was saved."""
    model = bert()
    replace_attention(model, num_references=4)
    model.save_pretrained(tmp_path / "converted")
    built("ForImageClassification").save_pretrained(tmp_path / "own")
    built("ForSequenceClassification").save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    x = torch.randn(1, 5, 8)
    attention = SeTAttention(8, 2, num_references=3, batch_first=True).eval()
    torch.export.save(torch.export.export(attention, (x, x, x)), tmp_path / "attention.pt2")
    run = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    for name in ("plain", "auto"):
        assert "import setformer_kernels.models.transformers first" in answers[name]
    assert "trust_remote_code=True" in answers["own"]
    assert not answers["before"]
    assert answers["pipeline"][0]["label"].startswith("LABEL_")
    assert answers["exported"] == "refused, then ExportedProgram"
    assert "failed to resolve torch.ops.setformer_kernels.set_attention" in run.stderr
    assert answers["trusted"] == "setformer_kernels.models.transformers.vision"


def test_the_module_that_is_saved_beside_a_configuration(tmp_path: Path) -> None:
    """It imports the package, and is saved again by what was loaded through it."""
    from setformer_kernels.models.transformers import SeTformerTextConfig

    config = SeTformerTextConfig(**BERT)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForMaskedLM"] == "modeling_setformer.SeTformerForMaskedLM"
    text = (tmp_path / "modeling_setformer.py").read_text()
    names = {name.split(".")[1] for name in saved["auto_map"].values()}
    assert all(name in text for name in names)
    again = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is SeTformerTextConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "modeling_setformer.py"]
