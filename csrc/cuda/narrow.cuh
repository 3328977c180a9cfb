// set_attention and set_pool, forward, in 16 bits, where all logits lie close together: K = e^{(κ−1)/ε} is no smaller
// than e^−kNarrowRange whatever the vectors are, so no sum of its products under- or overflows.  No row maximum is
// taken, nothing is checked, and there is no log domain; sums are in base 2.
//
//   K_sj = 2^{rate·(κ_sj − 1)},   G = 2^{g − max g},   u_s = a_s (K G)_s^{−λ_a}
//   c_j = log Σ_s K_sj u_s − λ_a max g,   w_ij = 2^{rate·(κ_ij − 1) + g_j − max g},   o_i = Σ_j w_ij z_j / Σ_j w_ij
#pragma once
#include "narrow_transport.cuh"

namespace sfk {
namespace {

// z as the right operand of the products with weights, each warp its rows.
template <class T>
SFK_DEVICE void load_pooled(const AttentionParams& p, const NarrowHead& head, const NarrowShared<T>& shared) {
  const int width = shared.v_length - kShift<T>;
#pragma unroll 1
  for (int e = lane_index() * 2; e < width; e += 2 * kWarp) {
    const float* from = at(p.z, head.b, head.h, 0, e);
    uint32_t* to = reinterpret_cast<uint32_t*>(shared.z + width_place(e));
#pragma unroll 8
    for (int j = warp_index(); j < kUsual; j += block_warps()) {
      const Vec2 z = j < head.M && e < p.E ? *reinterpret_cast<const Vec2*>(from + j * p.z.stride[2]) : Vec2{};
      to[j * shared.v_length / 2] = pack<T>(z.x, z.y);
    }
  }
}

// o of a tile of queries from their weights, as the left operand of products over references.
template <class T>
SFK_DEVICE void read_narrow(const AttentionParams& p, const NarrowShared<T>& shared, const Chunk& w, T* to, int left) {
  const int t = lane_index() % 4, ld = shared.v_length;
  const uint32_t one = pack<T>(1, 1);
  uint32_t a[kSteps][4];
  float sum[4] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack<T>(w[2 * k + i / 2][i % 2 * 2], w[2 * k + i / 2][i % 2 * 2 + 1]);
    multiply_add<T>(sum, a[k], one, one);  // of the weights as they are rounded: o stays between the z
  }
  const float scale[2] = {sum[0] > 0 ? inverse_approx(sum[0]) : 0.0f, sum[2] > 0 ? inverse_approx(sum[2]) : 0.0f};
#pragma unroll 1
  for (int e = 0; e < ld - kShift<T>; e += kNarrow) {
    float acc[kNarrow / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) columns_product<T>(acc, a[k], shared.z + k * kTile * ld + e, ld, kNarrow / 8);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t o[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) o[n] = pack<T>(acc[n][2 * r] * scale[r], acc[n][2 * r + 1] * scale[r]);
      if (8 * r < left && e + 8 * t < p.E)
        *reinterpret_cast<Bits4*>(to + 8 * r * p.o.stride[2] + e) = {o[0], o[1], o[2], o[3]};
    }
  }
}

// Every warp of the blocks of a head takes its tiles of queries.
template <class T, class Peers>
SFK_DEVICE void answer_queries(const AttentionParams& p, const NarrowHead& head, const NarrowShared<T>& shared,
                               const Peers& peers) {
  const int g = lane_index() / 4, t = lane_index() % 4, L = static_cast<int>(p.L);
  const int warps = peers.size() * block_warps(), step = warps * kTile;
  const int start = (peers.rank() * block_warps() + warp_index()) * kTile;
  const Tokens from(p.query, head.b, head.h, 0, L, nullptr);
  RawTile x = from.tile(start);
  load_pooled(p, head, shared);
  const float shift = kLift<T> - shared.rate - largest_of(shared.g);
  sync_block();
  for (int j = fresh(thread_index()); j < kUsual; j += block_threads()) shared.g[j] += shift;
  sync_block();
  T* to = static_cast<T*>(p.o.data) + head.b * p.o.stride[0] + head.h * p.o.stride[1] + 8 * t;
  const float* add = shared.g + 2 * t;
#pragma unroll 1
  for (int row = start; row < L; row += step) {
    Chunk w;
    Operand a;
    float scale[2];
    from.operand(x, a);
    products(a, static_cast<T*>(shared.y), shared.beta, w, scale);
    x = from.tile(row + step);
    exponentials(w, scale, shared.rate, shared.beta,
                 [&](int n) { return *reinterpret_cast<const Vec2*>(add + n * 8); });
    read_narrow<T>(p, shared, w, to + (row + g) * p.o.stride[2], L - row - g);
  }
}

template <class T, class Peers>
SFK_KERNEL(kNarrowThreads, 1)
attention_narrow_kernel(const Launch<NarrowShared<T>> p) {
  const NarrowShared<T>& shared = p.shared;
  const Peers peers(shared);
  const int which = peers.head();
  NarrowHead head = {which % p.groups * p.problems, which / p.groups, p.references};
  load_unit_references(p, head, shared);
#pragma unroll 1
  do {
    const KeyShare keys(p.S, peers.rank(), peers.size());
    const float log_ref = load_relative_masses(p, head, keys, shared, peers);
    form_exponentials(p, head, keys, shared);
    ValueRows<T>(p, head, keys, shared).fetch_first();  // they come while the keys are solved for
    solve_narrow(p, head, shared, peers, log_ref);
    form_narrow_plan(shared);
    pool_values(p, head, keys, shared, peers);
    if (p.o.data && p.L) answer_queries(p, head, shared, peers);
  } while (Peers::kProblems && ++head.b % p.problems && head.b < p.B);
}

}  // namespace
}  // namespace sfk
