// set_attention and set_pool, backward, in one launch: the queries give dz and dg^T, then the transport runs backward
// over the keys.
//
//   dP_ij = ⟨do_i, z_j⟩,  dS_ij = W^q_ij (dP_ij − Σ_j W^q_ij dP_ij),  dz_j = Σ_i W^q_ij do_i,  dg^T_j = Σ_i dS_ij
#pragma once
#include "attention.cuh"
#include "transport_backward.cuh"

namespace sfk {
namespace {

// Whether at most one key takes part.
template <class T>
SFK_DEVICE bool few_keys(const BackwardShared<T>& shared) {
  float present = 0;
  for (int i = thread_index(); i < shared.rows; i += block_threads()) present += shared.log_a[i] != kNone;
  present = block_sum(present, shared.scratch);
  if (thread_index() == 0) *shared.sums = present;
  sync_cluster();
  return sum_over_ranks(0, [&](int r) { return *map_shared(shared.sums, r); }) < 2;
}

// Two passes over the tile of weights that a warp has of its queries.
template <class T>
struct QueryTile {
  const AttentionParams& p;
  const Head& head;
  const BackwardShared<T>& shared;
  float* weights;  // [16,stride]; a weight that dropout took is negative
  const T* d_o;    // [16,v_length]
  float keep, scale[2], mean[2];

  // ⟨w, dP⟩ of rows g and g + 8.
  SFK_DEVICE void means() {
    const int g = lane_index() / 4, t = lane_index() % 4, ld = shared.v_length;
    float sum[2] = {};
#pragma unroll 1
    for (int first = 0; first < head.Mp; first += kColumns) {
      const int tiles = chunk_tiles(head, first);
      Chunk product = {};
      rows_product<T>(product, d_o, shared.zd + first * ld, ld, ld - kShift<T>, tiles);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (n >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w = weights[(g + e / 2 * 8) * head.stride + first + n * 8 + 2 * t + e % 2];
          sum[e / 2] += fmaxf(w, 0.0f) * product[n][e];
        }
      }
    }
    for (int r = 0; r < 2; ++r) mean[r] = over_columns(sum[r]) * keep * scale[r];
  }

  // ⟨do_i, z_j⟩ -> dS.  The same factor normalises W and the mean: a row of dS sums to 0 to rounding of its own terms.
  SFK_DEVICE void to_logits(int first, int tiles, Chunk& dl) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n >= tiles) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        const float w = weights[(g + r * 8) * head.stride + first + n * 8 + 2 * t + e % 2];
        const float dp = w > 0 ? dl[n][e] * keep : 0.0f;
        dl[n][e] = head.M == 1 ? 0.0f : fabsf(w) * scale[r] * (dp - mean[r]);
      }
    }
    float* columns = shared.columns + warp_index() * head.Mp;
    add_over_rows(dl, first, tiles, columns, 1, [](int, int, float d) { return d; });
  }
};

// dq, this block's parts of dz and dg^T, and the queries' parts of the parameters' sums.
template <class T>
SFK_DEVICE void read_backward(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared,
                              HyperSums& sums) {
  const Rows<T> query(p.query, head.b, head.h), d_o(p.d_o, head.b, head.h);
  const Positions positions(p.query_pos, head);
  const int L = static_cast<int>(p.L), step = block_warps() * kTile, yl = shared.y_length, g = lane_index() / 4;
  float *tile = shared.tile + warp_index() * kTile * head.stride, *inverse = shared.inverse + warp_index() * kTile;
  const Pairs<T> pairs = {shared, &query, &d_o, 0, L, nullptr};
  pairs.each(cluster_rank() * step, cluster_size() * step, L, [&](int row0, T* x0, const T* d_o0) {
    const int row = row0 + warp_index() * kTile, count = L - row;
    T* x = x0 + warp_index() * kTile * yl;
    QueryTile<T> rows = {p, head, shared, tile, d_o0 + warp_index() * kTile * shared.v_length, kept(p), {}, {}};
    scale_tile(head, shared, x);
    const float* factor = shared.factor + warp_index() * kTile;
    float top[2], sum[2], along[2];
    Chunk w;
    tile_weights<T>(head, TileOf<T>{x, factor, row, count, nullptr}, shared.y, yl, shared.pi, positions, shared.dg,
                    true, tile, w, top, sum);
    for (int r = 0; r < 2; ++r) rows.scale[r] = sum[r] > 0 ? 1 / sum[r] : 0.0f;
    if (p.dropout_p > 0) each_dropped(p, head, tile, row, [](float& w) { w = -w; });
    rows.means();
    if (lane_index() % 4 == 0) inverse[g] = rows.scale[0] * rows.keep, inverse[g + 8] = rows.scale[1] * rows.keep;
    sync_block();
    const auto weight = [&](int i, int j) { return fmaxf(shared.tile[i * head.stride + j], 0.0f) * shared.inverse[i]; };
    add_products(shared.d_z, shared.values_length, head.Mp, weight, d_o0, shared.v_length, step);
    sync_block();
    const int tokens[2] = {g < count ? row + g : -1, g + 8 < count ? row + g + 8 : -1};
    const auto logits = [&](int first, int tiles, Chunk& dl) { rows.to_logits(first, tiles, dl); };
    const float total[2] = {0, 0};
    gradient_tile(head, shared, x, rows.d_o, tile, positions, tokens, total, logits, sums, along);
    if (p.d_query.data)
      store_token_gradients(Rows<T>(p.d_query, head.b, head.h), head, shared, x, tile, row, count, along);
    sync_block();
    if (p.d_references.data)
      add_products(
          shared.d_y, shared.sums_length, head.Mp, [&](int i, int j) { return shared.tile[i * head.stride + j]; }, x0,
          yl, step);
  });
}

// The parameters' sums, over all problems of the cluster, start at 0.
template <class T>
SFK_DEVICE void clear_parameters(const Head& head, const BackwardShared<T>& shared) {
  for (int k = thread_index(); k < head.Mp * shared.sums_length; k += block_threads()) shared.d_y[k] = 0;
  for (int k = thread_index(); k < block_warps() * head.Mp * head.P; k += block_threads()) shared.places[k] = 0;
  for (int j = thread_index(); j < head.Mp; j += block_threads()) shared.d_log_b[j] = 0;
}

// z for the queries' products, g^T in dg, and sums that start at 0.
template <class T>
SFK_DEVICE void start_backward(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared, bool lone) {
  const int ld = shared.v_length, last = static_cast<int>(p.T > 1 ? p.T : 1) - 1;
  // Where one key takes part alone every z_j is its value: dS is exactly 0 without dropout.
  const bool use = !(lone && p.dropout_p <= 0);
  for (int k = thread_index(); k < head.Mp * ld; k += block_threads()) {
    const int j = k / ld, e = k % ld;
    shared.zd[k] = rounded<T>(use && j < head.M && e < p.E ? *at(p.z, head.b, head.h, j, e) : 0.0f);
  }
  for (int j = thread_index(); j < head.Mp; j += block_threads())
    shared.dg[j] = j < head.M ? dual(p, head, shared.log_b[j], *at(p.c, head.b, head.h, last, j)) : kNone;
  for (int k = thread_index(); k < head.Mp * shared.values_length; k += block_threads()) shared.d_z[k] = 0;
  for (int k = thread_index(); k < block_warps() * head.Mp; k += block_threads()) shared.columns[k] = 0;
  for (int i = thread_index(); i < shared.rows; i += block_threads()) shared.d_log_a[i] = 0;
  sync_block();
}

// dz, as the products with v see it, ⟨z_j, dz_j⟩ with that dz, and dg^T: from all blocks and what arrives for z.
template <class T>
SFK_DEVICE void merge_queries(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared) {
  const int E = static_cast<int>(p.E);
  for (int j = thread_index(); j < head.Mp; j += block_threads()) {
    float total = 0;
    for (int w = 0; w < block_warps(); ++w) total += shared.columns[w * head.Mp + j];
    shared.parts[j] = total;
  }
  sync_cluster();
  for (int j = warp_index(); j < head.Mp; j += block_warps()) {
    float mean = 0;
    for (int e = lane_index(); e < shared.v_length; e += kWarp) {
      const bool inside = j < head.M && e < E;
      float sum = inside && p.d_z.data ? *at(p.d_z, head.b, head.h, j, e) : 0.0f;
      if (inside)
        sum = sum_over_ranks(sum, [&](int r) { return map_shared(shared.d_z, r)[j * shared.values_length + e]; });
      const T operand = rounded<T>(sum);
      shared.zd[j * shared.v_length + e] = operand;
      if (inside) mean += to_float(operand) * *at(p.z, head.b, head.h, j, e);
    }
    mean = warp_sum(mean);
    if (lane_index() == 0) shared.zdz[j] = mean;
  }
  for (int j = thread_index(); j < head.Mp; j += block_threads())
    shared.dg[j] = sum_over_ranks(0, [&](int r) { return map_shared(shared.parts, r)[j]; });
  sync_cluster();  // the keys' logits go where dz was
}

// What the blocks know of the parameters, added up in the order of their ranks, to place `group` of this head.
template <class T>
SFK_DEVICE void store_parameters(const ResidentParams& p, const Head& head, const BackwardShared<T>& shared, int group,
                                 const HyperSums& sums) {
#pragma unroll
  for (int k = 0; k < kNumHyper; ++k) {
    const float total = block_sum(sums.of[k], shared.scratch);
    if (thread_index() == 0) shared.sums[k] = total;
  }
  sync_cluster();
  if (p.d_references.data) store_references(p, head, shared, group);
  if (p.d_ref_pos.data) store_places(p, head, shared, group);
  for (int j = thread_index(); p.d_log_b.data && cluster_rank() == 0 && j < head.M; j += block_threads())
    *at(p.d_log_b, group, head.h, j) = shared.d_log_b[j];
  const int k = thread_index();
  if (p.d_hyper.data && cluster_rank() == 0 && k < kNumHyper) {
    float total = 0;
#pragma unroll 1
    for (int r = 0; r < (k == kLambdaB ? 1 : cluster_size()); ++r) total += map_shared(shared.sums, r)[k];
    if (k == kBandwidth) total *= head.inv_eps;
    if (k == kEpsilon) total *= -head.inv_eps * head.inv_eps;
    if (k == kPositionScale) total *= -2 * head.hyper(p, kPositionScale);
    *at(p.d_hyper, group, head.h, k) = total;
  }
  sync_cluster();  // nobody leaves while another still reads its sums
}

template <class T, bool kLog>
SFK_DEVICE void keys_backward(const AttentionParams& p, const Head& head, const KeyShare& keys,
                              const BackwardShared<T>& shared, bool lone, HyperSums& sums) {
  KeyPass<T, kLog> pass = {p, head, keys, shared, sums, lone};
  pass.run();
  pass.finish();
  for (int i = thread_index(); p.d_log_a.data && i < keys.count; i += block_threads())
    *at(p.d_log_a, head.b, head.h, keys.first + i) = shared.d_log_a[i];
}

// One batch element of the head.
template <class T>
SFK_DEVICE void attend_backward(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared,
                                HyperSums& sums) {
  const KeyShare keys(p.S);
  load_masses(p, head, keys, shared);
  const bool lone = few_keys(shared);
  start_backward(p, head, shared, lone);
  if (p.d_o.data) read_backward(p, head, shared, sums);
  merge_queries(p, head, shared);
  load_keys(p, head, keys, shared, true);
  sync_cluster();
  if (load_columns(p, head, shared, cluster_lowest(shared.lowest))) {
    keys_backward<T, false>(p, head, keys, shared, lone, sums);
  } else {
    sync_cluster();  // `lowest` is written again
    load_keys(p, head, keys, shared, false);
    sync_block();
    keys_backward<T, true>(p, head, keys, shared, lone, sums);
  }
}

template <class T, int kKnown>
SFK_KERNEL(kThreads, 1)
attention_backward_kernel(const Launch<BackwardShared<T>> p) {
  Head head = first_problem(p, kKnown);
  HyperSums sums;
  load_references(p, head, p.shared);
  clear_parameters(head, p.shared);
#pragma unroll 1
  for (int n = 0; n < p.problems && head.b < p.B; ++n, ++head.b) attend_backward(p, head, p.shared, sums);
  store_parameters(p, head, p.shared, (head.b - 1) / p.problems, sums);
}

}  // namespace
}  // namespace sfk
