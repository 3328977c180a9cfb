"""A language model whose text lies on several ranks: convolutions take the tokens before a shard from other ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks_helpers import rows_of
from torch import Tensor

from setformer_kernels.distributed import Ranks, build_cp_context, context_parallel
from setformer_kernels.models import CausalDecoder, CausalLM
from setformer_kernels.models.causal import Past, ShortConvolution

N, SEEN, VOCABULARY = 20, 5, 11
LENGTHS = {"contiguous": [[7, 0, 13], [1, 1, 0, 2, 16], [20]], "zigzag": [[8, 0, 12], [2, 2, 2, 14]]}
CASES = [(layout, lengths) for layout, every in LENGTHS.items() for lengths in every]


def language_model(depth: int = 2) -> CausalLM:
    decoder = CausalDecoder(VOCABULARY, 8, depth, 2, 16, num_references=4)
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.gate.weight)
    return CausalLM(decoder).double()


def with_past(model: CausalLM, text: Tensor, past: list[Past]) -> tuple[Tensor, list[Past]]:
    hidden, after = model.decoder.with_past(text, past=past)
    return hidden, after


@pytest.mark.parametrize(("layout", "lengths"), CASES)
def test_a_text_over_ranks_is_read_as_one(layout: str, lengths: list[int]) -> None:
    """From a past, which all ranks have, to a past, which all ranks get, with every gradient."""
    whole, text = language_model(), torch.randint(VOCABULARY, (2, SEEN + N))
    with torch.no_grad():
        past = whole.decoder.with_past(text[:, :SEEN])[1]
    fresh = [Past(p.inputs.requires_grad_(), p.sums) for p in past]
    wanted, after = with_past(whole, text[:, SEEN:], fresh)
    cotangent = torch.randn_like(wanted)
    kept = torch.randn_like(after[0].inputs)
    sum(((wanted * cotangent).sum(), *[(p.inputs * kept).sum() for p in after])).backward()
    rows = rows_of(lengths, layout)

    def live(group: Any) -> tuple[Any, ...]:
        model = copy.deepcopy(whole)
        model.zero_grad()
        context_parallel(model, group, layout=layout, lengths=lengths)
        own = [Past(p.inputs.detach().requires_grad_(), p.sums.detach()) for p in past]
        mine = rows[group.rank]
        hidden, left = with_past(model, text[:, SEEN:][:, mine], own)
        loss = (hidden * cotangent[:, mine]).sum()
        if group.rank == 0:  # one of the losses that ranks have of what is the same on all
            loss = sum((loss, *[(p.inputs * kept).sum() for p in left]))
        else:
            loss = sum((loss, *[0 * p.inputs.sum() for p in left]))
        loss.backward()
        return hidden.detach(), left, [p.inputs.grad for p in own], [p.grad for p in model.parameters()]

    found = Ranks(len(lengths)).run(live)
    order = torch.cat(rows).argsort()
    torch.testing.assert_close(torch.cat([hidden for hidden, *_ in found], 1)[:, order], wanted, rtol=1e-10, atol=1e-11)
    for _, left, *_ in found:
        for one, other in zip(left, after, strict=True):
            torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-10, atol=1e-11)
    for i, given in enumerate(fresh):
        parts = torch.stack([grads[i] for _, _, grads, _ in found])
        torch.testing.assert_close(parts.sum(0), given.inputs.grad, rtol=1e-9, atol=1e-10)
    for parameter, *grads in zip(whole.parameters(), *(grads for *_, grads in found), strict=True):
        torch.testing.assert_close(sum(grads), parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("known", [True, False])
def test_a_convolution_tells_its_last_tokens_each_way(known: bool) -> None:
    """C · (W − 1) numbers a piece, and the lengths where no context has them."""
    ranks, conv = Ranks(3), ShortConvolution(6, 4)

    def live(group: Any) -> None:
        own = copy.deepcopy(conv)
        own.cp_context = build_cp_context(group=group, lengths=[5, 1, 9] if known else None)
        own(torch.randn(1, (5, 1, 9)[group.rank], 6, requires_grad=True), wanted=False)[0].sum().backward()

    ranks.run(live)
    assert ranks.sent == [8] * (not known) + [4 * 6 * 3] * 2


def test_padding_and_other_tokens_are_refused_on_every_rank() -> None:
    """As are tokens that the context does not have."""
    text = torch.randint(VOCABULARY, (2, 8))

    def live(group: Any, mask: Any, tokens: int) -> None:
        model = context_parallel(language_model(), group, lengths=[4, 4])
        model(text[:, :tokens], attention_mask=mask)

    for error in Ranks(2).run(lambda group: live(group, torch.ones(2, 4), 4), raising=False):
        assert type(error) is ValueError
        assert "attention_mask goes without cp_context" in str(error)
    for error in Ranks(2).run(lambda group: live(group, None, 4 - group.rank), raising=False):
        assert type(error) is ValueError
        assert "x must have the 4 tokens that lengths of the cp_context has for rank 1, got 3" in str(error)


def test_the_op_is_what_torch_library_wants() -> None:
    group = Ranks(1).members[0]
    own, before = (torch.randn(2, 6, 3, requires_grad=True) for _ in range(2))
    op = torch.ops.setformer_kernels.set_halo.default
    checked = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (own, before, 3, 1, [2], True, group.name, "auto"), test_utils=checked)


@pytest.mark.exhaustive
def test_a_language_model_on_a_shard_is_one_graph() -> None:
    model = context_parallel(language_model(1), Ranks(1).members[0], lengths=[N])
    compiled, text = torch.compile(model, fullgraph=True, backend="eager"), torch.randint(VOCABULARY, (2, N))
    torch.testing.assert_close(compiled(text), model(text))
