// set_attention and set_pool, forward, in one launch: the keys' transport and pooling, then the queries' reading.
#pragma once
#include "../philox.h"
#include "transport.cuh"

namespace sfk {
namespace {

// visit(weight) for the weights of a tile that dropout takes, each lane its own.
template <class Visit>
SFK_DEVICE void each_dropped(const AttentionParams& p, const Head& head, float* tile, int64_t first, Visit visit) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const uint64_t seed = p.seed_at ? static_cast<uint64_t>(*p.seed_at) : p.seed;
  const uint64_t threshold = static_cast<uint64_t>(p.dropout_p * 4294967296.0);
#pragma unroll 1
  for (int i = g; i < kTile; i += 8)
#pragma unroll 1
    for (int j = 2 * t; j < head.Mp; j += 8)
#pragma unroll 1
      for (int c = j; c < j + 2; ++c) {
        const uint64_t n = static_cast<uint64_t>(((head.b * p.H + head.h) * p.L + first + i) * p.M + c);
        if (philox(seed, n) < threshold) visit(tile[head.place(i, c)]);
      }
}

// What the weights that dropout leaves are multiplied by.
SFK_DEVICE float kept(const AttentionParams& p, const Head& head) {
  return !head.dropped ? 1.0f : p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
}

// g^T, from the last c.
SFK_DEVICE float dual(const AttentionParams& p, const Head& head, float log_b, float c) {
  return log_b - (p.T ? head.lam_b * finite_or_zero(c) : 0.0f);
}

// acc += W z of a tile and 8·tiles columns of z: W in registers where it is one chunk of 16 bits, else in memory.
template <class T>
struct ReadProduct {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], const Head& head, bool in_registers, const Chunk& w,
                             const float* tile, const T* z, int ld, int tiles) {
    const auto weight = [&](int i, int j) { return tile[head.place(i, j)]; };
    if (!in_registers) return weights_product<T>(acc, weight, z, ld, head.Mp, tiles);
    chunk_product<T>(acc, w, head.Mp / 8, z, ld, tiles);
  }
};
template <>
struct ReadProduct<float> {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], const Head& head, bool, const Chunk&, const float* tile,
                             const float* z, int ld, int tiles) {
    weights_product<float>(acc, [&](int i, int j) { return tile[head.place(i, j)]; }, z, ld, head.Mp, tiles);
  }
};

// o of one tile of queries.
template <class T>
SFK_DEVICE void read_tile(const Rows<T>& to, const Head& head, const AttentionShared<T>& shared, bool in_registers,
                          const Chunk& w, const float* tile, int64_t first, int64_t count, const float (&scale)[2]) {
  const int ld = shared.v_length;
#pragma unroll 1
  for (int e0 = 0; e0 < ld - kShift<T>; e0 += kNarrow) {
    const int left = ld - kShift<T> - e0, tiles = (left < kNarrow ? left : kNarrow) / 8;
    float acc[kNarrow / 8][4] = {};
    ReadProduct<T>::run(acc, head, in_registers, w, tile, shared.z + e0, ld, tiles);
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[n][k] *= scale[k / 2];
    store_tile(to, first, count, e0, acc);
  }
}

// o_i = Σ_j softmax_j(ℓ(q_i, y_j) + g_j) z_j; every warp of the cluster takes its tiles of queries.
template <class T>
SFK_DEVICE void read_queries(const AttentionParams& p, const Head& head, const AttentionShared<T>& shared) {
  const Rows<T> from(p.query, head.b, head.h), to(p.o, head.b, head.h);
  const Positions positions(p.query_pos, head);
#pragma unroll 1
  for (int k = thread_index(); k < head.Mp * shared.v_length; k += block_threads()) {
    const int j = k / shared.v_length, e = k % shared.v_length;
    shared.z[k] = rounded<T>(j < head.M && e < p.E ? *at(p.z, head.b, head.h, j, e) : 0.0f);
  }
  for (int j = thread_index(); j < head.M; j += block_threads())
    shared.g[j] = dual(p, head, shared.log_b[j], shared.c[j]);
  sync_block();
  const float keep = kept(p, head);
  float* tile = shared.l + warp_index() * kTile * head.stride;
  const int L = static_cast<int>(p.L), warps = cluster_size() * block_warps();
  const auto walk = walk_over(from, head, shared, 0, L, padded(L), nullptr);
  walk.each(cluster_rank() * block_warps() + warp_index(), warps, [&](int, const TileOf<T>& x) {
    float top[2], sum[2];
    Chunk w;
    tile_weights<T>(head, x, shared.y, shared.y_length, shared.pi, positions, shared.g, true, tile, w, top, sum);
    if (head.dropped) each_dropped(p, head, tile, x.first, [](float& w) { w = 0; });
    const float scale[2] = {sum[0] > 0 ? keep / sum[0] : 0.0f, sum[1] > 0 ? keep / sum[1] : 0.0f};
    sync_warp();
    const bool in_registers = head.Mp <= kColumns && !head.dropped;
    read_tile(to, head, shared, in_registers, w, tile, x.first, x.count, scale);
  });
}

// All iterations and the plan in the log domain, for every form of problems.
template <class T>
SFK_APART void solve_in_logs(const Launch<AttentionShared<T>>& p, int b, int h) {
  const Head head(p, b, h, Form{0, false});
  solve<T, true>(p, head, p.shared);
  form_plan<T, true>(head, p.shared);
}

// c, and the plan of this block's keys; the next barrier is the caller's.
template <class T>
SFK_DEVICE void transport(const Launch<AttentionShared<T>>& p, const Head& head) {
  const KeyShare keys(p.S);
  load_masses(p, head, keys, p.shared);
  sync_block();
#pragma unroll 1
  for (bool scaled = true;; scaled = false) {
    load_keys(p, head, keys, p.shared, scaled);
    if (!scaled) return solve_in_logs(p, head.b, head.h);
    if (solve<T, false>(p, head, p.shared)) return form_plan<T, false>(head, p.shared);
    sync_cluster();  // `lowest` is written again
  }
}

template <class T, int kKnown, bool kPlain>
SFK_KERNEL(kThreads, blocks_a_processor(kKnown))
attention_kernel(const SFK_GIVEN Launch<AttentionShared<T>> p) {
  constexpr Form form = {kKnown, kPlain};
  const Problems mine(p);
  load_references(p, Head(p, mine.first, mine.h, form), p.shared);
#pragma unroll 1
  for (int b = mine.first; b < mine.end; ++b) {
    transport(p, Head(p, b, fresh(mine.h), form));
    const Head head(p, b, fresh(mine.h), form);  // registers hold none across the call in there
    pool(p, head, KeyShare(p.S), p.shared);
    if (p.o.data) read_queries(p, head, p.shared);
  }
}

}  // namespace
}  // namespace sfk
