"""The text encoder: padding, token types, heads, memory, and that it learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from setformer_kernels.models import MaskedLMHead, Pooler, SequenceHead, TextEncoder, TextModel, TokenHead
from setformer_kernels.models import initialize_references as place
from setformer_kernels.models.text import unit_positions

B, L, VOCAB = 3, 7, 30
ROOT = Path(__file__).resolve().parents[2]


def encoder(**arguments: object) -> TextEncoder:
    sizes = {"vocab_size": VOCAB, "width": 16, "depth": 2, "num_heads": 4, "hidden": 32, "num_references": 5}
    return TextEncoder(**{**sizes, "max_positions": 20, "dropout": 0.0, **arguments}).double()


def ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape or (B, L))


def mask() -> Tensor:
    """All of the first text, five tokens of the second, one of the third."""
    return (torch.arange(L) < torch.tensor([[L], [5], [1]])).long()


def test_padding_never_matters() -> None:
    model, x, there = encoder(), ids(), mask()
    want = model(x, there)
    garbage = torch.where(there.bool(), x, ids())
    torch.testing.assert_close(model(garbage, there)[there.bool()], want[there.bool()])
    torch.testing.assert_close(model(x[1:2, :5])[0], want[1, :5])
    torch.testing.assert_close(model(x[1:2, :5], torch.ones(1, 5, dtype=torch.bool))[0], want[1, :5])


def test_padding_on_the_left_shifts_learned_positions_only() -> None:
    model, x = encoder(), ids(1, 5)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], 1)
    there = (torch.arange(8) >= 3).long()[None]
    positions = (torch.arange(8) - 3).clamp(min=0)
    torch.testing.assert_close(model(left, there, position_ids=positions)[:, 3:], model(x))


def test_unit_positions() -> None:
    there = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    position = unit_positions(there).squeeze(-1)
    torch.testing.assert_close(position[0, 1:], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(position[1], torch.tensor([1 / 6, 3 / 6, 5 / 6]))
    assert position.isfinite().all()


def test_types_positions_and_embeddings_as_input() -> None:
    model, x = encoder(), ids()
    want = model(x)
    torch.testing.assert_close(model(x, token_type_ids=torch.zeros_like(x)), want)
    assert not torch.allclose(model(x, token_type_ids=torch.ones_like(x)), want)
    torch.testing.assert_close(model(x, position_ids=torch.arange(L).expand(B, L)), want)
    torch.testing.assert_close(model(inputs_embeds=model.embeddings.word(x)), want)


def test_order_matters_with_either_kind_of_position() -> None:
    x = ids(1, L)
    for arguments in ({"position_scale": None}, {}):
        model = encoder(**arguments)
        if not arguments:
            nn.init.zeros_(model.embeddings.position.weight)
        assert not torch.allclose(model(x.flip(1)).flip(1), model(x))
    model = encoder(position_scale=None)
    nn.init.zeros_(model.embeddings.position.weight)
    torch.testing.assert_close(model(x.flip(1)).flip(1), model(x))


@pytest.mark.parametrize(
    ("head", "shape"),
    [(SequenceHead(16, 3), (B, 3)), (TokenHead(16, 4), (B, L, 4)), (MaskedLMHead(16, VOCAB), (B, L, VOCAB)),
     (Pooler(16), (B, 16))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_heads_and_gradients(head: nn.Module, shape: tuple[int, ...]) -> None:
    model = TextModel(encoder(attention={"value_map": "rkhs", "learn_epsilon": True}), head).double()
    y = model(ids(), attention_mask=mask(), token_type_ids=torch.randint(2, (B, L)))
    assert y.shape == shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_tied_words() -> None:
    body = encoder()
    model = TextModel(body, MaskedLMHead(16, VOCAB).double().tie(body))
    assert model.head.decoder.weight is body.embeddings.word.weight
    assert sum(name.endswith("word.weight") or "decoder.weight" in name for name, _ in model.named_parameters()) == 1


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = encoder(dropout=0.2, attention={"dropout": 0.1}), ids()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(x, mask()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_initialize_references_leaves_padding_out() -> None:
    """References placed on k-means centres of the same real tokens, whatever the padding holds."""
    x, there, placed = ids(), mask(), []
    body = encoder(num_references=2)
    state = {name: value.clone() for name, value in body.state_dict().items()}
    for tokens in (x, torch.where(there.bool(), x, ids())):
        body.load_state_dict(state)
        torch.manual_seed(1)
        place(body, tokens, attention_mask=there)
        placed.append(body.blocks[1].attention.references.detach().clone())
    torch.testing.assert_close(*placed)
    assert not torch.equal(placed[0], state["blocks.1.attention.references"])


def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = encoder(depth=1).float()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        x = ids(2, length)
        there = torch.arange(length)[None] < torch.tensor([[length], [3]])
        torch.testing.assert_close(compiled(x, there), model(x, there))


PEAK = """
import sys, torch
from benchmarks.tasks.training import peak_memory
from setformer_kernels.models import SequenceHead, TextEncoder, TextModel
length = int(sys.argv[1])
encoder = TextEncoder(100, 64, 2, 4, 128, num_references=16, max_positions=16384)
model = TextModel(encoder, SequenceHead(64, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
x = torch.randint(100, (1, length))
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([1]))
    loss.backward()
    optimizer.step()
print(peak_memory(), loss.item())
"""


@pytest.mark.slow
def test_sixteen_thousand_tokens_train_in_linear_memory() -> None:
    def peak(length: int) -> float:
        command = [sys.executable, "-c", PEAK, str(length)]
        # Large blocks straight from the system and back: glibc's own threshold moves, and the peak by 30 MiB with it.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=120).stdout
        memory, loss = out.split()
        assert float(loss) == float(loss)
        return float(memory) / 2**20

    base, half, whole = peak(64), peak(8192), peak(16384)
    # One softmax attention matrix of 16384 tokens and 4 heads alone is 4096 MiB.
    assert whole - base < 400
    assert whole - base < 2.4 * (half - base)


def test_learns_which_symbol_comes_more_often() -> None:
    """Count over a padded text: half right by guessing, 60 steps."""
    torch.manual_seed(0)
    model = TextModel(encoder(vocab_size=3, max_positions=24, depth=1), SequenceHead(16, 2, 0.0)).float()

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randint(9, 24, (size, 1)) // 2 * 2 + 1  # odd: no ties
        there = torch.arange(24) < lengths
        share = torch.rand(size, 1).round() * 0.4 + 0.3
        x = torch.where(there, 1 + (torch.rand(size, 24) < share).long(), 0)
        return x, there[:, :24], ((x == 2).sum(1) * 2 > lengths.squeeze(1)).long()

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        x, there, y = batch(64)
        loss = nn.functional.cross_entropy(model(x, there), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, there, y = batch(512)
    assert (model.eval()(x, there).argmax(1) == y).double().mean() > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids(7)}, "input_ids must be [B, L], got [7]"),
        ({"input_ids": ids(1, 21)}, "max_positions=20 is less than the length of the text, 21"),
        ({"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 4)}, "attention_mask must be [2, 3], as the text"),
        ({"input_ids": ids(2, 3), "token_type_ids": ids(1, 3)}, "token_type_ids must be [2, 3]"),
        ({"input_ids": ids(2, 3), "position_ids": ids(2, 2)}, "position_ids must be [3] or [2, 3], got [2, 2]"),
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, "inputs_embeds must be [B, L, 16], got [2, 3, 4]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder()(**call)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="depth must be ≥ 1, got 0"):
        encoder(depth=0)
    with pytest.raises(ValueError, match="divisible by num_heads"):
        encoder(num_heads=3)


def test_fewer_key_heads() -> None:
    model = encoder(attention={"num_kv_heads": 2})
    assert {m.references.shape[0] for m in model.modules() if hasattr(m, "references")} == {2}
    model(ids(), mask()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
