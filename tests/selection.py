"""What `make test` leaves to `make test-all`: whatever shows again, at length, what a test that stays has shown.

Left out are the tests of models (which `make test-models` runs too), benchmarks, installation, commands and pages; what
is marked slow; and, of the products of cases, dtypes and sizes, all but a few on the stand-ins for a GPU (Triton's
interpreter, the CUDA kernels' source on fibers), where a tensor operation takes 0.1 ms, and on `eager`, which is the
reference behind the ops.

With SETFORMER_KERNELS_TEST_SHARE=k/n only the k-th of n shares of what runs on stand-ins at length runs, and all else:
CI takes another share for another commit, so that every case has its turn, and all once a week. The share of a case
depends on its id alone. `make test-all` runs all.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import NamedTuple

import pytest

# make test and the rest of make test-all, on two quiet cores: of the rest what is in every share takes 392 s, and the
# cases of one share of eight 154 s.
MINUTES, MINUTES_REST = 5, 27
SHARE = "SETFORMER_KERNELS_TEST_SHARE"

FILES = {
    "test_benchmarks_language.py", "test_benchmarks_long.py", "test_benchmarks_model.py", "test_benchmarks_peers.py",
    "test_benchmarks_quality.py", "test_benchmarks_run.py",
    "test_benchmarks_scale.py",
    "test_cuda_fuzz.py",
    "test_cuda_resources.py", "test_demo_parts.py", "test_docs.py", "test_entry_points.py", "test_gpu_command.py",
    "test_install_build.py", "test_install_rebuild.py", "test_triton_causal.py", "test_triton_features.py",
    "test_triton_memory.py", "test_triton_resources.py", "test_triton_sinkhorn.py",
}  # fmt: skip
# Of them, those whose every case runs on a stand-in.
ON_STAND_INS = {
    "test_cuda_fuzz.py", "test_triton_causal.py", "test_triton_features.py", "test_triton_memory.py",
    "test_triton_sinkhorn.py",
}  # fmt: skip
STAND_INS = {"triton", "shim", "eager"}
# On the shim where an id does not say gpu.
ON_THE_SHIM = {"test_cuda_kernels.py", "test_cuda_narrow.py", "test_cuda_barriers.py"}
ON_TRITON = {"test_triton_converged.py"}  # likewise
# Test -> of its parameters on a stand-in, the sets of which one stays.  A test without a row stays whole.
KEPT: dict[str, tuple[set[str], ...]] = {
    "test_output_and_every_gradient_within_the_error_budget": (
        {"triton", "plain", "torch.float32"}, {"triton", "plain", "torch.bfloat16"},
        {"triton", "tensors", "torch.float32"}, {"triton", "odd_sizes", "torch.float32"},
        {"triton", "bool_mask", "torch.float32"}, {"triton", "dropout", "torch.float32"},
        {"triton", "causal_t1", "torch.float32"}, {"triton", "causal_t1", "torch.bfloat16"},
    ),
    "test_pieces_and_every_gradient_within_the_error_budget": (
        {"triton", "plain", "torch.bfloat16"}, {"triton", "no_gates", "torch.float32"},
    ),
    "test_the_halves_are_attention_bit_for_bit": ({"triton", "tensors", "torch.float32"},),
    "test_gradients_through_the_halves_within_the_error_budget": (),
    "test_small_gradients_through_the_halves": (),
    "test_potentials_are_those_of_the_definition_and_carry_gradients": ({"triton", "1"}, {"eager", "1"}),
    "test_one_graph_of_the_halves_serves_every_length": (),
    "test_compiled_gradients_reach_both_halves": (),
    "test_vmap_and_vmap_of_grad_of_the_halves": (),
    "test_groups_are_repeated_keys_bit_for_bit": ({"triton", "plain", "torch.float32", "False"},),
    "test_groups_of_one_batch_element_are_repeated_keys": (),
    "test_a_step_of_groups_is_that_of_every_head": ({"triton", "False", "rbf"},),
    "test_weights_of_groups": (),
    "test_states_of_groups": (),
    "test_shares_of_the_keys_merge_to_the_transport": ({"triton", "3"},),
    "test_gradients_of_a_pass": (),
    "test_ranks_are_one_rank_within_the_error_budget": ({"eager", "tensors"},),
    "test_any_number_of_ranks_in_both_layouts": (),
    "test_scans_of_ranks_are_one_scan_within_the_error_budget": ({"eager", "causal_t1"},),
    "test_weights_within_the_error_budget": (
        {"triton", "plain", "torch.float32"}, {"eager", "tensors", "torch.float32"},
    ),
    "test_masked_output_and_every_gradient_within_the_error_budget": ({"eager", "masked_float", "torch.float32"},),
    "test_masked_small_gradients_within_the_error_budget": (),
    "test_small_masked_problems_within_the_error_budget": (
        {"triton", "causal", "torch.float32"}, {"triton", "tensors", "torch.bfloat16"},
    ),
    "test_every_dtype_under_a_mask_within_the_error_budget": (),
    "test_logits_far_apart_under_a_mask_within_the_error_budget": (),
    "test_masks_of_every_form_on_tiles": (),
    "test_masks_beyond_the_range_of_products_stay_exact": (),
    "test_what_no_query_may_see_is_never_read": ({"eager"},),
    "test_masks_in_every_form": (),
    "test_causal_counts_from_the_last_query_and_key": (),
    "test_masks_of_any_size_stay_exact": (),
    "test_empty_masks": (),
    "test_vmap_with_a_mask": ({"eager", "batched0"},),
    "test_small_gradients_within_the_error_budget": ({"triton", "tensors", "torch.float32"},),
    "test_positions_far_from_every_reference_keep_the_budget": ({"shim"}, {"eager"}),
    "test_pooling_within_the_error_budget": ({"triton", "plain", "torch.float32"}, {"shim", "plain"}),
    "test_nystrom_features_within_the_error_budget": (
        {"triton", "plain", "True", "torch.float32"}, {"triton", "centred_few", "False", "torch.float32"},
    ),
    "test_far_bandwidths_within_the_error_budget": (),
    "test_a_narrow_bandwidth_gives_the_features_of_the_cosine": (),
    "test_sinkhorn_within_the_error_budget": ({"triton", "relaxed", "7", "torch.float32"}, {"shim", "relaxed", "7"}),
    "test_attention_within_the_error_budget": (
        {"shim", "plain", "torch.float32"}, {"shim", "plain", "torch.bfloat16"}, {"shim", "tensors", "torch.float32"},
        {"shim", "bool_mask", "torch.float16"}, {"shim", "dropout", "torch.float32"},
    ),
    "test_attention_of_every_layout": (),
    "test_within_the_error_budget_in_two_schedules": (
        {"shim", "short", "relaxed", "torch.bfloat16"}, {"shim", "short", "plain", "torch.float16"},
        {"shim", "eight", "plain", "torch.bfloat16"},
    ),
    "test_sinkhorn_of_every_layout": (),
    "test_no_race": tuple({name} for name in (
        "pair of bf16", "cluster of sinkhorn", "narrow", "narrow problems", "rich", "one live key", "again",
        "again in eight blocks", "problems")),
    "test_every_schedule_agrees_bit_for_bit": tuple({name} for name in (
        "block of bf16", "sinkhorn", "tolerance", "narrow problems", "again")),
    "test_empty_batches_queries_and_keys": (),
    "test_output_and_gradients_keep_the_memory_order_of_the_inputs": ({"triton", "order1"}, {"eager", "order1"}),
    "test_extreme_scales_stay_finite": (),
    "test_random_calls_match_the_reference": (),
    "test_compile_fullgraph_with_dynamic_lengths": (),
    "test_export_with_a_dynamic_length": (),
    "test_opcheck": (),
    "test_a_pack_is_its_segments_one_after_another": ({"triton", "t1", "torch.bfloat16"}, {"eager", "plain"}),
    "test_what_comes_with_the_tokens_is_cut_with_them": ({"eager", "float"}, {"eager", "dropout"}),
    "test_masks_of_every_head": (),
    "test_gradient_of_a_float_mask": (),
    "test_neighbours_change_no_bit": ({"eager", "True"},),
    "test_pooling_is_that_of_every_segment": (),
    "test_packs_within_the_error_budget": ({"eager", "relaxed", "torch.float32"},),
    "test_no_segment_and_no_row": ({"eager"},),
    "test_a_pack_goes_on_as_its_segments_do": ({"eager"},),
    "test_packs_with_states_within_the_error_budget": ({"eager"},),
    "test_two_packs_are_one": ({"eager"},),
    "test_keys_without_queries_change_nothing": ({"eager"},),
    "test_vmap_and_vmap_of_grad": (),
    "test_one_graph_serves_every_length_of_states": (),
    "test_a_compiled_step_writes_the_states_of_its_caller": (),
    "test_vmap_and_vmap_of_grad_of_states": (),
    "test_a_pass_over_costs_is_that_of_the_definition": ({"triton", "(2, 100, 7, 1.5)"},),
    "test_a_pass_over_keys_is_that_of_the_definition": ({"triton", "5", "torch.float32"},),
    "test_iterations_over_costs_from_a_start": (),
    "test_iterations_over_keys_stop_head_by_head": (),
    "test_a_call_by_name_does_what_the_reference_does": ({"triton", "attention", "newton"},),
    "test_implicit_gradients_of_costs_are_the_unrolled_ones_at_convergence": (),
    "test_without_a_key_everything_is_zero_and_the_info_says_so": ({"triton", "newton"},),
    "test_what_cannot_converge_stays_finite_and_says_so": (),
    "test_autocast_keeps_states_in_float32": ({"eager", "reference"},),
    "test_flops_of_states_count_products": (),
}  # fmt: skip


class Share(NamedTuple):
    """The `number`-th, from 1, of `of` shares of the cases on stand-ins that `make test` leaves out."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, item: pytest.Item) -> bool:
        at_length = is_of_a_product(item) or item.path.name in ON_STAND_INS
        return not at_length or zlib.crc32(item.nodeid.encode()) % self.of == self.number - 1


def share(given: str | None = None) -> Share:
    """The share that is asked for, k/n with 1 ≤ k ≤ n; the environment's where none is given, all where it has none."""
    given = given if given is not None else os.environ.get(SHARE, "")
    found = re.fullmatch(r"(\d+)/(\d+)", given or "1/1")
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise pytest.UsageError(f"{SHARE} must be k/n with 1 ≤ k ≤ n, got {given!r}")
    return Share(int(found[1]), int(found[2]))


def is_of_a_product(item: pytest.Item) -> bool:
    """Whether the test is a case on a stand-in that `make test` leaves out."""
    kept, callspec = KEPT.get(getattr(item, "originalname", "")), getattr(item, "callspec", None)
    if callspec is None or (kept is None and item.path.name != "test_shapes.py"):
        return False
    words = set(callspec.id.split("-")) | ({"shim"} if item.path.name in ON_THE_SHIM else set())
    words |= {"triton"} if item.path.name in ON_TRITON else set()
    return bool(words & STAND_INS) and not any(few <= words for few in kept or ())


def is_exhaustive(item: pytest.Item) -> bool:
    """Whether the test is one that `make test` leaves out."""
    if item.path.name in FILES or item.path.parent.name == "models" or item.get_closest_marker("slow"):
        return True
    return is_of_a_product(item)
