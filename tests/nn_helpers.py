"""Twins, inputs and an independent evaluation of the definition, for the module tests."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from setformer_kernels.nn import SeTAttention

E, H, M = 16, 4, 5  # embed_dim, heads, references: D = 4
B, L, S = 3, 6, 7

# every combination of the constructor flags that changes a code path of forward
CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 10, "vdim": 12},
    {"kdim": 10, "vdim": 12, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
]


def twins(seed: int = 0, own: dict[str, Any] | None = None, **torch_arguments: Any) -> tuple[SeTAttention, nn.Module]:
    """SeTAttention and nn.MultiheadAttention built from the same arguments and seed."""
    torch.manual_seed(seed)
    ours = SeTAttention(E, H, **torch_arguments, **({"num_references": M} | (own or {})))
    torch.manual_seed(seed)
    return ours, nn.MultiheadAttention(E, H, **torch_arguments)


def tokens(
    module: nn.Module, batched: bool = True, sizes: tuple[int, int, int] = (B, L, S), dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value in the layout and widths of module."""
    b, l, s = sizes

    def draw(n: int, width: int) -> Tensor:
        if not batched:
            return torch.randn(n, width, dtype=dtype)
        return torch.randn(*((b, n) if module.batch_first else (n, b)), width, dtype=dtype)

    return draw(l, module.embed_dim), draw(s, module.kdim), draw(s, module.vdim)


def slots(module: nn.Module) -> int:
    """Key columns that add_bias_kv and add_zero_attn append."""
    return (module.bias_k is not None) + module.add_zero_attn


def trainable(module: nn.Module) -> nn.Module:
    """The module in float64 with every parameter random: zero biases hide mistakes."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "scale" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5 if parameter.dim() < 2 else parameter)
    return module


def swap(model: nn.Module, **own: Any) -> nn.Module:
    """A copy of model with every nn.MultiheadAttention replaced by a SeTAttention of the same weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, like(child, **own))
    return model


def like(mha: nn.MultiheadAttention, **own: Any) -> SeTAttention:
    """A SeTAttention with the arguments, weights and mode of mha."""
    ours = SeTAttention(
        mha.embed_dim,
        mha.num_heads,
        mha.dropout,
        mha.in_proj_bias is not None,
        mha.bias_k is not None,
        mha.add_zero_attn,
        mha.kdim,
        mha.vdim,
        mha.batch_first,
        **({"num_references": M} | own),
    )
    assert not ours.load_state_dict(mha.state_dict(), strict=False).unexpected_keys
    return ours.train(mha.training)


def additive(mask: Tensor | None) -> Tensor | None:
    """torch's masks as additive log masses in float64."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


def definition(
    module: SeTAttention, query: Tensor, key: Tensor, value: Tensor, log_mass: Tensor
) -> tuple[Tensor, Tensor]:
    """(output [L, E], A [H, L, S']) of one batch element in float64, query by query from the definition.

    query [L, E], key [S, kdim], value [S, vdim]; log_mass [H, L, S'] the additive masks, S' with the appended slots.
    """
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    biases = (0.0,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None:
        k, v = torch.cat([k, module.bias_k[0]]), torch.cat([v, module.bias_v[0]])
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, E)]) for x in (k, v))
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(0, 1) for x in (q, k, v))  # [H, N, D]

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-300)

    A = torch.zeros(H, q.shape[1], k.shape[1], dtype=q.dtype)
    for h, i in itertools.product(range(H), range(q.shape[1])):
        y = unit(module.references[h])
        l_k, l_q = (
            (torch.exp(module.bandwidth * (unit(x) @ y.T - 1)) - 1) / module.epsilon for x in (k[h], q[h, i : i + 1])
        )
        log_a, log_b = log_mass[h, i].log_softmax(0), torch.full((len(y),), 1 / len(y), dtype=q.dtype).log()
        if log_mass[h, i].max() == -torch.inf:
            continue
        f, g = log_a, log_b
        c = torch.logsumexp(l_k + f[:, None], 0)
        for _ in range(module.num_iters):
            f = log_a - module.key_relaxation * torch.logsumexp(l_k + g, 1)
            c = torch.logsumexp(l_k + f[:, None], 0)
            g = log_b - module.reference_relaxation * c
        A[h, i] = torch.softmax(l_q + g, 1) @ torch.exp(l_k + f[:, None] - c).T
    o = (A @ v).transpose(0, 1).flatten(1)
    return module.out_proj(o), A
