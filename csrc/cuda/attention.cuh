// set_attention and set_pool, forward, in one launch: the keys' transport and pooling, then the queries' reading.
#pragma once
#include "../philox.h"
#include "resident.cuh"

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
        if (philox(seed, n) < threshold) visit(tile[i * head.stride + c]);
      }
}

// What the weights that dropout leaves are multiplied by.
SFK_DEVICE float kept(const AttentionParams& p) {
  return p.dropout_p <= 0 ? 1.0f : p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
}

// g^T, from the last c.
SFK_DEVICE float dual(const AttentionParams& p, const Head& head, float log_b, float c) {
  return log_b - (p.T ? head.lam_b * finite_or_zero(c) : 0.0f);
}

// o of one tile of queries, from its weights [16,stride].
template <class T>
SFK_DEVICE void read_tile(const Rows<T>& to, const Head& head, const AttentionShared<T>& shared, const float* tile,
                          int64_t first, int64_t count, const float (&scale)[2]) {
  const int g = lane_index() / 4, t = lane_index() % 4, ld = shared.v_length;
#pragma unroll 1
  for (int e0 = 0; e0 < ld - kShift<T>; e0 += kNarrow) {
    const int left = ld - kShift<T> - e0, tiles = (left < kNarrow ? left : kNarrow) / 8;
    float acc[kNarrow / 8][4] = {};
    const auto weight = [&](int i, int j) { return tile[i * head.stride + j]; };
    weights_product<T, false>(acc, weight, shared.z + e0, ld, head.Mp, tiles);
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = g + k / 2 * 8, e = e0 + n * 8 + 2 * t + k % 2;
        if (i < count && e < to.width)
          to.base[(first + i) * to.row + e * to.column] = rounded<T>(acc[n][k] * scale[k / 2]);
      }
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
  const float keep = kept(p);
  float* tile = shared.l + warp_index() * kTile * head.stride;
  const int L = static_cast<int>(p.L), warps = cluster_size() * block_warps();
  const auto walk = walk_over(from, head, shared, 0, L, padded(L), nullptr);
  walk.each(cluster_rank() * block_warps() + warp_index(), warps, [&](int, const TileOf<T>& x) {
    float top[2], sum[2];
    tile_logits(head, x, shared.y, shared.y_length, shared.pi, positions, shared.g, tile, top);
    tile_exp(head, tile, top, sum);
    if (p.dropout_p > 0) each_dropped(p, head, tile, x.first, [](float& w) { w = 0; });
    const float scale[2] = {sum[0] > 0 ? keep / sum[0] : 0.0f, sum[1] > 0 ? keep / sum[1] : 0.0f};
    sync_warp();
    read_tile(to, head, shared, tile, x.first, x.count, scale);
  });
}

template <class T>
SFK_KERNEL(kThreads, kBlocks<T>)
attention_kernel(const ResidentParams p) {
  Arena arena{static_cast<float*>(shared_memory())};
  const Head head(p, block_index() / cluster_size());
  const KeyShare keys(p.S);
  const AttentionShared<T> shared(arena, p, padded(KeyShare::each(p.S, cluster_size())), block_warps());
  load_references(p, head, shared);
  load_masses(p, head, keys, shared);
  sync_block();
  bool solved = false;
#pragma unroll 1
  for (int attempt = 0; attempt < 2 && !solved; ++attempt) {
    load_keys(p, head, keys, shared, attempt == 0);
    solved = attempt == 0 ? solve<T, false>(p, head, shared) : solve<T, true>(p, head, shared);
    if (attempt == 1) form_plan(head, shared);
    sync_cluster();
  }
  pool(p, head, keys, shared);
  if (p.o.data) read_queries(p, head, shared);
}

}  // namespace
}  // namespace sfk
