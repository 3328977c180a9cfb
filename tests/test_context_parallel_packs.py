"""Packed batches whose rows lie on several ranks: every sequence is answered as if it lay on one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks_helpers import rows_of, uneven
from torch import Tensor

import setformer_kernels.functional as SF
from setformer_kernels.distributed import Ranks, build_cp_context
from setformer_kernels.distributed.packs import Part, piece_of

H, G, D, E, M = 2, 2, 8, 6, 5
PACKS = {
    "one": [30], "many": [3, 0, 1, 9, 7, 4, 2, 8], "halves": [10, 0, 10, 10, 0], "short_last": [20, 1, 1, 1, 1, 2],
    "nothing": [0, 0],
}  # fmt: skip


def pack(lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v and a mask of every row; references and their masses; offsets."""
    n = sum(lengths)
    tokens = [torch.randn(n, *s, dtype=dtype, requires_grad=True) for s in ((H * G, D), (H, D), (H, E), (H,))]
    parameters = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((H, M, D), (H, M))]
    return tokens, parameters, torch.tensor([0, *lengths]).cumsum(0)


def call(tokens: list[Tensor], parameters: list[Tensor], cu: Tensor, **options: Any) -> Tensor:
    q, k, v, mask, *gates = tokens
    return SF.set_attention_varlen(
        q, k, v, parameters[0], cu, key_mask=mask, reference_log_mass=parameters[1],
        log_decay=gates[0] if gates else None, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("T", "causal"), [(0, False), (1, False), (3, False), (0, True), (1, True)])
@pytest.mark.parametrize(("ranks", "layout"), [(1, "contiguous"), (4, "contiguous"), (3, "zigzag")])
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sequences_over_ranks_are_those_of_one_rank(
    backend: str, name: str, ranks: int, layout: str, T: int, causal: bool
) -> None:  # fmt: skip
    """With dropout at T = 1, and gates in a scan of T = 1."""
    if backend == "reference" and name not in ("many", "nothing"):
        pytest.skip("other packs stand for this one")
    tokens, parameters, cu = pack(PACKS[name], torch.float64)
    options = {"num_iters": T, "reference_relaxation": 0.7, "dropout_p": 0.2 * (T == 1), "seed": torch.tensor(5)}
    options |= {"causal": causal}
    tokens = [*tokens, *([-torch.rand(len(tokens[0]), H).double()] if causal and T == 1 else [])]
    tokens = [t.detach().requires_grad_() for t in tokens]
    wanted = call(tokens, parameters, cu, **options, backend="reference")
    cotangent = torch.randn_like(wanted)
    grads = torch.autograd.grad(
        wanted, [*tokens, *parameters], cotangent, allow_unused=True, materialize_grads=True
    )  # fmt: skip
    lengths = uneven(int(cu[-1]), ranks, 2 if layout == "zigzag" else 1)
    rows = rows_of(lengths, layout)

    def live(group: Any) -> tuple[Tensor, Any]:
        mine = rows[group.rank]
        context = build_cp_context(cu, group, layout=layout, lengths=lengths)
        own = [t[mine].detach().requires_grad_() for t in tokens]
        shared = [t.detach().requires_grad_() for t in parameters]
        o = call(own, shared, cu, **options, backend=backend, cp_context=context)
        found = torch.autograd.grad(o, [*own, *shared], cotangent[mine], allow_unused=True, materialize_grads=True)
        return o.detach(), found

    found = Ranks(ranks).run(live)
    order = torch.cat(rows).argsort()
    torch.testing.assert_close(torch.cat([o for o, _ in found])[order], wanted, rtol=1e-11, atol=1e-12)
    for i, grad in enumerate(grads):
        parts = [g[i] for _, g in found]
        one = torch.cat(parts)[order] if i < len(tokens) else torch.stack(parts).sum(0)
        torch.testing.assert_close(one, grad, rtol=1e-9, atol=1e-11)


def invariants(states: Tensor) -> Tensor:
    """z and log C of states, 0 of empty ones."""
    total = states[..., : E + 1] + states[..., E + 1 : -1]
    seen = total[..., -1:] > 0
    c = torch.where(seen, total[..., -1:], 1.0)
    scale = torch.where(seen, states[..., -1:].detach() * math.log(2), 0.0)
    return torch.cat((torch.where(seen, total[..., :-1] / c, 0.0), torch.where(seen, c.log() + scale, 0.0)), -1)


@pytest.mark.parametrize(("gates", "before"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("ranks", "layout"), [(1, "contiguous"), (4, "contiguous"), (3, "zigzag")])
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_of_sequences_over_ranks(
    backend: str, name: str, ranks: int, layout: str, gates: bool, before: bool
) -> None:  # fmt: skip
    """Those before have gradients that are each rank's part, those after are the same on every rank."""
    if name != "many" and (backend == "reference" or not gates or not before or ranks == 1):
        pytest.skip("other packs stand for this one")
    tokens, parameters, cu = pack(PACKS[name], torch.float64)
    rows = sum(PACKS[name])
    tokens += [-torch.rand(rows, H).double().requires_grad_()] if gates else []
    states = []
    if before:
        past = (torch.randn(len(cu) - 1, H, 7, n).double() for n in (D, D, E))
        state = SF.set_causal(*past, parameters[0].detach(), output_final_state=True)[1]
        assert state is not None
        state[1:2] = 0
        states = [state.requires_grad_()]

    def answered(tokens: list[Tensor], shared: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        first = shared[2] if before else None
        o, after = call(
            tokens, shared[:2], cu, causal=True, initial_state=first, output_final_state=True, dropout_p=0.2 * gates,
            seed=torch.tensor(5), **options,
        )  # fmt: skip
        return o, invariants(after) + 0 * o.sum()

    shared = [*parameters, *states]
    wanted = answered(tokens, shared, backend="reference")
    cotangents = [torch.randn_like(t) for t in wanted]
    grads = torch.autograd.grad(wanted, [*tokens, *shared], cotangents, allow_unused=True, materialize_grads=True)
    lengths = uneven(int(cu[-1]), ranks, 2 if layout == "zigzag" else 1)
    of_ranks = rows_of(lengths, layout)

    def live(group: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        mine = of_ranks[group.rank]
        context = build_cp_context(cu, group, layout=layout, lengths=lengths)
        own = [t[mine].detach().requires_grad_() for t in tokens]
        alike = [t.detach().requires_grad_() for t in shared]
        o, after = answered(own, alike, backend=backend, cp_context=context)
        last = cotangents[1] if group.rank == group.size - 1 else torch.zeros_like(after)
        found = torch.autograd.grad(
            (o, after), [*own, *alike], (cotangents[0][mine], last), allow_unused=True, materialize_grads=True
        )
        return (o.detach(), after.detach()), found

    found = Ranks(ranks).run(live)
    order = torch.cat(of_ranks).argsort()
    torch.testing.assert_close(torch.cat([o for (o, _), _ in found])[order], wanted[0], rtol=1e-11, atol=1e-12)
    for (_, after), _ in found:
        assert torch.equal(after, found[0][0][1])
        torch.testing.assert_close(after, wanted[1], rtol=1e-11, atol=1e-11)
    for i, grad in enumerate(grads):
        parts = [g[i] for _, g in found]
        one = torch.cat(parts)[order] if i < len(tokens) else torch.stack(parts).sum(0)
        if i == len(tokens) + len(parameters):  # N' and C' are what rounding took, and k a scale
            one, grad = one[..., : E + 1], grad[..., : E + 1]
        torch.testing.assert_close(one, grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["one", "many", "short_last"])
def test_what_is_sent_does_not_depend_on_how_many_sequences_there_are(name: str) -> None:
    """Two segments of a rank, in collectives as those of one sequence."""
    tokens, parameters, cu = pack(PACKS[name], torch.float32)
    ranks = Ranks(2)
    rows = rows_of(uneven(int(cu[-1]), 2), "contiguous")

    def live(group: Any) -> None:
        context = build_cp_context(cu, group, lengths=[len(r) for r in rows])
        own = [t[rows[group.rank]].detach().requires_grad_() for t in tokens]
        call(own, parameters, cu, num_iters=3, backend="cpu", cp_context=context).sum().backward()

    ranks.run(live)
    one, last = 4 * 2 * H * M, 4 * 2 * H * M * (1 + E)
    assert ranks.sent == [one, one, last, last, one, one]


def test_what_a_piece_shares_with_others() -> None:
    cu = (0, 5, 5, 8, 20, 21)
    none = Part(-1, 0, 0)
    assert piece_of(cu, 0, 8, 0)[:3] == (none, Part(-1, 0, 8), Part(-1, 8, 8))
    assert piece_of(cu, 3, 12, 2)[:3] == (Part(0, 2, 4), Part(-1, 4, 7), Part(3, 7, 11))
    assert piece_of(cu, 9, 15, 0)[:3] == (Part(3, 0, 6), Part(-1, 6, 6), Part(-1, 6, 6))
    assert piece_of(cu, 9, 9, 0)[:3] == (none, none, none)


def test_packs_that_are_not_the_contexts() -> None:
    tokens, parameters, cu = pack(PACKS["many"], torch.float32)
    context, states = build_cp_context(cu, Ranks(1).members[0]), torch.zeros(len(cu) - 1, H, M, 2 * E + 3)
    cases: list[tuple[str, Any, Tensor, dict[str, Any]]] = [
        ("cu_seqlens_q must be the cu_seqlens", context, cu.flip(0), {}),
        ("cu_seqlens_k must be the cu_seqlens", context, cu, {"cu_seqlens_k": cu + 1}),
        ("cp_context must be built with cu_seqlens", build_cp_context(group=Ranks(1).members[0]), cu, {}),
        ("num_iters must be at most 1", context, cu, {"causal": True, "num_iters": 2}),
        ("log_decay goes with causal=True", context, cu, {"log_decay": torch.zeros(34, H)}),
        ("output_final_state goes with causal=True", context, cu, {"output_final_state": True}),
        ("initial_state must be torch.float32", context, cu, {"causal": True, "initial_state": states.double()}),
        ("initial_state must have shape", context, cu, {"causal": True, "initial_state": states[1:]}),
    ]
    for message, of, offsets, options in cases:
        with pytest.raises(ValueError, match=message):
            SF.set_attention_varlen(*tokens[:3], parameters[0], offsets, cp_context=of, **options)
