"""Models of transformers and timm whose heads several ranks have.  Cases of tests/models/test_ranks.py."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import BertConfig, BertForSequenceClassification
from transformers.distributed import DistributedConfig

import setformer_kernels as sk
from setformer_kernels.models import replace_attention
from setformer_kernels.models.transformers import (
    SeTformerCausalConfig,
    SeTformerConfig,
    SeTformerForCausalLM,
    SeTformerForImageClassification,
    SeTformerForMaskedLM,
    SeTformerTextConfig,
    from_pretrained,
)

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "num_references": 6, "hidden_dropout_prob": 0.0,
}  # fmt: skip
IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(4))


def folder() -> Path:
    """One that all ranks know."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made, src=0)
    return Path(made[0])


def saved(model: Any) -> Path:
    path = folder()
    if dist.get_rank() == 0:
        model.save_pretrained(path)
    dist.barrier()
    return path


def compare(one: Any, many: Any, inputs: dict[str, Tensor]) -> None:
    """Logits, the gradients of all parameters, and what AdamW makes of them."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, many)]
    for _ in range(2):
        outputs = []
        for model, optimizer in zip((one, many), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(**inputs))
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
        for (name, p), (_, q) in zip(one.named_parameters(), many.named_parameters(), strict=True):
            grad = q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad
            message = f"{name}: {{}}".format
            torch.testing.assert_close(
                grad, p.grad, atol=3e-5 * float(p.grad.abs().max()) + 1e-7, rtol=1e-3, msg=message
            )
        for optimizer in optimizers:
            optimizer.step()


def load(loader: Any, path: Path) -> Any:
    if loader != SeTformerForMaskedLM.from_pretrained:
        return loader(path, distributed_config=DistributedConfig(tp_plan="auto"))
    with pytest.warns(FutureWarning, match="DistributedConfig"):  # the older way
        return loader(path, tp_plan="auto")


def case_plans_of_texts_and_images() -> None:
    text = SeTformerForMaskedLM(SeTformerTextConfig(**TEXT, attention_probs_dropout_prob=0.0)).eval()
    sizes = {"widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4), "num_references": 6}
    image = SeTformerForImageClassification(SeTformerConfig(**sizes, num_labels=3, drop_path_rate=0.0)).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for model, inputs in (
        (text, {"input_ids": IDS, "labels": IDS}),
        (image, {"pixel_values": pixels, "labels": torch.tensor([0, 2])}),
    ):
        many = load(type(model).from_pretrained, saved(model))
        assert any(isinstance(p, DTensor) for p in many.parameters())
        compare(type(model).from_pretrained(saved(model)), many, inputs)
        path = folder()
        many.save_pretrained(path)  # all ranks take part
        dist.barrier()
        again = type(model).from_pretrained(path)
        torch.testing.assert_close(again(**inputs).logits, many(**inputs).logits)


def case_plan_of_a_language_model_that_generates() -> None:
    path = saved(SeTformerForCausalLM(SeTformerCausalConfig(**TEXT)))
    one, many = SeTformerForCausalLM.from_pretrained(path), load(SeTformerForCausalLM.from_pretrained, path)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(IDS, **how), many.generate(IDS, **how))
    compare(one, many, {"input_ids": IDS, "labels": IDS})


def case_plan_of_a_converted_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert replace_attention(model, num_references=6).replaced
    path = saved(model)
    one, many = from_pretrained(path), load(from_pretrained, path)
    references = [p for name, p in many.named_parameters() if name.endswith("references")]
    assert references
    assert all(isinstance(p, DTensor) and p.to_local().shape[0] == 1 for p in references)
    compare(one, many, {"input_ids": IDS, "labels": IDS})


def case_styles_of_torch_for_a_converted_model() -> None:
    config = BertConfig(**{k: v for k, v in TEXT.items() if k != "num_references"}, attention_probs_dropout_prob=0.0)
    one = BertForSequenceClassification(config).eval()
    assert replace_attention(one, num_references=6).replaced
    mesh, many = init_device_mesh("cpu", (dist.get_world_size(),)), copy.deepcopy(one)
    plan: dict[str, Any] = {f"self.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {"self.set_transport": sk.distributed.SeTParallel(), "output.dense": RowwiseParallel()}
    for layer in many.bert.encoder.layer:
        parallelize_module(layer.attention, mesh, plan)
    compare(one, many, {"input_ids": IDS, "labels": torch.tensor([0, 1])})


def case_a_model_of_timm() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    for norm in (False, True):
        one = timm.models.VisionTransformer(**sizes, qk_norm=norm).eval()
        assert replace_attention(one, num_references=6).replaced
        many = copy.deepcopy(one)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(many, mesh, {"blocks.*.attn": sk.distributed.SeTParallel()})
        x, found = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)), []
        for model in (one, many):
            y = model(x)
            y.square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if "attn" in name}
            found.append((y.detach(), grads))
        torch.testing.assert_close(found[1][0], found[0][0])
        for name, grad in found[1][1].items():
            if name in found[0][1]:
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                torch.testing.assert_close(grad, found[0][1][name], atol=1e-4, rtol=1e-3)
        assert {name.rpartition(".")[2] for name in found[1][1] if "qkv" in name} >= {
            "weight_q",
            "weight_k",
            "weight_v",
        }
