"""Shared fixtures: the backends that can run here, a seed for each test, NaN in memory that torch.empty hands out.

With a GPU, tests of a GPU backend run on it; without one, Triton's kernels run on the interpreter, on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, for `poisoned_memory`

import selection

from setformer_kernels import advice, dispatch

advice.enabled = False  # tests/test_advice.py has it on; elsewhere a slow path is what is tested
NATIVE = tuple(name for name in dispatch.NATIVE if name != "cuda")  # it has part of the ops, and tests of its own
GPU_BACKENDS = ("triton",)
# Written in float64, which GPU backends do not have.
FLOAT64_TESTS = (
    "test_vmap_and_vmap_of_grad", "test_vmap_of_pool_features_and_sinkhorn", "test_vmap_with_dropout",
    "test_double_backward_is_refused_never_zero", "test_forward_mode_is_refused_never_zero",
    "test_gates_are_masses_that_depend_on_the_query", "test_pieces_and_steps_equal_one_call",
    "test_gradients_pass_from_piece_to_piece", "test_gradcheck_with_a_state_and_gates",
    "test_dropout_is_the_same_on_every_backend_and_in_the_weights", "test_no_random_number_is_drawn_without_dropout",
    "test_a_mask_that_bans_nothing_equals_no_mask", "test_causal_counts_from_the_last_query_and_key",
    "test_masks_in_every_form", "test_a_query_does_not_depend_on_keys_it_may_not_see",
)  # fmt: skip
# Minutes long on Triton's interpreter, for which test_triton_masked.py has smaller problems.
LONG_INTERPRETED = (
    "test_masked_output_and_every_gradient_within_the_error_budget",
    "test_masked_small_gradients_within_the_error_budget",
    "test_masked_results_repeat_bit_for_bit_on_any_number_of_threads", "test_masks_of_any_size_stay_exact",
)  # fmt: skip

# What a machine with nothing but torch, triton, numpy and pytest (`make gpu`) leaves out, and what only `make
# test-models` has.
NEEDS = {
    "test_docs.py": "sybil", "models/test_docs_extras.py": "transformers",
    "test_fuzz.py": "hypothesis", "test_cuda_fuzz.py": "hypothesis", "test_centring.py": "scipy",
    "test_demo_parts.py": "sklearn", "test_benchmarks_quality.py": "sklearn", "test_benchmarks_long.py": "matplotlib",
    "models/test_heads.py": "transformers", "models/test_recipes.py": "transformers",
    "models/test_recipe_detect.py": "transformers", "models/test_timm.py": "timm", "models/test_onnx.py": "onnxruntime",
    "models/test_recipe_input.py": "transformers", "models/test_ranks.py": "transformers",
    "models/test_transformers.py": "transformers", "models/test_transformers_arguments.py": "transformers",
    "models/test_conversion.py": "transformers", "models/test_pipelines.py": "transformers",
    "models/test_generation.py": "transformers", "models/test_recipe_lm.py": "transformers",
    "models/test_any_model.py": "transformers", "models/test_any_model_saved.py": "transformers",
    "models/test_convert.py": "transformers", "models/test_recipe_convert.py": "transformers",
    "models/test_convert_recording.py": "transformers", "models/test_ranks_convert.py": "transformers",
    "models/test_benchmarks_transfer.py": "transformers", "models/test_state_cache.py": "transformers",
    "models/test_benchmarks_transfer_images.py": "transformers",
}  # fmt: skip
collect_ignore = [file for file, module in NEEDS.items() if importlib.util.find_spec(module) is None]


EXHAUSTIVE = "exhaustive"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What is about to run, and how long that takes."""
    took = {f"not {EXHAUSTIVE}": selection.MINUTES, EXHAUSTIVE: selection.MINUTES_REST}.get(config.option.markexpr)
    if took is None:
        return []
    what = (
        "the cases and tools"
        if config.option.markexpr == EXHAUSTIVE
        else "every op on every backend, the module's contract"
    )
    rest = "that `make test` leaves out" if config.option.markexpr == EXHAUSTIVE else "(`make test-all` runs all cases)"
    told = [f"{what} {rest}: some {took} minutes on two quiet cores, one thread a process"]
    if selection.share().of > 1:
        told.append(
            f"{selection.SHARE}={selection.share()}: of the products on stand-ins this share alone, which is faster"
        )
    return told


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = selection.share()
    if left := [item for item in items if not here.has(item)]:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if here.has(item)]
    for item in items:
        if selection.is_exhaustive(item):
            item.add_marker(EXHAUSTIVE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How to run again what failed in a share, which the next run need not have."""
    if selection.share().of > 1:
        for report in terminalreporter.getreports("failed") + terminalreporter.getreports("error"):
            terminalreporter.write_line(f"again: python -m pytest '{report.nodeid}'")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin are filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def device_of(backend: str) -> str:
    """Where tests of a backend put their tensors."""
    on_gpu = backend in GPU_BACKENDS and torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return "cuda" if on_gpu else "cpu"


@pytest.fixture(params=[*NATIVE, "eager"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend behind the ops that can run here; "eager" stands in for a native one.

    New tensors are on the backend's device; a test with a parameter `dtype` is skipped where the backend has none, and
    one of a file that names its `OP` where the backend has no such op.
    """
    if request.param == "eager":
        stand_in = ModuleType("eager_stand_in")
        stand_in.__dict__.update(vars(dispatch.EAGER))
        stand_in.__dict__.update(ABSENT="", unsupported_reasons=lambda problem: [])
        monkeypatch.setattr(dispatch, "NATIVE", {"eager": stand_in})
        yield "eager"
        return
    callspec = getattr(request.node, "callspec", None)
    if request.param in GPU_BACKENDS and getattr(request.node, "originalname", "") in FLOAT64_TESTS:
        pytest.skip("in float64")
    interpreted = request.param in GPU_BACKENDS and device_of(request.param) == "cpu"
    if interpreted and getattr(request.node, "originalname", "") in LONG_INTERPRETED:
        pytest.skip("test_triton_masked.py has smaller problems for the interpreter")
    device, dtype = device_of(request.param), callspec.params.get("dtype", torch.float32) if callspec else torch.float32
    problem = replace(dispatch.typical_problem(device), dtype=dtype, op=getattr(request.module, "OP", "attention"))
    if reasons := dispatch.available_backends(problem)[request.param]:
        pytest.skip("; ".join(reasons))
    with torch.device(device):
        yield request.param


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 digits as an ImageFolder tree, for the recipes."""
    from setformer_kernels.recipes.samples import write_digits

    folder = tmp_path_factory.mktemp("few")
    write_digits(folder, 96)
    return folder
