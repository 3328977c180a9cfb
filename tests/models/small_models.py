"""Small SeTformers of every class that is behind transformers, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from setformer_kernels.models import transformers as doors
from setformer_kernels.models.transformers import SeTformerCausalConfig, SeTformerConfig, SeTformerTextConfig

TEXT = ("TextModel", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
CAUSAL = ("CausalModel", "ForCausalLM")
VISION = ("Model", "ForImageClassification", "Backbone")


def built(kind: str, **changes: Any) -> torch.nn.Module:
    """A small model of the class SeTformer<kind>, without dropout, in eval."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"num_references": 4, "num_labels": 3}
    if kind in (*TEXT, *CAUSAL):
        small |= {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 24, "hidden_dropout_prob": 0.0}  # fmt: skip
    if kind in TEXT:
        config: Any = SeTformerTextConfig(**{**small, "attention_probs_dropout_prob": 0.0, **changes})
    elif kind in CAUSAL:
        config = SeTformerCausalConfig(**{**small, **changes})
    else:
        small |= {"widths": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "drop_path_rate": 0.0}
        config = SeTformerConfig(**{**small, **changes})
    return getattr(doors, f"SeTformer{kind}")(config).eval()


def inputs(kind: str, labelled: bool = False) -> dict[str, Tensor]:
    if kind not in (*TEXT, *CAUSAL):
        labels = {"labels": torch.tensor([2, 0])} if labelled else {}
        return {"pixel_values": torch.randn(2, 3, 32, 64), **labels}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    x = {"input_ids": torch.randint(1, 50, (2, 7)), "attention_mask": mask}
    if labelled:
        x["labels"] = torch.tensor([2, 0]) if "Sequence" in kind else torch.randint(3, (2, 7))
    return x


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
    )
