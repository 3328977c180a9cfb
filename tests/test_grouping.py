"""Grouped queries: those of H = G·Hk heads on Hk key heads are those of repeated keys and references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import setformer_kernels.functional as SF
from setformer_kernels import streaming
from setformer_kernels.backends import cpu
from setformer_kernels.ops.direct import Repeats
from setformer_kernels.problem import SCALARS, Operands, Options

B, H, G, L, S, M, D, E, P = 2, 2, 3, 20, 30, 5, 16, 8, 2


def grouped(dtype: torch.dtype = torch.float32, by_token: bool = False) -> dict[str, Tensor]:
    """Arguments of which what belongs to a key head is there Hk times."""
    shapes = {"query": (B, G * H, L, D), "key": (B, H, S, D), "value": (B, H, S, E), "references": (H, M, D)}
    made = {
        name: torch.randn(*shape).to(torch.float32 if name == "references" else dtype) for name, shape in shapes.items()
    }
    if by_token:
        made["query"] = made["query"].transpose(1, 2).contiguous().transpose(1, 2)
    made |= {"epsilon": torch.tensor([0.1, 0.3]), "reference_log_mass": torch.randn(H, M)}
    return {name: t.requires_grad_() for name, t in made.items()}


def placed() -> dict[str, Any]:
    return {
        "query_position": torch.randn(B, L, P),
        "key_position": torch.randn(S, P),
        "reference_position": torch.randn(H, M, P),
    }


def repeated(arguments: dict[str, Any]) -> dict[str, Any]:
    at = {"key": 1, "value": 1, "references": 0, "epsilon": 0, "reference_log_mass": 0, "reference_position": 0}
    return {name: t.repeat_interleave(G, at[name]) if name in at else t for name, t in arguments.items()}


SEEN = torch.rand(B, G * H, L, S, generator=torch.Generator().manual_seed(0), device="cpu") < 0.6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_iters": 2},
    "t0": {"num_iters": 0},
    "dropout": {"dropout_p": 0.4, "seed": torch.tensor(3)},
    "causal": {"causal": True, "num_iters": 1},
    "few queries": {"causal": True, "num_iters": 2},
    "masked": {
        "num_iters": 2,
        "attn_mask": torch.rand(B, G * H, L, S, generator=torch.Generator().manual_seed(0)) < 0.6,
    },
}


def cut(arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The scan wants as many queries as keys."""
    arguments = arguments | placed()
    if options.get("causal") and options["num_iters"] == 1:
        arguments |= {name: arguments[name][:, :, :L] for name in ("key", "value")}
        arguments["key_position"] = arguments["key_position"][:L]
    return arguments


def same_bits(found: Tensor, wanted: Tensor, backend: str) -> None:
    """But for PyTorch's own products, of the reference and "eager", which round by their shape on some CPUs."""
    if backend in ("reference", "eager"):
        few_units = 16 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, wanted, rtol=few_units, atol=few_units)
    else:
        assert torch.equal(found, wanted), backend


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_groups_are_repeated_keys_bit_for_bit(name: str, dtype: torch.dtype, by_token: bool, native: str) -> None:
    options = {k: v.to(torch.get_default_device()) if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    for backend in (native, "reference"):
        leaves = grouped(dtype, by_token)
        arguments = cut(leaves, options)
        found = SF.set_attention(**arguments, **options, backend=backend)
        wanted = SF.set_attention(**repeated(arguments), **options, backend=backend)
        assert found.shape == (B, G * H, L, E)
        same_bits(found, wanted, backend)
    cotangent = torch.randn(found.shape)
    grads = [torch.autograd.grad((o.float() * cotangent).sum(), list(leaves.values())) for o in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert (one - other).norm() <= tolerance * other.norm()


ALONE = ("causal", "few queries", "masked", "dropped")


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_groups_of_one_batch_element_are_repeated_keys(name: str, by_token: bool, native: str) -> None:
    """Bit for bit, without a copy of the keys where nothing is dropped."""
    options = OPTIONS["causal"] | OPTIONS["dropout"] if name == "dropped" else OPTIONS[name]
    options = {k: v.to(torch.get_default_device()) if isinstance(v, Tensor) else v for k, v in options.items()}
    of_batch = ("query", "key", "value", "query_position")
    arguments = {n: t[:1] if n in of_batch else t for n, t in cut(grouped(by_token=by_token), options).items()}
    arguments["key_mask"] = torch.randn(1, arguments["key"].shape[2], requires_grad=True)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][:1]
    found = SF.set_attention(**arguments, **options, backend=native)
    wanted = SF.set_attention(**repeated(arguments), **options, backend=native)
    same_bits(found, wanted, native)
    leaves, cotangent = [t for t in arguments.values() if t.requires_grad], torch.randn(found.shape)
    grads = [torch.autograd.grad((o * cotangent).sum(), leaves) for o in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(cpu.ABSENT), reason=cpu.ABSENT)
@pytest.mark.parametrize("options", [{"num_iters": 1}, {"num_iters": 2}], ids=str)
def test_keys_of_one_batch_element_are_not_copied(options: dict[str, Any]) -> None:
    q, k, v, y = (torch.randn(*shape) for shape in ((1, G * H, L, D), (1, H, L, D), (1, H, L, E), (H, M, D)))
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        SF.set_attention(q, k, v, y, causal=True, **options)
    assert "aten.expand.default" in seen
    assert not [name for name in seen if "copy" in name or "clone" in name]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_groups(causal: bool, average: bool, native: str) -> None:
    arguments = cut(grouped(), {"causal": causal, "num_iters": 1})
    options: dict[str, Any] = {
        "causal": causal, "num_iters": 1, "kernel": "rbf", "dropout_p": 0.0, "seed": None, "backend": native,
    }  # fmt: skip
    query, key, value, references, *rest = (dict.fromkeys(arguments) | arguments).values()
    given = dict(zip(list(arguments)[4:], rest, strict=True)) | options
    o, a = SF.attention_and_weights(query, key, value, references, average=average, **given)
    wide = repeated(arguments)
    wanted = SF.set_attention_weights(**{n: t for n, t in wide.items() if n != "value"}, **options)
    torch.testing.assert_close(a, wanted.mean(1) if average else wanted)
    torch.testing.assert_close(o, wanted @ wide["value"])


def test_a_memory_is_read_by_groups(native: str) -> None:
    arguments = grouped()
    query, key, value, references = (arguments[name] for name in ("query", "key", "value", "references"))
    memory = SF.set_transport(key, value, references, backend=native)
    assert memory.z.shape == (B, H, M, E)
    o = SF.set_read(query, memory, references, backend=native)
    assert torch.equal(o, SF.set_attention(query, key, value, references, backend=native))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_groups(causal: bool) -> None:
    q, k, v, y = torch.randn(L, G * H, D), torch.randn(L, H, D), torch.randn(L, H, E), torch.randn(H, M, D)
    cu = torch.tensor([0, 4, 4, L])
    found = SF.set_attention_varlen(q, k, v, y, cu, causal=causal)
    for first, last in ((0, 4), (4, L)):
        q1, k1, v1 = (t[first:last].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        wanted = SF.set_attention(q1, k1, v1, y, causal=causal)
        torch.testing.assert_close(found[first:last], wanted.squeeze(0).transpose(0, 1))


@pytest.mark.parametrize("B", [1, B])
def test_states_of_groups(B: int, native: str) -> None:
    """A state a key head: a scan in two pieces, and the last token as a step."""
    q, k, v, y, n = (
        torch.randn(B, G * H, L, D),
        torch.randn(B, H, L, D),
        torch.randn(B, H, L, E),
        torch.randn(H, M, D),
        7,
    )
    gates = -torch.rand(B, H, L)
    whole, last = SF.set_causal(q, k, v, y, log_decay=gates, output_final_state=True, backend=native)
    wide = SF.set_causal(
        q, *(t.repeat_interleave(G, 1) for t in (k, v)), y.repeat_interleave(G, 0), backend=native,
        log_decay=gates.repeat_interleave(G, 1), output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close((whole, last), (wide[0], wide[1][:, ::G]))
    assert last.shape[1] == H
    cuts = [(t[:, :, :n], t[:, :, n:-1], t[:, :, -1]) for t in (q, k, v, gates)]
    state, found = None, []
    for piece in (0, 1):
        query, key, value, decay = (cut[piece] for cut in cuts)
        o, state = SF.set_causal(
            query, key, value, y, initial_state=state, log_decay=decay, output_final_state=True, backend=native
        )
        found.append(o)
    state = state.contiguous()
    query, key, value, decay = (cut[2] for cut in cuts)
    found.append(SF.set_step(state, query, key, value, y, log_decay=decay, backend=native).unsqueeze(2))
    torch.testing.assert_close((torch.cat(found, 2), state), (whole, last))


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_goes_on_from_what_a_prompt_of_groups_left(packed: bool, native: str) -> None:
    """The state that comes out is one that a step takes: of memory of its own."""
    options = grouped()
    x = [options[name].detach() for name in ("query", "key", "value")]
    x[1], x[2] = x[1][:, :, :L], x[2][:, :, :L]
    given = {"references": options["references"].detach(), "backend": native}
    if packed:
        flat = [t[:, :, :-1].transpose(1, 2).flatten(0, 1) for t in x]
        cu = torch.tensor([0, L - 1, 2 * (L - 1)])
        _, state = SF.set_attention_varlen(
            *flat, cu_seqlens_q=cu, causal=True, num_iters=1, output_final_state=True, **given
        )
    else:
        _, state = SF.set_causal(*(t[:, :, :-1] for t in x), output_final_state=True, **given)
    assert state is not None
    assert state.untyped_storage().nbytes() == state.nbytes
    o = SF.set_step(state, *(t[:, :, -1] for t in x), **given)
    want, _ = SF.set_causal(*x, **given)
    torch.testing.assert_close(o, want[:, :, -1], rtol=1e-4, atol=1e-5)


def test_a_step_of_groups_copies_no_state() -> None:
    """Nothing the size of the pool is made, whoever's turn it is."""
    pool = SF.set_causal(
        *(torch.randn(50, H, 20, c) for c in (D, D, E)), torch.randn(H, M, D), output_final_state=True
    )[1]  # fmt: skip
    assert pool is not None
    q, k, v, y = torch.randn(B, G * H, D), torch.randn(B, H, D), torch.randn(B, H, E), torch.randn(H, M, D)
    rows = torch.tensor([31, -1], dtype=torch.int32)
    wide, sizes = pool.repeat_interleave(G, 1), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        o = SF.set_step(pool, q, k, v, y, state_indices=rows, backend="cpu")
    assert max(sizes) < pool.numel() // 4
    every = (t.repeat_interleave(G, 1) for t in (k, v))
    wanted = SF.set_step(wide, q, *every, y.repeat_interleave(G, 0), state_indices=rows, backend="cpu")
    torch.testing.assert_close((o, pool), (wanted, wide[:, ::G]))


@pytest.mark.parametrize("kernel", ["rbf", "dot"])
@pytest.mark.parametrize("absent", [False, True])
def test_a_step_of_groups_is_that_of_every_head(kernel: str, absent: bool, native: str) -> None:
    """With positions and gates, and where the token takes no part; bit for bit where a group is one step."""
    _, state = SF.set_causal(
        *(torch.randn(B, H, 20, c) for c in (D, D, E)), torch.randn(H, M, D), output_final_state=True, backend=native
    )  # fmt: skip
    assert state is not None
    q, k, v, y = torch.randn(B, G * H, D), torch.randn(B, H, D), torch.randn(B, H, E), torch.randn(H, M, D)
    places = {"query_position": torch.rand(B, 2), "key_position": torch.rand(B, 2)}
    gates, pi, options = -torch.rand(B, H), torch.rand(H, M, 2), {"kernel": kernel, "epsilon": 0.5, "backend": native}
    options["key_mask"] = torch.tensor([not absent, True])
    wide = state.repeat_interleave(G, 1)
    wanted = SF.set_step(
        wide, q, *(t.repeat_interleave(G, 1) for t in (k, v)), y.repeat_interleave(G, 0), **places, **options,
        log_decay=gates.repeat_interleave(G, 1), reference_position=pi.repeat_interleave(G, 0),
    )  # fmt: skip
    o = SF.set_step(state, q, k, v, y, log_decay=gates, reference_position=pi, **places, **options)
    exact = {"rtol": 0, "atol": 0} if native == "cpu" else {}
    torch.testing.assert_close((o, state), (wanted, wide[:, ::G]), **exact)


@pytest.mark.skipif(bool(cpu.ABSENT), reason=cpu.ABSENT)
def test_a_step_of_groups_is_one_call_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Counted:
        PreparedStep = cpu._C.PreparedStep  # of later tokens

        def step(self, *args: Any) -> None:
            taken.append(1)
            kernels.step(*args)

    kernels = cpu._C
    monkeypatch.setattr(cpu, "_C", Counted())
    monkeypatch.setattr(streaming, "_repeats", Repeats())
    q, k, v, y = torch.randn(B, G * H, D), torch.randn(B, H, D), torch.randn(B, H, E), torch.randn(H, M, D)
    SF.set_step(SF.empty_state(B, H, M, E), q, k, v, y, backend="cpu")
    assert taken == [1]


@pytest.mark.parametrize(("heads", "launches"), [(1, 1), (G, 1), (70, 2)])
def test_a_step_of_groups_is_one_launch_on_triton(heads: int, launches: int) -> None:
    """Of 64 queries that share a key; nothing is copied."""
    pytest.importorskip("triton")
    from setformer_kernels.backends.triton import face
    from setformer_kernels.backends.triton.host.launch import Device, recorded

    q, k, v = (torch.randn(B, H, n, c) for n, c in ((heads, D), (1, D), (1, E)))
    x, state = Operands(q, k, v, torch.randn(H, M, D), *[None] * 11), torch.randn(B, H, M, 2 * E + 3)
    with recorded(Device("sm_90", 132, "tf32x3")) as taken:
        o = face.step(x, Options(SCALARS, "rbf", 1), state, None, None)
    steps = [launch for launch in taken if launch.kernel.fn.__name__ == "causal_step_kernel"]
    assert len(steps) == launches
    assert all(any(t is state for t in launch.args) for launch in steps)
    assert o.shape == (B, H, heads, E)


@pytest.mark.parametrize("empty", ["B", "L", "S"])
def test_empty_groups(empty: str, native: str) -> None:
    b, length, s = (0 if name == empty else size for name, size in (("B", B), ("L", L), ("S", S)))
    q, k, v = torch.randn(b, G * H, length, D), torch.randn(b, H, s, D), torch.randn(b, H, s, E)
    o = SF.set_attention(q, k, v, torch.randn(H, M, D), backend=native)
    assert o.shape == (b, G * H, length, E)
    assert (o == 0).all() or empty == "B"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.zeros(B, 3, L, D)}, r"query must have H, a multiple of the 2 .*\[2, 3, 20, 16\]"),
        ({"query": torch.zeros(B, 1, L, D)}, r"query must have H, a multiple of the 2 heads of the key"),
        ({"references": torch.zeros(6, M, D)}, r"references must have shape \[2, \*, 16\] \(H and D of the key, not"),
        ({"epsilon": torch.ones(6)}, r"epsilon must be a float or a floating-point tensor \[H\] = \[2\]"),
        ({"reference_log_mass": torch.ones(6, M)}, r"reference_log_mass must have shape \[2, 5\]"),
        ({"value": torch.zeros(B, 6, S, E)}, r"value must have shape \[2, 2, 30, \*\]"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_groups(change: dict[str, Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SF.set_attention(**{k: v.detach() for k, v in grouped().items()} | change)
