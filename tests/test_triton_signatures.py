"""What every kernel of the Triton backend and every function of the package keeps to: names, parameters, lengths."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.compiled import workloads
from benchmarks.compiled.workloads import Call

pytest.importorskip("triton")
PACKAGE = Path(__file__).resolve().parents[1] / "setformer_kernels"
BACKEND = PACKAGE / "backends" / "triton"
MOST_PARAMETERS = 40
MOST_LINES = 100
OPS = (
    *("attention", "pool", "packed", "packed_pool", "packed_causal", "causal", "step", "masked", "features"),
    "sinkhorn",
)


def functions(folder: Path) -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def on_device(decorator: str) -> list[ast.FunctionDef]:
    """The kernels ("kernel") or the functions that they call ("triton.jit")."""
    return [f for _, f in functions(BACKEND) if decorator in [ast.unparse(d) for d in f.decorator_list]]


def parameters(function: ast.FunctionDef) -> int:
    a = function.args
    return len(a.posonlyargs + a.args + a.kwonlyargs)


def test_no_function_takes_more_parameters_than_one_can_read() -> None:
    found = {f"{path.name}:{f.name}": parameters(f) for path, f in functions(PACKAGE)}
    assert len(found) > 400
    assert {name: n for name, n in found.items() if n > MOST_PARAMETERS} == {}


def test_kernels_have_names_of_their_own() -> None:
    kernels = [f.name for f in on_device("kernel")]
    assert len(kernels) > 25
    assert all(name.endswith("_kernel") for name in kernels)
    public = [name for name in kernels + [f.name for f in on_device("triton.jit")] if not name.startswith("_")]
    assert [name for name, times in Counter(public).items() if times > 1] == []


@pytest.mark.parametrize("path", sorted(BACKEND.glob("*/forward.py")), ids=lambda path: path.parent.name)
def test_a_forward_door_names_the_functions_that_define_it(path: Path) -> None:
    named = re.findall(
        r"`reference\.(\w+)\.(\w+)`", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    )
    assert named
    assert all(hasattr(import_module(f"setformer_kernels.reference.{module}"), name) for module, name in named)


def test_device_functions_fit_on_a_page() -> None:
    for f in on_device("kernel") + on_device("triton.jit"):
        assert f.end_lineno is not None
        assert f.end_lineno - f.lineno < MOST_LINES, f.name


def unspecialised(kernel: Any) -> set[str]:
    if hasattr(kernel, "params"):
        return {p.name for p in kernel.params if p.do_not_specialize}
    return set(kernel.kwargs["do_not_specialize"])  # on the interpreter


def launches() -> Iterator[Any]:
    for op in OPS:
        dtype = torch.float32 if op == "sinkhorn" else torch.bfloat16
        T = 1 if op in ("causal", "packed_causal", "step") else 3
        for rich in (False, True):
            call = Call(op, T=T, B=2, L=1024, dtype=dtype, rich=rich, mask="float")
            for one in (call, replace(call, backward=True)):
                yield from workloads.launches(one, "sm_90")
    for backward, L in itertools.product((False, True), (1024, 16384)):  # the second with bundles side by side
        call = Call("causal", backward, T=1, H=2, L=L, given=workloads.STREAM)
        yield from workloads.launches(call, "sm_90")
    for op in ("linearised", "iterated", "linearised_costs", "started"):
        for rich in (False, True):
            dtype = torch.float32 if op in ("linearised_costs", "started") else torch.bfloat16
            yield from workloads.launches(Call(op, B=2, L=1024, dtype=dtype, rich=rich), "sm_90")
    yield from workloads.launches(Call("attention", True, dtype=torch.float32, L=1024, rich=True), "sm_90")
    for backward in (False, True):  # what stays in registers
        yield from workloads.launches(Call("sinkhorn", backward, L=64, dtype=torch.float32), "sm_90")


def test_no_kernel_is_compiled_for_a_stride_or_a_count() -> None:
    seen = set()
    for launch in launches():
        names = list(launch.kernel.arg_names)
        counts = {name for name, value in zip(names, launch.args, strict=False) if isinstance(value, int)}
        assert counts - unspecialised(launch.kernel) == set(), launch.kernel
        # A member of a group would be specialised on.
        members = [value for group in launch.args if isinstance(group, tuple) for value in group]
        assert all(value is None or isinstance(value, (torch.Tensor, float)) for value in members), launch.kernel
        seen.add(launch.kernel.fn.__name__)
    assert seen == {f.name for f in on_device("kernel")}
