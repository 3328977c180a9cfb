// What the kernels share: shared memory by name, log sums, and sums of columns over the blocks of a cluster.
//
// Sums go lane by lane, warp by warp, block by block in a fixed order: results repeat bit for bit.  What every block
// knows of the columns is computed by every block alike.
#pragma once
#include "../params.h"
#include "device.cuh"

namespace sfk {
namespace {

// Hands out shared memory, in pieces that start at multiples of 16 bytes.
struct Arena {
  int used = 0;  // floats
  template <class T = float>
  SFK_BOTH Place<T> take(int64_t n) {
    const Place<T> p = {used};
    used += static_cast<int>((n * static_cast<int64_t>(sizeof(T)) + 15) / 16) * 4;
    return p;
  }
};

// Strips of 32 columns, and how many warps share the rows of one.
struct Strips {
  int count, sharing;
  SFK_BOTH Strips(int M, int warps) : count((M + kWarp - 1) / kWarp), sharing(count < warps ? warps / count : 1) {}
};

SFK_DEVICE float* at(const View& v, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  return static_cast<float*>(v.data) + i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + l * v.stride[3];
}
SFK_DEVICE float read(const View& v, int64_t i, int64_t j = 0, int64_t k = 0) { return *at(v, i, j, k); }

struct LogSum {
  float peak, total;  // Σ exp = total·e^peak
  SFK_DEVICE float value() const { return total > 0 ? peak + logf(total) : kNone; }
};

SFK_DEVICE float finite_or_zero(float x) { return x == kNone ? 0.0f : x; }

// log mass − λ·log_sum; −∞ where nothing can be sent.
SFK_DEVICE float potential(float log_mass, float lam, float log_sum) {
  return log_sum == kNone ? kNone : log_mass - lam * log_sum;
}

// What `visit(column j, share k)` makes of every column, each by `sharing` warps, which share the rows.
template <class Visit>
SFK_DEVICE void each_column(int M, Visit visit) {
  const Strips strips(M, block_warps());
  for (int w = warp_index(); w < strips.count * strips.sharing; w += block_warps()) {
    const int j = w % strips.count * kWarp + lane_index();
    if (j < M) visit(j, w / strips.count);
  }
}

// Where the sums of columns over the rows of a block come together: by parts [sharing,M], then [M].
struct ColumnSums {
  float *part_peak, *part_total, *peak, *total;
};

// The parts of peak·total = Σ; then (sync_block inside) one sum for every column.
SFK_DEVICE void merge_parts(const ColumnSums& sums, int M) {
  sync_block();
  const int sharing = Strips(M, block_warps()).sharing;
  for (int j = thread_index(); j < M; j += block_threads()) {
    float peak = kNone, total = 0;
#pragma unroll 1
    for (int k = 0; k < sharing; ++k) peak = fmaxf(peak, sums.part_peak[k * M + j]);
#pragma unroll 1
    for (int k = 0; k < sharing; ++k)
      total += sums.part_total[k * M + j] * exp_approx(sums.part_peak[k * M + j] - finite_or_zero(peak));
    sums.peak[j] = peak, sums.total[j] = total;
  }
}

// Σ_s exp(ℓ_sj + f_s) over the rows of this block; ℓ [rows,stride].
SFK_DEVICE void column_log_sums(const float* l, int stride, int rows, int M, const float* f, const ColumnSums& sums) {
  const int sharing = Strips(M, block_warps()).sharing;
  each_column(M, [&](int j, int share) {
    float peak = kNone, total = 0;
    for (int i = share; i < rows; i += sharing) peak = fmaxf(peak, l[i * stride + j] + f[i]);
    const float base = finite_or_zero(peak);
    for (int i = share; i < rows; i += sharing) total += exp_approx(l[i * stride + j] + f[i] - base);
    sums.part_peak[share * M + j] = peak, sums.part_total[share * M + j] = total;
  });
  merge_parts(sums, M);
}

constexpr int kMostRanks = 8;  // blocks of a head

// read(rank) of every block of a head, or `none`: all reads of the others' memory are on their way together.
template <class Number, class Read>
SFK_DEVICE void each_rank(Number (&found)[kMostRanks], Number none, Read read, int ranks = cluster_size()) {
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) found[r] = r < ranks ? read(r) : none;
}

// start + Σ read(rank) over the blocks of a cluster, in the order of their ranks.
template <class Read>
SFK_DEVICE float sum_over_ranks(float start, Read read) {
  float found[kMostRanks];
  each_rank(found, 0.0f, read);
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) start += found[r];
  return start;
}

// Column j over all blocks of the cluster, in the order of their ranks.
SFK_DEVICE LogSum column_total(const ColumnSums& sums, int j) {
  LogSum sum = {kNone, 0};
  float peak[kMostRanks], total[kMostRanks];
  each_rank(peak, kNone, [&](int r) { return map_shared(sums.peak, r)[j]; });
  each_rank(total, 0.0f, [&](int r) { return map_shared(sums.total, r)[j]; });
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) sum.peak = fmaxf(sum.peak, peak[r]);
  const float base = finite_or_zero(sum.peak);
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) sum.total += total[r] * exp_approx(peak[r] - base);
  return sum;
}

// The largest x of the block, for every thread.  The scratch [warps] is free again after the next barrier.
SFK_DEVICE float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
#pragma unroll 1
  for (int w = 0; w < block_warps(); ++w) x = fmaxf(x, scratch[w]);
  return x;
}

// Σ over the block of x, for every thread.
SFK_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  sync_block();
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
  x = 0;
#pragma unroll 1
  for (int w = 0; w < block_warps(); ++w) x += scratch[w];
  return x;
}

}  // namespace
}  // namespace sfk
