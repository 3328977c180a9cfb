"""The calls that the tables, their short form and the front end's check cover; see `workloads` for what a call is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.compiled.gpus import AMD
from benchmarks.compiled.workloads import OPTIONAL, STREAM, Call
from setformer_kernels.problem import HYPER

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


def _both(call: Call) -> Iterator[Call]:
    yield call
    yield replace(call, backward=True)


def _sizes(dtype: torch.dtype) -> Iterator[Call]:
    """Every op at the sizes that a model has; T = 3 launches the kernels of every T but 0 and 1."""
    mixed = ((128, 64), (64, 128)) if dtype.itemsize == 2 else ()
    for D, M in ((64, 64), (128, 128), *mixed):
        base = Call("attention", dtype=dtype, D=D, E=D, M=M)
        for call in (base, replace(base, op="causal", T=1), replace(base, op="features")):
            yield from _both(call)
        yield replace(base, op="step", T=1)


def _options(dtype: torch.dtype) -> Iterator[Call]:
    """Every option at one size."""
    base = Call("attention", dtype=dtype)
    rich = replace(base, rich=True)
    for call in (replace(base, T=1), replace(base, T=0), replace(base, kernel="dot"), replace(base, op="pool"), rich):
        yield from _both(call)
    for call in (replace(base, op="packed", B=2), replace(rich, op="packed", B=2)):
        yield from _both(call)
    for op in ("causal", "packed_causal"):
        yield from _both(replace(base, op=op, T=1, given=STREAM))
    yield from _both(replace(base, op="packed_causal", T=1, B=2))
    for given in (None, STREAM):
        yield from _both(replace(base, op="causal", T=1, H=2, given=given))  # few heads: bundles go side by side
    yield replace(rich, op="step", T=1)
    yield replace(base, op="step", T=1, G=4)
    yield from _both(replace(base, op="read"))
    features = replace(rich, op="features")
    for call in (replace(rich, op="causal", T=1), features, replace(features, center=True)):
        yield from _both(call)


def _largest(dtype: torch.dtype) -> Iterator[Call]:
    """Positions and gates in half precision, where a thread has the most to hold."""
    base = Call("attention", dtype=dtype, D=128, E=128, M=128, given=("position",))
    for op in ("attention", "read", "packed"):
        yield from _both(replace(base, op=op, B=2 if op == "packed" else 1))
    for given in (("position",), STREAM):
        yield from _both(replace(base, op="causal", T=1, given=given))


def _masked(dtype: torch.dtype) -> Iterator[Call]:
    """Masks of every query: both kinds of walks at one size, the longer one at larger sizes in half precision."""
    base = Call("masked", dtype=dtype, mask="float")
    yield from _both(replace(base, T=1, mask="causal"))
    placed = replace(base, given=("position",))
    for call in (replace(base, rich=True), placed):
        yield from _both(call)
    if dtype.itemsize == 2:
        yield from _both(replace(base, D=128, E=128))
        yield from _both(replace(base, D=128, E=128, M=128))
        for D, M in ((128, 64), (64, 128), (128, 128)):
            yield from _both(replace(placed, D=D, E=D, M=M))
        yield from _both(replace(base, D=128, E=128, M=128, rich=True))


def _converged(dtype: torch.dtype) -> Iterator[Call]:
    """Transport to convergence: of keys at the sizes that a model has and the largest, and of costs as many columns."""
    for D, M in ((64, 64), (128, 128), (64, 256)):
        yield Call("linearised", dtype=dtype, D=D, E=D, M=M)
        yield Call("iterated", dtype=dtype, D=D, E=D, M=M)
    yield Call("linearised", dtype=dtype, rich=True)
    yield Call("iterated", dtype=dtype, rich=True)
    if dtype == torch.float32:
        for columns in (64, 128, 256):
            yield Call("linearised_costs", dtype=dtype, M=columns)
        for rows in (64, 4096):
            yield Call("started", dtype=dtype, T=20, L=rows, rich=True)


def table_calls(family: str) -> list[Call]:
    """What the committed resource table covers: of AMD GPUs every kernel, without the options."""
    if family in AMD:
        return list(_amd_calls(family))
    parts = (_sizes, _options, _masked, _converged)
    found = [call for dtype in DTYPES for part in parts for call in part(dtype)]
    found += [call for dtype in HALVES for call in _largest(dtype)]
    for rows, columns in ((64, 64), (256, 256), (4096, 64), (4096, 1024)):
        found += _both(Call("sinkhorn", T=20, dtype=torch.float32, L=rows, M=columns))
    found += _both(Call("sinkhorn", T=20, dtype=torch.float32, L=256, M=64, rich=True))
    return found


def _amd_calls(family: str) -> Iterator[Call]:
    """Every kernel; on the newer architecture in float32 and at the larger size too."""
    half, single = Call("attention"), Call("attention", dtype=torch.float32)
    for base in (half, single, replace(half, D=128, E=128, M=128)) if family == "gfx942" else (half,):
        for call in (base, replace(base, op="causal", T=1), replace(base, op="features")):
            yield from _both(call)
        yield from _both(replace(base, op="causal", T=1, given=STREAM))
        yield replace(base, op="step", T=1)
    yield replace(single, backward=True, given=("position",))
    yield from _both(replace(half, op="masked", mask="float", rich=True))
    yield from _both(replace(half, op="packed_causal", T=1, B=2))
    for base in (half, single) if family == "gfx942" else (half,):
        yield from (replace(base, op=op) for op in ("linearised", "iterated"))
    yield Call("linearised_costs", dtype=torch.float32)
    for rows in (64, 4096):
        yield from _both(Call("sinkhorn", T=20, dtype=torch.float32, L=rows))


def _every_operand(base: Call) -> Iterator[Call]:
    """A call with everything, without one thing, with one thing alone, and for one gradient alone."""
    yield from _both(base)
    yield from _both(replace(base, rich=True))
    for name in OPTIONAL:
        yield from _both(replace(base, given=(name,)))
        yield from _both(replace(base, given=tuple(other for other in OPTIONAL if other != name)))
    for name in ("query", "key", "value", "references", "log_a", "log_b", *HYPER, "reference_position"):
        yield replace(base, backward=True, rich=True, wanted=name)
    for name in ("query", "key", "value", "references"):
        yield replace(base, backward=True, wanted=name)


def _every_mask(base: Call) -> Iterator[Call]:
    """Calls under masks of every kind, and with one operand alone; few of each, as these kernels are the longest."""
    for mask in ("float", "bool", "causal"):
        for rich in (False, True):
            yield from _both(replace(base, mask=mask, rich=rich))
    for name in OPTIONAL:
        yield from _both(replace(base, given=(name,)))
    for name in ("query", "key", "value", "references", "mask"):
        yield replace(base, backward=True, rich=True, mask="float", wanted=name)
    for call in (replace(base, T=1), replace(base, T=0), replace(base, kernel="dot")):
        yield from _both(call)


def every_operand() -> Iterator[Call]:
    """Every kernel, with each operand that may be absent absent and present, alone and among the others."""
    base = Call("attention", B=2, D=16, E=16, M=16, L=1024)
    attention = (base, replace(base, op="pool"), replace(base, op="read"), replace(base, op="packed"))
    for call in (replace(base, op="causal", T=1), *attention):
        yield from _every_operand(call)
    yield from _both(replace(base, op="packed_pool"))
    for rich in (False, True):
        yield from _both(replace(base, op="packed_causal", T=1, rich=rich))
    for call in (replace(base, T=1), replace(base, T=0), replace(base, op="causal", T=0), replace(base, kernel="dot")):
        yield from _both(call)
    settled = replace(base, backward=True, dtype=torch.float32, given=("position",))
    dot, rich = replace(settled, kernel="dot"), replace(settled, rich=True, given=None)
    for call in (settled, replace(settled, T=0), dot, rich):
        yield from (call, replace(call, op="packed"))
    step = replace(base, op="step", T=1)
    for given in ((), STREAM[:1], STREAM[1:], STREAM):
        yield from _both(replace(base, op="causal", T=1, given=given))
        yield from _both(replace(base, op="packed_causal", T=1, given=given))
        yield from _both(replace(base, op="causal", T=1, B=1, H=1, L=8192, given=given))  # bundles side by side
        yield replace(step, given=(*given, "log_a"))
    yield from (step, replace(step, rich=True), replace(step, G=4), replace(step, rich=True, G=4))
    yield from _every_mask(replace(base, op="masked"))
    features = replace(base, op="features")
    for call in (features, replace(features, rich=True), replace(features, center=True)):
        yield from _both(call)
        for name in ("key", "references", "bandwidth"):
            yield replace(call, backward=True, wanted=name)
    for op in ("linearised", "iterated"):
        converged = replace(base, op=op)
        for call in (converged, replace(converged, rich=True), replace(converged, kernel="dot")):
            yield call
        for name in ("log_a", "position"):
            yield replace(converged, given=(name,))
            yield replace(converged, given=tuple(other for other in OPTIONAL if other != name))
    for rich in (False, True):
        yield Call("linearised_costs", dtype=torch.float32, L=1024, M=16, rich=rich)
        for rows in (64, 1024):
            yield Call("started", dtype=torch.float32, L=rows, M=64, rich=rich)
    for rows in (64, 1024):
        yield from _every_operand(Call("sinkhorn", dtype=torch.float32, L=rows, M=64))


def few_calls(family: str) -> list[Call]:
    """A set small enough for every test run: attention at the design's size, more of it where it compiles fastest."""
    found = list(_both(Call("attention")))
    if family == "sm_80":
        found.append(Call("attention", dtype=torch.float32))
    if family == "sm_90":
        found += _both(Call("causal", T=1))
    elif family not in AMD:  # each op compiles somewhere
        found += _both(Call("features") if family == "sm_80" else Call("sinkhorn", T=20, dtype=torch.float32, L=64))
    return found if family != "gfx90a" else []
