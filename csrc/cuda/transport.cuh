// Transport and pooling on the chip: a cluster of blocks has one head, each block a share of its keys.
//
// The keys are read once.  Their logits less the row maximum, or e^ of that where the range allows, stay in shared
// memory through all iterations; then the values are pooled along the plan. Scaled: K = e^{ℓ−m}, a row's factor is u =
// e^{log a + (1−λ_a) m − λ_a log(K G) − ref}, G = e^{g − max g}; no exponential of a tile.  It holds while every K G is
// a normal number; where it is not, the head starts again in the log domain, decided on the device and by all blocks
// alike.
#pragma once
#include "resident.cuh"

namespace sfk {
namespace {

constexpr float kRange = 80;      // e^−80 leaves sums of products normal numbers
constexpr float kLeast = 1e-27f;  // a column's sum below this has lost digits to underflow

struct Span {
  float top, spread;  // of the finite g; spread is ∞ where there is none
};

// The same on every warp.
SFK_DEVICE Span span_of(const float* g, int M) {
  float top = kNone, below = kNone;
  for (int j = lane_index(); j < M; j += kWarp) {
    top = fmaxf(top, g[j]);
    if (g[j] != kNone) below = fmaxf(below, -g[j]);
  }
  top = warp_max(top), below = warp_max(below);
  return {top, top == kNone ? INFINITY : top + below};
}

// One row for eight lanes: visit(i) by all of them, with the row's sums over the lanes taken by `octet`.
template <class Op>
SFK_DEVICE float octet(float x, Op op) {
  for (int mask = 4; mask > 0; mask /= 2) x = op(x, shuffle_xor(x, mask));
  return x;
}

// Scaled: weight = log a + (1−λ_a) m − λ_a log(K G) of every row; returns the largest of this block.
SFK_DEVICE float scaled_rows(const Head& head, int rows, const float* l, const float* G, const float* log_a,
                             const float* top, float* weight, float lam, float* scratch) {
  float most = kNone;
  const int first = lane_index() % 8 * 4;
  for (int i = warp_index() * 4 + lane_index() / 8; i < rows; i += block_warps() * 4) {
    float sum = 0;
    for (int j = first; j < head.Mp; j += 32)
      sum = dot(*reinterpret_cast<const Vec4*>(l + i * head.stride + j), *reinterpret_cast<const Vec4*>(G + j), sum);
    sum = octet(sum, [](float a, float b) { return a + b; });
    const float w = log_a[i] + top[i] * (1 - lam) - lam * logf(sum);
    if (lane_index() % 8 == 0) weight[i] = w;
    most = fmaxf(most, w);
  }
  return block_max(most, scratch);
}

// Log domain: weight = f + m = log a + (1 − λ_a) m − λ_a LSE_j(ℓ − m + g).
SFK_DEVICE void log_rows(const Head& head, int rows, const float* l, const float* g, const float* log_a,
                         const float* top, float* weight, float lam, bool update) {
#pragma unroll 1
  for (int i = warp_index() * 4 + lane_index() / 8; i < rows; i += block_warps() * 4) {
    float peak = kNone, total = 0;
    for (int j = lane_index() % 8; j < head.M; j += 8) peak = fmaxf(peak, l[head.place(i, j)] + g[j]);
    peak = octet(peak, [](float a, float b) { return fmaxf(a, b); });
    for (int j = lane_index() % 8; j < head.M; j += 8)
      total += exp_approx(l[head.place(i, j)] + g[j] - finite_or_zero(peak));
    total = octet(total, [](float a, float b) { return a + b; });
    const float m = top[i];
    const float f = update ? potential(log_a[i] + m * (1 - lam), lam, LogSum{peak, total}.value()) : log_a[i] + m;
    if (lane_index() % 8 == 0) weight[i] = f;
  }
}

// Scaled: u = e^{weight − ref} in place, and Σ_s K_sj u_s by columns.
SFK_DEVICE void scaled_columns(const Head& head, int rows, const float* l, float* weight, float ref,
                               const ColumnSums& sums) {
  for (int i = thread_index(); i < rows; i += block_threads()) weight[i] = exp_approx(weight[i] - finite_or_zero(ref));
  sync_block();
  const int sharing = Strips(head.M, block_warps()).sharing;
  each_column(head.M, [&](int j, int share) {
    float total = 0;
    for (int i = share; i < rows; i += sharing) total = fmaf(l[head.place(i, j)], weight[i], total);
    sums.part_peak[share * head.M + j] = ref, sums.part_total[share * head.M + j] = total;
  });
  merge_parts(sums, head.M);
}

// One pass over the keys on the chip: the sums of this block's columns.  Returns ref (0 in the log domain).
template <class T, bool kLog>
SFK_DEVICE float iterate(const Head& head, const AttentionShared<T>& shared, const ColumnSums& sums, const Span& span,
                         float lam, bool update) {
  const int rows = shared.rows;
  if (kLog) {
    log_rows(head, rows, shared.l, shared.g, shared.log_a, shared.top, shared.weight, lam, update);
    sync_block();
    column_log_sums(shared.l, head.stride, rows, head.M, shared.weight, sums);
    return 0;
  }
  const float top = finite_or_zero(span.top);
  for (int j = thread_index(); j < head.Mp; j += block_threads()) shared.G[j] = exp_approx(shared.g[j] - top);
  sync_block();
  const float ref =
      scaled_rows(head, rows, shared.l, shared.G, shared.log_a, shared.top, shared.weight, lam, shared.scratch);
  scaled_columns(head, rows, shared.l, shared.weight, ref, sums);
  return ref;
}

// The smallest ℓ − m of the cluster; once every block has written its own.
SFK_DEVICE float cluster_lowest(float* lowest) {
  float found[kMostRanks], least = 0;
  each_rank(found, 0.0f, [&](int r) { return *map_shared(lowest, r); });
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) least = fminf(least, found[r]);
  return least;
}

// All iterations; leaves c^T, and weight and factor such that the plan's column is l·weight·factor.  False where the
// scaled form does not hold.
template <class T, bool kLog>
SFK_DEVICE bool solve(const AttentionParams& p, const Head& head, const AttentionShared<T>& shared) {
  const int iterations = static_cast<int>(p.T), M = head.M;
  const float lam = iterations ? head.lam_a : 0.0f;
  float lowest = 0;
  for (int j = thread_index(); j < head.Mp; j += block_threads()) shared.g[j] = shared.log_b[j];
#pragma unroll 1
  for (int t = 0; t < (iterations ? iterations : 1); ++t) {
    const int turn = t % 2 * head.Mp;
    const ColumnSums sums = {shared.part_peak, shared.part_total, shared.peak + turn, shared.total + turn};
    sync_block();
    const Span span = span_of(shared.g, M);
    const float ref = iterate<T, kLog>(head, shared, sums, span, lam, iterations > 0);
    sync_cluster();
    if (!kLog && t == 0) lowest = cluster_lowest(shared.lowest);
    const float shift = kLog ? 0.0f : -lam * finite_or_zero(span.top);
    bool holds = span.spread - lowest <= kRange;
    for (int j = thread_index(); j < M; j += block_threads()) {
      const LogSum sum = column_total(sums, j);
      const float c = sum.total > 0 ? static_cast<float>(double{logf(sum.total)} + sum.peak + shift) : kNone;
      holds = holds && sum.total > kLeast;
      // The plan's columns are divided by their sums: c, rounded, would leave them short of 1 by the rounding.
      shared.c[j] = c, shared.peaks[j] = sum.peak;
      shared.factor[j] = sum.total > 0 ? (kLog ? 1.0f : exp_approx(ref - sum.peak)) / sum.total : 0.0f;
      if (cluster_rank() == 0) *at(p.c, head.b, head.h, t, j) = c;
      if (iterations) shared.g[j] = potential(shared.log_b[j], head.lam_b, c);
    }
    if (!kLog && block_max(holds ? 0.0f : 1.0f, shared.scratch) > 0) return false;
  }
  for (int j = M + thread_index(); j < head.Mp; j += block_threads()) shared.factor[j] = 0;
  sync_block();
  return true;
}

// Eight numbers in the place of eight floats of the row, as two numbers of T each: rounding them once would be felt.
template <class T>
struct PlanRow {
  SFK_DEVICE static void store(float* row, int Mp, int j, const float (&w)[8]) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = pack<T>(w[2 * k], w[2 * k + 1]);
      const T h0 = {static_cast<uint16_t>(high[k])}, h1 = {static_cast<uint16_t>(high[k] >> 16)};
      low[k] = pack<T>(w[2 * k] - to_float(h0), w[2 * k + 1] - to_float(h1));
    }
    T* halves = reinterpret_cast<T*>(row);
    *reinterpret_cast<Bits4*>(halves + half_place(Mp, j, false)) = {high[0], high[1], high[2], high[3]};
    *reinterpret_cast<Bits4*>(halves + half_place(Mp, j, true)) = {low[0], low[1], low[2], low[3]};
  }
};
template <>
struct PlanRow<float> {
  SFK_DEVICE static void store(float* row, int, int j, const float (&w)[8]) {
    *reinterpret_cast<Vec4*>(row + j) = {w[0], w[1], w[2], w[3]};
    *reinterpret_cast<Vec4*>(row + j + 4) = {w[4], w[5], w[6], w[7]};
  }
};

// K or ℓ -> the plan's columns W^k in place.  A row is eight lanes' work.
template <class T, bool kLog>
SFK_DEVICE void form_plan(const Head& head, const AttentionShared<T>& shared) {
  const int part = lane_index() % 8 * 8;
#pragma unroll 1
  for (int i = warp_index() * 4 + lane_index() / 8; i < shared.rows; i += block_warps() * 4) {
    float* row = shared.l + i * head.stride;
    const float u = shared.weight[i];
#pragma unroll 1
    for (int first = 0; first < head.Mp; first += kColumns) {
      const int j = first + part;
      float w[8];
#pragma unroll
      for (int k = 0; k < 8 && j < head.Mp; ++k) {
        const float l = row[j + k], factor = shared.factor[j + k];
        w[k] = !kLog ? l * u * factor : factor > 0 ? exp_approx((l + u) - shared.peaks[j + k]) * factor : 0.0f;
      }
      sync_warp();
      if (j < head.Mp) PlanRow<T>::store(row, head.Mp, j, w);
    }
  }
}

// acc += Wᵀ v of 16 references from j0 on, `depth` rows of the plan and 8·tiles columns of v [depth,.].
template <class T>
struct PlanProduct {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], const Head& head, const float* plan, int j0, const T* v,
                             int ld, int depth, int tiles) {
    const int lane = lane_index(), j = j0 + lane / 8 % 2 * 8, pitch = head.stride * 2;
    const T* rows = reinterpret_cast<const T*>(plan) + (lane / 16 * 8 + lane % 8) * pitch;
    const int high = half_place(head.Mp, j, false), low = half_place(head.Mp, j, true);
#pragma unroll 1
    for (int k = 0; k < depth; k += kTile) {
      uint32_t a[4], rest[4];
      load_matrices_transposed(a, rows + k * pitch + high);
      load_matrices_transposed(rest, rows + k * pitch + low);
      columns_products<T>(acc, a, rest, v + k * ld, ld, tiles);
    }
  }
};
template <>
struct PlanProduct<float> {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], const Head& head, const float* plan, int j0, const float* v,
                             int ld, int depth, int tiles) {
    weights_product<float>(acc, [&](int j, int s) { return plan[head.place(s, j0 + j)]; }, v, ld, depth, tiles);
  }
};

// z += W^kᵀ v of this block's keys, for the 16 references and 32 columns of the values that this warp has.
template <class T>
SFK_DEVICE void pool_part(const AttentionParams& p, const Head& head, const KeyShare& keys,
                          const AttentionShared<T>& shared, int j0, int e0, bool active, float (&acc)[kNarrow / 8][4]) {
  const Rows<T> from(p.value, head.b, head.h);
  const int ld = shared.v_length, left = ld - kShift<T> - e0, tiles = (left < kNarrow ? left : kNarrow) / 8;
  const auto fetch = [&](int first) {
    const int rows = shared.rows - first < kValueRows ? shared.rows - first : kValueRows;
    if (rows > 0)
      stage(from, shared.staged + first / kValueRows % 2 * kValueRows * ld, ld, rows, keys.first + first,
            keys.count - first, shared.log_a + first, thread_index(), block_threads());
    copies_commit();
  };
  fetch(0);
  for (int first = 0; first < shared.rows; first += kValueRows) {
    fetch(first + kValueRows);
    copies_wait<1>();
    sync_block();
    const int depth = shared.rows - first < kValueRows ? shared.rows - first : kValueRows;
    const T* v = shared.staged + first / kValueRows % 2 * kValueRows * ld + e0;
    if (active) PlanProduct<T>::run(acc, head, shared.l + first * head.stride, j0, v, ld, depth, tiles);
    sync_block();
  }
}

// z_j = Σ_s W^k_sj v_s, summed over the blocks of the cluster in the order of their ranks.
template <class T>
SFK_DEVICE void pool(const AttentionParams& p, const Head& head, const KeyShare& keys,
                     const AttentionShared<T>& shared) {
  const int across = (padded(p.E) + kNarrow - 1) / kNarrow, tasks = head.Mp / kTile * across;
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int done = 0; done < tasks; done += block_warps()) {
    const int task = done + warp_index();
    float acc[kNarrow / 8][4] = {};
    pool_part(p, head, keys, shared, task / across * kTile, task % across * kNarrow, task < tasks, acc);
    for (int n = 0; n < kNarrow / 8; ++n)
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<Vec2*>(shared.part + (warp_index() * kTile + g + r * 8) * kPartRow + n * 8 + 2 * t) = {
            acc[n][2 * r], acc[n][2 * r + 1]};
    sync_cluster();
    for (int k = cluster_rank() * block_threads() + thread_index(); k < block_warps() * kTile * kNarrow;
         k += cluster_size() * block_threads()) {
      const int which = done + k / (kTile * kNarrow);
      const int j = which / across * kTile + k / kNarrow % kTile, e = which % across * kNarrow + k % kNarrow;
      if (which >= tasks || j >= head.M || e >= p.E) continue;
      const int from = k / kNarrow * kPartRow + k % kNarrow;
      *at(p.z, head.b, head.h, j, e) = sum_over_ranks(0, [&](int r) { return map_shared(shared.part, r)[from]; });
    }
    sync_cluster();
  }
}

}  // namespace
}  // namespace sfk
