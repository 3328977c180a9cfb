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

  // What the weights of row g + 8r are multiplied by when z is read.
  SFK_DEVICE float factor(int r) const { return scale[r] * keep; }

  // ⟨w, dP⟩ of rows g and g + 8.
  SFK_DEVICE void means() {
    const int ld = shared.v_length;
    float sum[2] = {};
#pragma unroll 1
    for (int first = 0; first < head.Mp; first += kColumns) {
      const int tiles = chunk_tiles(head, first);
      Chunk product = {}, w = {};
      rows_product<T>(product, d_o, shared.zd + first * ld, ld, ld - kShift<T>, tiles);
      load_chunk(head, w, first, tiles, weights);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e / 2] += fmaxf(w[n][e], 0.0f) * product[n][e];
    }
    for (int r = 0; r < 2; ++r) mean[r] = over_columns(sum[r]) * keep * scale[r];
  }

  // W^q of a chunk, rounded, beside what will become of dS.
  SFK_DEVICE void store_read(const Chunk& w, int first, int tiles) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Weights<T> to = {weights, head, head.Mp, true};
    const int turn = head.turn_anew(g);
    sync_warp();  // two numbers go where another lane had one
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n >= tiles) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        to.store(g + r * 8, first + n * 8 + 2 * t, turn, fmaxf(w[n][2 * r], 0.0f) * factor(r),
                 fmaxf(w[n][2 * r + 1], 0.0f) * factor(r));
    }
  }

  // dz += W^qᵀ do of this step of all warps, d_o [step,v_length]: in float32, where dĉ will take all of the place of W.
  SFK_DEVICE void add_values(const T* all_d_o, int step) const {
    float* inverse = shared.inverse + warp_index() * kTile + lane_index() / 4;
    if (lane_index() % 4 == 0) inverse[0] = factor(0), inverse[8] = factor(1);
    sync_block();
    add_products<T>(shared.d_z, shared.values_length, head.Mp, shared.v_length, [&](auto& acc, int j0, int e0, int n) {
      const auto weight = [&](int j, int i) {
        return fmaxf(shared.tile[head.place(i, j0 + j)], 0.0f) * shared.inverse[i];
      };
      weights_product<T>(acc, weight, all_d_o + e0, shared.v_length, step, n);
    });
    sync_block();
  }

  // ⟨do_i, z_j⟩ -> dS.  The same factor normalises W and the mean: a row of dS sums to 0 to rounding of its own terms.
  // Leaves the chunk's place, in 16 bits half of it, for what becomes of dS.
  SFK_DEVICE void to_logits(int first, int tiles, Chunk& dl) const {
    Chunk w = {};
    load_chunk(head, w, first, tiles, weights);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        const float dp = w[n][e] > 0 ? dl[n][e] * keep : 0.0f;
        dl[n][e] = head.M == 1 ? 0.0f : fabsf(w[n][e]) * scale[r] * (dp - mean[r]);
      }
    if constexpr (sizeof(T) == 2) store_read(w, first, tiles);
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
  float* tile = shared.tile + warp_index() * kTile * head.stride;
  const Pairs<T> pairs = {shared, &query, &d_o, 0, L, nullptr};
  pairs.each(cluster_rank() * step, cluster_size() * step, L, [&](int row0, T* x0, const T* d_o0) {
    const int row = row0 + warp_index() * kTile, count = L - row;
    T* x = x0 + warp_index() * kTile * yl;
    QueryTile<T> rows = {p, head, shared, tile, d_o0 + warp_index() * kTile * shared.v_length, kept(p, head), {}, {}};
    scale_tile(head, shared, x);
    const float* factor = shared.factor + warp_index() * kTile;
    float top[2], sum[2], along[2];
    Chunk w;
    tile_weights<T>(head, TileOf<T>{x, factor, row, count, nullptr}, shared.y, yl, shared.pi, positions, shared.dg,
                    true, tile, w, top, sum);
    for (int r = 0; r < 2; ++r) rows.scale[r] = sum[r] > 0 ? 1 / sum[r] : 0.0f;
    if (head.dropped) each_dropped(p, head, tile, row, [](float& w) { w = -w; });
    rows.means();
    if constexpr (sizeof(T) == 4) rows.add_values(d_o0, step);
    const int tokens[2] = {g < count ? row + g : -1, g + 8 < count ? row + g + 8 : -1};
    const auto logits = [&](int first, int tiles, Chunk& dl) { rows.to_logits(first, tiles, dl); };
    const float total[2] = {0, 0};
    const Weights<T> mine = {tile, head, head.Mp, false};
    gradient_tile(head, shared, x, rows.d_o, mine, positions, tokens, total, logits, sums, along);
    if (p.d_query.data)
      store_token_gradients(Rows<T>(p.d_query, head.b, head.h), head, shared, x, mine, row, count, along);
    sync_block();
    const Weights<T> all = {shared.tile, head, head.Mp, false}, read = {shared.tile, head, head.Mp, true};
    if constexpr (sizeof(T) == 2) add_weighted(shared.d_z, shared.values_length, read, d_o0, shared.v_length, step);
    if (p.d_references.data) add_weighted(shared.d_y, shared.sums_length, all, x0, yl, step);
  });
}

// The references, and the parameters' sums over all problems of the cluster, which start at 0.
template <class T>
SFK_DEVICE void start_parameters(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared) {
  load_references(p, head, shared);
  for (int k = thread_index(); k < head.Mp * shared.sums_length; k += block_threads()) shared.d_y[k] = 0;
  for (int k = thread_index(); k < block_warps() * head.Mp * head.P; k += block_threads()) shared.places[k] = 0;
  for (int j = thread_index(); j < head.Mp; j += block_threads()) shared.d_log_b[j] = 0;
}

// z for the queries' products, g^T in dg, and sums that start at 0.
template <class T>
SFK_DEVICE void start_backward(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared, bool lone) {
  const int ld = shared.v_length, last = static_cast<int>(p.T > 1 ? p.T : 1) - 1;
  // Where one key takes part alone every z_j is its value: dS is exactly 0 without dropout.
  const bool use = !(lone && !head.dropped);
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
  if (head.P && p.d_ref_pos.data) store_places(p, head, shared, group);
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

// The same in the log domain, where a kernel has registers for a call.
template <class T, int kKnown, bool kPlain>
SFK_APART HyperSums keys_backward_in_logs(const Launch<BackwardShared<T>>& p, int b, int h, bool lone, HyperSums sums) {
  keys_backward<T, true>(p, Head(p, b, h, Form{kKnown, kPlain, true}), KeyShare(p.S), p.shared, lone, sums);
  return sums;
}

// One batch element of the head.
template <class T, int kKnown, bool kPlain>
SFK_DEVICE void attend_backward(const Launch<BackwardShared<T>>& p, const Head& head, HyperSums& sums) {
  const BackwardShared<T>& shared = p.shared;
  const KeyShare keys(p.S);
  load_masses(p, head, keys, shared);
  const bool lone = few_keys(shared);
  start_backward(p, head, shared, lone);
  if (p.d_o.data) read_backward(p, head, shared, sums);
  merge_queries(p, head, shared);
#pragma unroll 1
  for (bool scaled = true;; scaled = false) {
    load_keys(p, head, keys, shared, scaled);
    if (!scaled) {
      sync_block();
      if constexpr (sizeof(T) == 2 && (kKnown || kPlain))
        sums = keys_backward_in_logs<T, kKnown, kPlain>(p, head.b, head.h, lone, sums);
      else
        keys_backward<T, true>(p, head, keys, shared, lone, sums);
      break;
    }
    sync_cluster();
    if (load_columns(p, head, shared, cluster_lowest(shared.lowest))) {
      keys_backward<T, false>(p, head, keys, shared, lone, sums);
      break;
    }
    sync_cluster();  // `lowest` is written again
  }
}

template <class T, int kKnown, bool kPlain>
SFK_KERNEL(kThreads, 1)
attention_backward_kernel(const SFK_GIVEN Launch<BackwardShared<T>> p) {
  constexpr Form form = {kKnown, kPlain, true};
  const Problems mine(p);
  HyperSums sums;
  start_parameters(p, Head(p, mine.first, fresh(mine.h), form), p.shared);
#pragma unroll 1
  for (int b = mine.first; b < mine.end; ++b)
    attend_backward<T, kKnown, kPlain>(p, Head(p, b, fresh(mine.h), form), sums);  // no head is held across a call
  store_parameters(p, Head(p, mine.first, fresh(mine.h), form), p.shared, mine.group, sums);
}

}  // namespace
}  // namespace sfk
