"""Training on several ranks, step by step what one process does.  Cases of tests/test_distributed.py."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import setformer_kernels as sk
from setformer_kernels import functional, streaming
from setformer_kernels.models import CausalDecoder, CausalLM, SeTformer, TextEncoder, TextModel
from setformer_kernels.models.text import SequenceHead

BATCH, STEPS, SPLIT = 8, 3, 2  # of all ranks; optimizer steps; batches an optimizer step
OWN = {"learn_epsilon": True, "learn_log_mass": True, "num_iters": 1}


def image_model() -> nn.Module:
    sizes = (8, 8, 16, 16), (1, 1, 1, 1), (2, 2, 4, 4)
    return SeTformer(*sizes, num_references=6, num_classes=3, pool="set", attention=OWN)


def text_model() -> nn.Module:
    encoder = TextEncoder(50, 16, 2, 4, 32, num_references=6, dropout=0.0, attention={**OWN, "value_map": "rkhs"})
    return TextModel(encoder, SequenceHead(16, 3, 0.0))


def language_model() -> nn.Module:
    return CausalLM(CausalDecoder(50, 16, 2, 4, 32, num_references=6))


def inputs_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if isinstance(model, SeTformer):
        return torch.randn(BATCH, 3, 64, 64, generator=generator, dtype=next(model.parameters()).dtype)
    return torch.randint(50, (BATCH, 7), generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A mean over the batch."""
    y = model(x)
    return (y.float() if y.dtype == torch.bfloat16 else y).tanh().square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, ranks: int, original: nn.Module,
    accumulating: Callable[[bool], Any],
) -> Iterator[tuple[float, dict[str, Tensor]]]:  # fmt: skip
    """The clipped norm and the gradients of every step: STEPS of SPLIT batches, of which a rank has its part."""
    for step in range(STEPS):
        optimizer.zero_grad()
        whole = inputs_of(original, step)
        for i, x in enumerate(whole.chunk(SPLIT)):
            with accumulating(i + 1 < SPLIT):
                (loss_of(model, x.chunk(ranks)[rank]) / SPLIT).backward()
        norm = full(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
        yield float(norm), {name: full(grad) for name, grad in named if grad is not None}
        optimizer.step()


@contextmanager
def nothing(more: bool) -> Iterator[None]:
    yield


def agree(one: dict[str, Tensor], many: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == many.keys(), one.keys() ^ many.keys()
    largest = max(float(x.detach().norm()) for x in one.values())
    for name, x in one.items():
        x = x.detach()
        error = float((x - many[name].detach()).norm())
        assert error <= tolerance * (float(x.norm()) + 1e-3 * largest), (name, error)


def check(one: nn.Module, many: nn.Module, ranks: int, rank: int, accumulating: Any, tolerance: float = 1e-9) -> None:
    """Norms, gradients, references' among them, and parameters, of both."""
    optimizers = optimizer_of(one), optimizer_of(many)
    runs = train(one, optimizers[0], 0, 1, one, nothing), train(many, optimizers[1], rank, ranks, one, accumulating)
    for (norm, gradients), (found_norm, found) in zip(*runs, strict=True):
        assert any(name.endswith("references") for name in gradients)
        assert abs(norm - found_norm) <= tolerance * norm
        agree(gradients, found, tolerance)
    state = {name.removeprefix("module."): full(p.detach()) for name, p in many.named_parameters()}
    agree({name: p.detach() for name, p in one.named_parameters()}, state, tolerance)


MODELS = (image_model, text_model, language_model)


def case_ddp() -> None:
    for make in MODELS:
        one = make().double()
        many = DistributedDataParallel(copy.deepcopy(one))

        def accumulating(more: bool, many: Any = many) -> Any:
            return many.no_sync() if more else nothing(more)

        check(one, many, dist.get_world_size(), dist.get_rank(), accumulating)


def waiting(model: Any) -> Callable[[bool], Any]:
    """FSDP2's no_sync."""

    @contextmanager
    def accumulating(more: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(not more)
        yield

    return accumulating


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


# None, and one that changes no dtype, but where references lie.
POLICIES = (None, MixedPrecisionPolicy(torch.float64))


def case_fsdp() -> None:
    kept = POLICIES[1]
    for make, policy in ((image_model, None), (text_model, None), (text_model, kept), (language_model, kept)):
        one = make().double()
        many = sk.distributed.fully_shard(copy.deepcopy(one), mesh=mesh_of_all(), mp_policy=policy)
        check(one, many, dist.get_world_size(), dist.get_rank(), waiting(many))


def case_fsdp_keeps_references_in_float32() -> None:
    for make in MODELS:
        one = make()
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        many = sk.distributed.fully_shard(copy.deepcopy(one), mesh=mesh_of_all(), mp_policy=policy)
        with recorded() as seen:
            runs = [
                next(train(m, optimizer_of(m), rank, ranks, one, nothing))
                for m, rank, ranks in ((many, dist.get_rank(), dist.get_world_size()), (one, 0, 1))
            ]
        assert seen["key"] == {torch.float32, torch.bfloat16}  # of one process, and of FSDP
        for name in ("references", "epsilon", "reference_log_mass", "key_position", "position_scale"):
            assert seen.get(name, {torch.float32}) == {torch.float32}, (name, seen)
        for part in ("", "references"):
            found, wanted = (torch.cat([g.flatten() for n, g in run[1].items() if n.endswith(part)]) for run in runs)
            assert (found - wanted).norm() <= 0.1 * wanted.norm(), (make, part)


@contextmanager
def recorded() -> Iterator[dict[str, set[torch.dtype]]]:
    """Notes the dtypes of what attention is called with."""
    seen: dict[str, set[torch.dtype]] = {}
    normalise = functional.normalise

    def noting(*args: Any, **kwargs: Any) -> Any:
        names = ("query", "key", "value", "references", None, "key_mask", "reference_log_mass", "query_position",
                 "key_position", "reference_position")  # fmt: skip
        given = dict(zip(names, args, strict=False))
        given |= dict(zip(("bandwidth", "epsilon", "_", "_", "position_scale"), args[4], strict=True))
        for name, value in given.items():
            if name is not None and isinstance(value, Tensor):
                seen.setdefault(name, set()).add(value.dtype)
        return normalise(*args, **kwargs)

    for module in (functional, streaming):
        module.normalise = noting  # type: ignore[attr-defined]
    try:
        yield seen
    finally:
        for module in (functional, streaming):
            module.normalise = normalise  # type: ignore[attr-defined]


def with_heads_apart(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {name: sk.distributed.SeTParallel() for name, m in model.named_modules() if hasattr(m, "of_heads")}
    return parallelize_module(copy.deepcopy(model), mesh, plan)


def shared_folder() -> Path:
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made, src=0)
    return Path(made[0])


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, alone: bool = False) -> None:
    state, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as was asked for
        dcp.save({"model": state, "optimizer": moments}, checkpoint_id=str(path), no_dist=alone)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, alone: bool = False) -> None:
    state, moments = get_state_dict(model, optimizer)
    held = {"model": state, "optimizer": moments}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as was asked for
        dcp.load(held, checkpoint_id=str(path), no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int = 0, ranks: int = 1) -> None:
    optimizer.zero_grad()
    loss_of(model, inputs_of(model, step).chunk(ranks)[rank]).backward()
    optimizer.step()


def case_checkpoints_of_n_ranks_load_on_m() -> None:
    rank, ranks, path = dist.get_rank(), dist.get_world_size(), shared_folder()
    many = sk.distributed.fully_shard(text_model().double(), mesh=mesh_of_all())
    optimizer = optimizer_of(many)
    a_step(many, optimizer, 0, rank, ranks)
    save(many, optimizer, path / "many")
    torch.manual_seed(7)
    one = text_model().double()  # other weights; each process is one by itself
    alone = optimizer_of(one)
    load(one, alone, path / "many", alone=True)
    a_step(many, optimizer, 1, rank, ranks)
    a_step(one, alone, 1)
    agree(dict(one.named_parameters()), {n: full(p) for n, p in many.named_parameters()}, 1e-9)
    if rank == 0:
        save(one, alone, path / "one", alone=True)
    dist.barrier()
    again = sk.distributed.fully_shard(text_model().double(), mesh=mesh_of_all())
    optimizer = optimizer_of(again)
    load(again, optimizer, path / "one")
    a_step(again, optimizer, 2, rank, ranks)
    a_step(one, alone, 2)
    agree(dict(one.named_parameters()), {n: full(p) for n, p in again.named_parameters()}, 1e-9)


def case_checkpoints_of_heads_load_on_fewer_ranks() -> None:
    path, model = shared_folder(), text_model().double()
    many = with_heads_apart(model, mesh_of_all())
    optimizer = optimizer_of(many)
    a_step(many, optimizer, 0)
    save(many, optimizer, path)
    torch.manual_seed(7)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    one = with_heads_apart(text_model().double(), mesh["tp"])  # a mesh of one rank
    alone = optimizer_of(one)
    load(one, alone, path)
    a_step(many, optimizer, 1)
    a_step(one, alone, 1)
    agree(sk.distributed.full_state_dict(one), sk.distributed.full_state_dict(many), 1e-9)
