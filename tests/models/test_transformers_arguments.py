"""What transformers' own common suites ask of a model: every argument of BERT and Swin has an effect or is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import CAUSAL, TEXT, VISION, built, inputs
from transformers.modeling_layers import GradientCheckpointingLayer

from setformer_kernels.models.transformers import (
    SeTformerCausalConfig,
    SeTformerConfig,
    SeTformerModel,
    SeTformerTextConfig,
)

LABELLED = (*TEXT[1:], "ForImageClassification", "ForCausalLM")


@pytest.mark.parametrize("kind", [*TEXT, *CAUSAL, *VISION])
def test_hidden_states_by_argument_and_by_configuration(kind: str) -> None:
    x = inputs(kind)
    asked = built(kind)(**x, output_hidden_states=True).hidden_states
    by_config = built(kind, output_hidden_states=True)
    for a, b in zip(asked, by_config(**x).hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    assert by_config(**x, output_hidden_states=False).hidden_states is None
    assert by_config(**x, output_hidden_states=None).hidden_states is not None
    assert built(kind)(**x).hidden_states is None
    shapes = [tuple(state.shape[1:]) for state in asked]
    maps = [(8, 8, 16), (8, 8, 16), (8, 4, 8), (16, 2, 4), (16, 1, 2)]
    assert shapes == ([(7, 16)] * 3 if kind in (*TEXT, *CAUSAL) else maps)


def test_hidden_states_of_chosen_places() -> None:
    x, model = inputs("TextModel"), built("TextModel")
    states = model(**x, output_hidden_states=True).hidden_states
    for asked, kept in (([0, -1], {0, 2}), (1, {1}), ([7], set())):
        chosen = model(**x, output_hidden_states=asked).hidden_states
        assert {i for i, state in enumerate(chosen) if state is not None} == kept
        assert all(torch.equal(chosen[i], states[i]) for i in kept)
    assert model(**x, output_hidden_states=0).hidden_states is None


def test_the_first_hidden_state_of_a_text_is_its_embedding_and_the_last_the_output() -> None:
    model, x = built("TextModel"), inputs("TextModel")
    output = model(**x, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[0], model.encoder.embeddings(x["input_ids"], None, None, None))
    assert output.hidden_states[-1] is output.last_hidden_state


@pytest.mark.parametrize("kind", ["TextModel", "CausalModel", "Model"])
def test_hidden_states_are_on_the_path(kind: str) -> None:
    output = built(kind)(**inputs(kind), output_hidden_states=True)
    for state in output.hidden_states[:-1]:
        state.retain_grad()
    output.last_hidden_state.square().sum().backward()
    assert all(state.grad.any() for state in output.hidden_states[:-1])


@pytest.mark.parametrize("kind", TEXT)
def test_attention_weights_of_texts(kind: str) -> None:
    x = inputs(kind)
    weights = built(kind)(**x, output_attentions=True).attentions
    for w, again in zip(weights, built(kind, output_attentions=True)(**x).attentions, strict=True):
        assert w.shape == (2, 2, 7, 7)
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 7))
        assert not w[1, ..., 4:].any()
        torch.testing.assert_close(w, again)
    assert len(weights) == 2
    assert built(kind)(**x).attentions is None


@pytest.mark.parametrize("kind", VISION)
def test_attention_weights_of_images_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="output_attentions must be False"):
        built(kind)(**inputs(kind), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        built(kind, output_attentions=True)(**inputs(kind))
    assert built(kind)(**inputs(kind), output_attentions=False) is not None


@pytest.mark.parametrize("kind", [*TEXT, *CAUSAL, *VISION])
def test_tuples_hold_what_the_dictionary_holds(kind: str) -> None:
    x, options = inputs(kind), {"output_hidden_states": True}
    if kind in CAUSAL:
        options["use_cache"] = False
    want = built(kind)(**x, **options).to_tuple()
    for got in (built(kind)(**x, **options, return_dict=False), built(kind, return_dict=False)(**x, **options)):
        assert isinstance(got, tuple)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [*TEXT, *VISION])
@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"nonsense": None}, TypeError),
        ({"past_key_values": ()}, ValueError),
        ({"use_cache": True}, ValueError),
        ({"encoder_hidden_states": torch.zeros(1)}, ValueError),
        ({"head_mask": torch.ones(2)}, ValueError),
        ({"bool_masked_pos": torch.ones(2, 8)}, ValueError),
        ({"cu_seq_lens_q": torch.ones(2)}, ValueError),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_arguments_without_a_meaning_are_refused(kind: str, argument: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(argument))):
        built(kind)(**inputs(kind), **argument)


@pytest.mark.parametrize(
    "argument", ["nonsense", "position_ids", "encoder_hidden_states", "head_mask", "cu_seq_lens_q", "output_attentions"]
)
def test_arguments_without_a_meaning_to_the_causal_model_are_refused(argument: str) -> None:
    with pytest.raises(TypeError if argument == "nonsense" else ValueError, match=argument):
        built("ForCausalLM")(**inputs("ForCausalLM"), **{argument: True})


@pytest.mark.parametrize("kind", [*TEXT, *CAUSAL, *VISION])
def test_arguments_handed_on_empty_are_taken(kind: str) -> None:
    """Wrappers (peft, encoder-decoder models) pass all that transformers knows, most of it None."""
    x = inputs(kind)
    empty = {"past_key_values": None, "use_cache": False, "encoder_hidden_states": None, "output_attentions": None}
    torch.testing.assert_close(built(kind)(**x, **empty)[0], built(kind)(**x)[0])


@pytest.mark.parametrize("kind", VISION)
def test_images_are_asked_for(kind: str) -> None:
    with pytest.raises(ValueError, match=r"pixel_values must be .* got None"):
        built(kind)()
    x = inputs(kind)
    torch.testing.assert_close(built(kind)(**x, interpolate_pos_encoding=True)[0], built(kind)(**x)[0])


@contextlib.contextmanager
def counted(calls: list[str], where: str) -> Iterator[None]:
    calls.append(where)
    yield


@pytest.mark.parametrize("kind", LABELLED)
def test_activation_checkpointing_as_it_was_asked_for(kind: str) -> None:
    model, x = built(kind).train(), inputs(kind, labelled=True)
    model(**x).loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for every, reentrant in ((1, False), (2, False), (1, True)):
        calls: list[str] = []
        options: dict[str, Any] = {"use_reentrant": reentrant}
        if not reentrant:
            options["context_fn"] = lambda calls=calls: (counted(calls, "forward"), counted(calls, "again"))
        model.activation_checkpointing_enable(options, every_n_layers=every)
        model.zero_grad()
        model(**x).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], msg=f"{name}, {options}")
        if not reentrant:
            assert calls.count("forward") == calls.count("again") == len(layers) // every
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("kind", LABELLED)
def test_losses_by_the_items_of_a_whole_batch(kind: str) -> None:
    model, x = built(kind), inputs(kind, labelled=True)
    items = x["labels"].numel() - (2 if kind == "ForCausalLM" else 0)  # whose labels are shifted
    for number in (2 * items, torch.tensor(2 * items)):
        torch.testing.assert_close(model(**x, num_items_in_batch=number).loss * 2, model(**x).loss)


def test_losses_that_are_means_refuse_the_items_of_a_whole_batch() -> None:
    model = built("ForSequenceClassification", num_labels=1)
    with pytest.raises(ValueError, match="num_items_in_batch must be None"):
        model(**inputs("TextModel"), labels=torch.tensor([0.5, 2.0]), num_items_in_batch=4)


@pytest.mark.parametrize("kind", [*TEXT, *CAUSAL, *VISION])
def test_input_embeddings_can_be_read_and_set(kind: str) -> None:
    model = built(kind)
    old = model.get_input_embeddings()
    new = torch.nn.Embedding(50, 16) if kind in (*TEXT, *CAUSAL) else torch.nn.Conv2d(3, 8, 4, 4)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is not old
    model(**inputs(kind))
    model.enable_input_require_grads()
    model.disable_input_require_grads()


def test_feed_forward_in_chunks() -> None:
    x = inputs("TextModel")
    torch.testing.assert_close(built("TextModel", chunk_size_feed_forward=3)(**x)[0], built("TextModel")(**x)[0])


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("TextModel", {"is_decoder": True}),
        ("ForMaskedLM", {"hidden_act": "relu"}),
        ("CausalModel", {"hidden_act": "relu"}),
        ("Model", {"hidden_act": "relu"}),
        ("Backbone", {"qkv_bias": False}),
    ],
)
def test_options_of_bert_and_swin_that_are_not_there(kind: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        built(kind, **option)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "nonsense"])
def test_other_attention_is_refused(implementation: str) -> None:
    with pytest.raises((ValueError, ImportError)):
        SeTformerModel._from_config(built("Model").config, attn_implementation=implementation)


def test_a_backbone_of_the_stem_and_of_stages() -> None:
    """Stages as transformers' backbones count them: the stem first."""
    config = SeTformerConfig()
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    assert SeTformerConfig(out_indices=[0, 2]).out_features == ["stem", "stage2"]
    x = inputs("Backbone")
    states = built("Backbone")(**x, output_hidden_states=True).hidden_states
    model = built("Backbone", out_features=["stem", "stage2", "stage4"])
    maps = model(**x).feature_maps
    assert model.channels == [8, 8, 16] == [m.shape[1] for m in maps]
    for got, want in zip(maps, (states[0], states[2], states[4]), strict=True):
        torch.testing.assert_close(got, want)
    assert len(built("Backbone", out_features=["stem"])(**x).feature_maps) == 1


WRONG = [
    (SeTformerTextConfig, "hidden_size", "big"), (SeTformerTextConfig, "hidden_size", None),
    (SeTformerTextConfig, "num_hidden_layers", True), (SeTformerTextConfig, "vocab_size", 0),
    (SeTformerTextConfig, "num_references", 1.5), (SeTformerTextConfig, "hidden_dropout_prob", "0.1"),
    (SeTformerTextConfig, "hidden_dropout_prob", 1.5), (SeTformerTextConfig, "classifier_dropout", -0.1),
    (SeTformerTextConfig, "tie_word_embeddings", "yes"), (SeTformerTextConfig, "attention", "fast"),
    (SeTformerTextConfig, "attention", {"num_heads": 2}), (SeTformerTextConfig, "attention", {"epsilon": -1.0}),
    (SeTformerTextConfig, "attention", {"dropout": 2.0}), (SeTformerTextConfig, "layer_norm_eps", -1.0),
    (SeTformerCausalConfig, "conv_width", 0), (SeTformerCausalConfig, "gate", "yes"),
    (SeTformerCausalConfig, "attention", {"num_iters": 2}), (SeTformerCausalConfig, "attention", {"dropout": 0.1}),
    (SeTformerConfig, "widths", "wide"), (SeTformerConfig, "widths", [8, 8, 8, 0]),
    (SeTformerConfig, "depths", [1, 1, 1, "1"]), (SeTformerConfig, "num_heads", []),
    (SeTformerConfig, "num_references", 0), (SeTformerConfig, "pool", "max"), (SeTformerConfig, "drop_path_rate", 1.0),
    (SeTformerConfig, "dropout", 2), (SeTformerConfig, "num_channels", 0), (SeTformerConfig, "position_scale", "4"),
    (SeTformerConfig, "attention", {"num_references": 3}), (SeTformerConfig, "layer_scale", None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_configurations_check_every_field(kind: Any, name: str, value: Any) -> None:
    for make in (lambda: kind(**{name: value}), lambda: kind.from_dict({name: value})):
        with pytest.raises(StrictDataclassError, match=name):
            make()
    with pytest.raises(StrictDataclassError, match=name):
        setattr(kind(), name, value)


def test_configurations_from_files_are_checked(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "setformer_text", "hidden_size": "big"}')
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        SeTformerTextConfig.from_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="widths, depths and num_heads must be of the same length"):
        SeTformerConfig(widths=[8, 8])


def test_attributes_by_the_names_that_all_models_have() -> None:
    config = SeTformerConfig()
    assert (config.num_hidden_layers, config.num_attention_heads) == (4, config.num_heads)
