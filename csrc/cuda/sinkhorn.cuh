// Sinkhorn on a log-kernel ℓ [N,M] that stays on the chip for all iterations: the rows of a problem are shared out
// among the blocks of a cluster, a warp takes a row, and then a strip of 32 columns.
//
//   g⁰ = log b;  f^t = log a − λ_a LSE_j(ℓ + g^{t−1});  c^t = LSE_s(ℓ + f^t);  g^t = log b − λ_b c^t
#pragma once
#include "columns.cuh"

namespace sfk {
namespace {

constexpr int kSinkhornThreads = 512;

// Shared memory of a block that has `rows` rows.
struct SinkhornShared {
  Place<float> l, log_a, f, log_b, g;  // [rows,M] [rows] [rows] [M] [M]
  Place<float> part_peak, part_total;  // [sharing,M] the columns' sums over some rows of this block
  Place<float> peak, total;            // [2,M] over all rows of this block; two, as the other blocks read behind
  Place<float> scratch;                // [warps]
  SFK_BOTH SinkhornShared(Arena& arena, int rows, int M, int warps) {
    const int parts = Strips(M, warps).sharing * M;
    l = arena.take(static_cast<int64_t>(rows) * M);
    log_a = arena.take(rows), f = arena.take(rows), log_b = arena.take(M), g = arena.take(M);
    part_peak = arena.take(parts), part_total = arena.take(parts);
    peak = arena.take(2 * M), total = arena.take(2 * M);
    scratch = arena.take(warps);
  }
};

// The same for the backward pass.
struct SinkhornBackwardShared {
  Place<float> l, dl, log_a, d_log_a;     // [rows,M] [rows,M] [rows] [rows]
  Place<float> row_peak, row_coef;        // [rows] R = exp(ℓ + g − peak), times coef = −λ_a df / total
  Place<float> log_b, d_log_b, g, c, dc;  // [M]
  Place<float> part, dg;                  // [sharing,M] [2,M]
  Place<float> scratch, d_lam_a;          // [warps] [1]
  SFK_BOTH SinkhornBackwardShared(Arena& arena, int rows, int M, int warps) {
    l = arena.take(static_cast<int64_t>(rows) * M), dl = arena.take(static_cast<int64_t>(rows) * M);
    log_a = arena.take(rows), d_log_a = arena.take(rows), row_peak = arena.take(rows), row_coef = arena.take(rows);
    log_b = arena.take(M), d_log_b = arena.take(M), g = arena.take(M), c = arena.take(M), dc = arena.take(M);
    part = arena.take(Strips(M, warps).sharing * M);
    dg = arena.take(2 * M);
    scratch = arena.take(warps), d_lam_a = arena.take(1);
  }
};

// Which rows of which problem this block has.
struct Share {
  int64_t group;
  int N, M, row0, rows, ranks, rank;
  float lam_a, lam_b;
  SFK_DEVICE explicit Share(const SinkhornParams& p)
      : N(static_cast<int>(p.N)), M(static_cast<int>(p.M)), ranks(cluster_size()), rank(cluster_rank()) {
    const int each = (N + ranks - 1) / ranks;
    group = block_index() / ranks;
    row0 = rank * each < N ? rank * each : N;
    rows = row0 + each < N ? each : N - row0;
    lam_a = p.lam_a.data ? read(p.lam_a, group) : static_cast<float>(p.scalars[0]);
    lam_b = p.lam_b.data ? read(p.lam_b, group) : static_cast<float>(p.scalars[1]);
  }
};

// LSE_j(row_j + add_j), by a warp.
SFK_DEVICE LogSum row_sum(const float* row, const float* add, int M) {
  float peak = kNone, total = 0;
  for (int j = lane_index(); j < M; j += kWarp) peak = fmaxf(peak, row[j] + add[j]);
  peak = warp_max(peak);
  const float base = finite_or_zero(peak);
  for (int j = lane_index(); j < M; j += kWarp) total += exp_approx(row[j] + add[j] - base);
  return {peak, warp_sum(total)};
}

// ℓ, log a and log b of this block.  A cluster's blocks read all of ℓ once.
template <class Shared>
SFK_DEVICE void load_problem(const SinkhornParams& p, const Share& s, const Shared& shared) {
  for (int i = warp_index(); i < s.rows; i += block_warps())
    for (int j = lane_index(); j < s.M; j += kWarp) shared.l[i * s.M + j] = read(p.log_kernel, s.group, s.row0 + i, j);
  const float row = -logf(static_cast<float>(s.N)), column = -logf(static_cast<float>(s.M));
  for (int i = thread_index(); i < s.rows; i += block_threads())
    shared.log_a[i] = p.log_a.data ? read(p.log_a, s.group, s.row0 + i) : row;
  for (int j = thread_index(); j < s.M; j += block_threads())
    shared.log_b[j] = p.log_b.data ? read(p.log_b, s.group, j) : column;
}

SFK_KERNEL(kSinkhornThreads, 1) sinkhorn_kernel(const SinkhornParams p) {
  Arena arena;
  const Share s(p);
  const SinkhornShared shared(arena, (s.N + s.ranks - 1) / s.ranks, s.M, block_warps());
  load_problem(p, s, shared);
  for (int j = thread_index(); j < s.M; j += block_threads()) shared.g[j] = shared.log_b[j];
  const int T = static_cast<int>(p.T), passes = T > 0 ? T : 1;
  int ran = T;
  for (int t = 0; t < passes; ++t) {
    sync_block();
    for (int i = warp_index(); i < s.rows; i += block_warps()) {
      const float log_a = shared.log_a[i];
      const float f = T ? potential(log_a, s.lam_a, row_sum(shared.l + i * s.M, shared.g, s.M).value()) : log_a;
      if (lane_index() == 0) shared.f[i] = f;
    }
    sync_block();
    const int turn = t % 2 * s.M;
    const ColumnSums sums = {shared.part_peak, shared.part_total, shared.peak + turn, shared.total + turn};
    column_log_sums(shared.l, s.M, s.rows, s.M, shared.f, sums);
    sync_cluster();
    float moved = 0;
    for (int j = thread_index(); j < s.M; j += block_threads()) {
      const float c = column_total(sums, j).value();
      if (s.rank == 0) *at(p.c, s.group, t, j) = c;
      if (T == 0) continue;
      const float next = potential(shared.log_b[j], s.lam_b, c);
      if (next != shared.g[j]) moved = fmaxf(moved, fabsf(next - shared.g[j]));
      shared.g[j] = next;
    }
    if (p.tol >= 0 && T && block_max(moved, shared.scratch) <= static_cast<float>(p.tol)) {
      ran = t + 1;
      break;
    }
  }
  sync_cluster();  // nobody leaves while another still reads its sums
  for (int i = thread_index(); i < s.rows; i += block_threads()) *at(p.f, s.group, s.row0 + i) = shared.f[i];
  if (s.rank != 0) return;
  if (thread_index() == 0) p.iters[s.group] = ran;
  for (int j = thread_index(); j < s.M; j += block_threads()) {
    *at(p.g, s.group, j) = shared.g[j];
    for (int t = ran; t < T; ++t)  // rows past the last iteration repeat it
      *at(p.c, s.group, t, j) = read(p.c, s.group, ran - 1, j);
  }
}

// g^{t−1}, c^t, and dc = −λ_b dg^t with its parts of d log b and dλ_b (returned), for every column.
SFK_DEVICE float backward_columns(const SinkhornParams& p, const Share& s, const SinkhornBackwardShared& shared,
                                  const float* dg, int t) {
  float d_lam_b = 0;
  for (int j = thread_index(); j < s.M; j += block_threads()) {
    const float c = read(p.c, s.group, t - 1, j), d = c == kNone ? 0.0f : dg[j];
    const float before = t > 1 ? read(p.c, s.group, t - 2, j) : 0.0f;
    shared.g[j] = t > 1 ? potential(shared.log_b[j], s.lam_b, before) : shared.log_b[j];
    shared.c[j] = c, shared.dc[j] = -s.lam_b * d;
    shared.d_log_b[j] += d;
    d_lam_b -= d * finite_or_zero(c);
  }
  return d_lam_b;
}

// df^t of the rows of this block and dℓ += Q·dc; returns the part of dλ_a (the same on all lanes).
SFK_DEVICE float backward_rows(const SinkhornParams& p, const Share& s, const SinkhornBackwardShared& shared,
                               bool last) {
  float d_lam_a = 0;
  for (int i = warp_index(); i < s.rows; i += block_warps()) {
    const float* l = shared.l + i * s.M;
    const LogSum sum = row_sum(l, shared.g, s.M);
    const float log_sum = sum.value(), f = potential(shared.log_a[i], s.lam_a, log_sum);
    float df = 0;
    for (int j = lane_index(); f != kNone && j < s.M; j += kWarp) {
      // The two larger terms cancel first.  Where c is −∞ no row reaches the column.
      const float q = shared.c[j] == kNone ? 0.0f : exp_approx((l[j] + f) - shared.c[j]) * shared.dc[j];
      shared.dl[i * s.M + j] += q;
      df += q;
    }
    df = warp_sum(df);
    if (last && f != kNone) df += read(p.d_f, s.group, s.row0 + i);
    d_lam_a -= df * finite_or_zero(log_sum);
    if (lane_index() != 0) continue;
    shared.row_peak[i] = finite_or_zero(sum.peak);
    shared.row_coef[i] = f == kNone ? 0.0f : -s.lam_a * df / sum.total;
    shared.d_log_a[i] += df;
  }
  return d_lam_a;
}

// dℓ −= λ_a R·df, and its column sums over the rows of this block: its part of dg^{t−1}.
SFK_DEVICE void backward_sums(const Share& s, const SinkhornBackwardShared& shared, float* dg) {
  const int sharing = Strips(s.M, block_warps()).sharing, M = s.M;
  each_column(M, [&](int j, int share) {
    float total = 0;
    for (int i = share; i < s.rows; i += sharing) {
      const float r = exp_approx(shared.l[i * M + j] + shared.g[j] - shared.row_peak[i]) * shared.row_coef[i];
      shared.dl[i * M + j] += r;
      total += r;
    }
    shared.part[share * M + j] = total;
  });
  sync_block();
  for (int j = thread_index(); j < M; j += block_threads()) {
    float total = 0;
    for (int k = 0; k < sharing; ++k) total += shared.part[k * M + j];
    dg[j] = total;
  }
}

SFK_DEVICE void start_backward(const SinkhornParams& p, const Share& s, const SinkhornBackwardShared& shared, int ran) {
  for (int i = warp_index(); i < s.rows; i += block_warps())
    for (int j = lane_index(); j < s.M; j += kWarp) shared.dl[i * s.M + j] = 0;
  for (int i = thread_index(); i < s.rows; i += block_threads())
    shared.d_log_a[i] = ran ? 0.0f : read(p.d_f, s.group, s.row0 + i);
  for (int j = thread_index(); j < s.M; j += block_threads())
    shared.d_log_b[j] = 0, shared.dg[j] = s.rank ? 0.0f : read(p.d_g, s.group, j);
}

SFK_DEVICE void store_backward(const SinkhornParams& p, const Share& s, const SinkhornBackwardShared& shared) {
  for (int i = warp_index(); p.d_log_kernel.data && i < s.rows; i += block_warps())
    for (int j = lane_index(); j < s.M; j += kWarp)
      *at(p.d_log_kernel, s.group, s.row0 + i, j) = shared.dl[i * s.M + j];
  for (int i = thread_index(); p.d_log_a.data && i < s.rows; i += block_threads())
    *at(p.d_log_a, s.group, s.row0 + i) = shared.d_log_a[i];
  for (int j = thread_index(); p.d_log_b.data && s.rank == 0 && j < s.M; j += block_threads())
    *at(p.d_log_b, s.group, j) = shared.d_log_b[j];
}

// dg^t stands as one part a block in the halves of dg by turns; every block adds the parts in the order of ranks.
SFK_KERNEL(kSinkhornThreads, 1) sinkhorn_backward_kernel(const SinkhornParams p) {
  Arena arena;
  const Share s(p);
  const SinkhornBackwardShared shared(arena, (s.N + s.ranks - 1) / s.ranks, s.M, block_warps());
  const int ran = static_cast<int>(p.iters[s.group]);
  load_problem(p, s, shared);
  start_backward(p, s, shared, ran);
  float d_lam_a = 0, d_lam_b = 0;
  for (int t = ran, turn = 0; t >= 0; --t, turn ^= 1) {
    sync_cluster();
    for (int j = thread_index(); j < s.M; j += block_threads()) {
      float total = 0;
      for (int r = 0; r < s.ranks; ++r) total += map_shared(shared.dg + turn * s.M, r)[j];
      shared.dc[j] = total;
    }
    if (t == 0) break;
    d_lam_b += backward_columns(p, s, shared, shared.dc, t);
    sync_block();
    d_lam_a += backward_rows(p, s, shared, t == ran);
    sync_block();
    backward_sums(s, shared, shared.dg + (turn ^ 1) * s.M);
  }
  for (int j = thread_index(); j < s.M; j += block_threads()) shared.d_log_b[j] += shared.dc[j];
  d_lam_b = block_sum(d_lam_b, shared.scratch);
  d_lam_a = block_sum(lane_index() ? 0.0f : d_lam_a, shared.scratch);
  if (thread_index() == 0) *shared.d_lam_a = d_lam_a;
  store_backward(p, s, shared);
  sync_cluster();
  if (p.d_lam.data && s.rank == 0 && thread_index() == 0) {
    float total = 0;
    for (int r = 0; r < s.ranks; ++r) total += *map_shared(shared.d_lam_a, r);
    *at(p.d_lam, s.group, 0) = total, *at(p.d_lam, s.group, 1) = d_lam_b;
  }
  sync_cluster();
}

}  // namespace
}  // namespace sfk
