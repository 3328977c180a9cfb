"""Graphs for any length: exported with the native ops, decomposed into PyTorch operations, or of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import ARGUMENTS, CALLS, OPS, tokens
from torch import Tensor, nn

import setformer_kernels.functional as SF
from setformer_kernels.backends import eager

LENGTHS = {"set_attention": (0, 1, 2, 4, 11, 12), "set_pool": (1, 2, 4, 12), "set_causal": (0, 1, 2, 4, 11, 12)}
LENGTHS |= {"set_masked": LENGTHS["set_causal"], "set_attention_weights": LENGTHS["set_attention"]}
LENGTHS |= {"nystrom_features": (0,), "sinkhorn": (0, 1)}
# Those of packed batches stay ops: decomposed they would be a loop over segments, whose number and ends are data.
DECOMPOSED = [name for name in ARGUMENTS if not name.endswith("_varlen")]


class OpModule(nn.Module):
    """An op on its tensors; what is no tensor is fixed."""

    def __init__(self, name: str, arguments: list[Any]) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        return getattr(OPS, self.name)(*(next(given) if isinstance(a, Tensor) else a for a in self.arguments))


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    return [a.detach() for a in arguments if isinstance(a, Tensor)]


def arguments_of(name: str) -> list[Any]:
    """Those of the op's other tests; of a mask's op without the mask, whose lengths are two, and no scan from a state,
    which is a loop over the length."""
    given = ARGUMENTS[name]()
    if name == "set_causal":
        return [*given[:15], None, None, *given[17:-1], False]
    return given if name != "set_masked" else [*given[:15], None, *given[16:]]


def cut(name: str, arguments: list[Any], length: int) -> list[Any]:
    """The arguments with fewer tokens."""
    at = 1 if name == "sinkhorn" else 2
    return [a.narrow(at, 0, length) if i in LENGTHS[name] else a for i, a in enumerate(arguments)]


def exported(name: str, arguments: list[Any]) -> torch.export.ExportedProgram:
    at, n = 1 if name == "sinkhorn" else 2, torch.export.Dim.DYNAMIC
    hints = tuple({at: n} if i in LENGTHS[name] else None for i, a in enumerate(arguments) if isinstance(a, Tensor))
    return torch.export.export(
        OpModule(name, arguments), tuple(tensors_of(arguments)), dynamic_shapes={"tensors": hints}
    )


def targets(program: torch.export.ExportedProgram) -> set[Any]:
    return {node.target for node in program.graph.nodes}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # torch copies its own graph
@pytest.mark.parametrize("name", DECOMPOSED)
def test_decompositions_are_the_op_at_every_length(name: str) -> None:
    arguments, op = arguments_of(name), getattr(OPS, name).default
    program = exported(name, arguments)
    assert op in targets(program.run_decompositions())
    decomposed = program.run_decompositions({op: torch._decomp.decomposition_table[op]})
    assert op not in targets(decomposed)
    for length in (2, 5):
        shorter = cut(name, arguments, length)
        found, wanted = decomposed.module()(*tensors_of(shorter)), op(*shorter)
        torch.testing.assert_close(found, wanted, check_stride=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DECOMPOSED)
def test_inductor_calls_the_op_where_the_environment_has_ci(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CI is set, it would refuse ops that it does not lower and that have a decomposition."""
    monkeypatch.setenv("CI", "true")
    torch.compiler.reset()  # one code object for all names
    arguments = arguments_of(name)
    module, tensors = OpModule(name, arguments), tensors_of(arguments)
    with torch._inductor.config.patch(fx_graph_cache=False):
        found = torch.compile(module, fullgraph=True, dynamic=dynamic)(*tensors)
    torch.testing.assert_close(found, module(*tensors), check_stride=True)


def test_unknown_lengths_take_the_fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(eager, "attention")  # the decomposition
    arguments = ARGUMENTS["set_attention"]()
    assert OPS.set_attention.default in targets(exported("set_attention", arguments))


@pytest.mark.parametrize("call", ["causal", "masked", "unbounded"])
def test_the_reference_exports_for_any_length(call: str) -> None:
    """Traced at two chunks of the scan, run at one and at three."""
    unbounded = {"causal": True, "num_iters": 2, "kernel": "dot", "epsilon": 1.0}
    options = {**CALLS, "unbounded": unbounded}[call]

    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
            return SF.set_attention(q, k, v, y, backend="reference", **options)

    inputs = [t.detach() for t in tokens(torch.float64, 40, 40)]
    shapes = {name: {2: torch.export.Dim.DYNAMIC} for name in "qkv"} | {"y": None}
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes, strict=False)
    for n in (9, 70):
        other = [t.detach() for t in tokens(torch.float64, n, n)]
        torch.testing.assert_close(program.module()(*other), Module()(*other))
