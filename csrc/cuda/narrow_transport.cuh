// Transport and pooling of narrow.cuh: K = 2^{rate·(κ − 1)} of a block's keys, all iterations, z.
#pragma once
#include "narrow_tokens.cuh"

namespace sfk {
namespace {

// The masses of this block's keys over the largest of the head, whose log is returned.
template <class T, class Peers>
SFK_DEVICE float load_relative_masses(const AttentionParams& p, const NarrowHead& head, const KeyShare& keys,
                                      const NarrowShared<T>& shared, const Peers& peers) {
  if (!p.log_a.data) {
    for (int i = thread_index(); i < shared.rows; i += block_threads()) shared.mass[i] = i < keys.count ? 1.0f : 0.0f;
    sync_block();
    return -logf(static_cast<float>(p.S));
  }
  float largest = kNone;
  for (int i = thread_index(); i < shared.rows; i += block_threads()) {
    const float mass = i < keys.count ? read(p.log_a, head.b, head.h, keys.first + i) : kNone;
    shared.mass[i] = mass, largest = fmaxf(largest, mass);
  }
  largest = block_max(largest, shared.sums);
  if (thread_index() == 0) *peers.own(shared.ref, kLargestAt) = largest;
  peers.sync();
  float found[kMostRanks];
  each_rank(found, kNone, [&](int r) { return *peers.of(r, shared.ref, kLargestAt); }, peers.size());
#pragma unroll
  for (int r = 0; r < kMostRanks; ++r) largest = fmaxf(largest, found[r]);
  largest = finite_or_zero(largest);
  for (int i = thread_index(); i < shared.rows; i += block_threads())
    shared.mass[i] = exp_approx(shared.mass[i] - largest);
  sync_block();
  return largest;
}

// K of this block's keys; each warp has its own tiles, here and in every pass.
template <class T>
SFK_DEVICE void form_exponentials(const AttentionParams& p, const NarrowHead& head, const KeyShare& keys,
                                  const NarrowShared<T>& shared) {
  const int g = lane_index() / 4, t = lane_index() % 4, step = block_warps() * kTile;
  const Tokens from(p.key, head.b, head.h, keys.first, keys.count, shared.mass);
  RawTile x = from.tile(warp_index() * kTile);
#pragma unroll 1
  for (int row = warp_index() * kTile; row < shared.rows; row += step) {
    Chunk w;
    Operand a;
    float scale[2];
    from.operand(x, a);
    products(a, static_cast<T*>(shared.y), shared.beta, w, scale);
    x = from.tile(row + step);
    exponentials(w, scale, shared.rate, shared.beta, [&](int) { return Vec2{-shared.rate, -shared.rate}; });
    float* out = shared.l + (row + g) * kRow + 2 * t;
#pragma unroll
    for (int n = 0; n < kUsual / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) *reinterpret_cast<Vec2*>(out + r * 8 * kRow + n * 8) = {w[n][2 * r], w[n][2 * r + 1]};
  }
}

// The columns that a lane has of a row which eight lanes share: 4i .. and 32 + 4i ...
struct RowPart {
  Vec4 of[2];
  SFK_DEVICE explicit RowPart(const float* row)
      : of{*reinterpret_cast<const Vec4*>(row), *reinterpret_cast<const Vec4*>(row + kWarp)} {}
  SFK_DEVICE float dot_with(const RowPart& other) const { return dot(of[0], other.of[0], dot(of[1], other.of[1], 0)); }
  template <class Op>
  SFK_DEVICE void each(Op op) {
#pragma unroll
    for (int k = 0; k < 2; ++k) op(of[k].x), op(of[k].y), op(of[k].z), op(of[k].w);
  }
  SFK_DEVICE void add(const RowPart& other, float by) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      of[k].x = fmaf(other.of[k].x, by, of[k].x), of[k].y = fmaf(other.of[k].y, by, of[k].y);
      of[k].z = fmaf(other.of[k].z, by, of[k].z), of[k].w = fmaf(other.of[k].w, by, of[k].w);
    }
  }
};

// max g, the same on every warp; 0 where there is none.
SFK_DEVICE float largest_of(const float* g) {
  return finite_or_zero(warp_max(fmaxf(g[lane_index()], g[lane_index() + kWarp])));
}

// u of this warp's rows, power(K G) = (K G)^−λ, and their part of Σ_s K_sj u_s.
template <class T, class Power>
SFK_DEVICE void sum_columns(const NarrowShared<T>& shared, float top, Power power) {
  const int at = lane_index() % 8 * 4, down = lane_index() / 8;
  RowPart G(shared.g + at), sum = G;
  G.each([&](float& x) { x = exp2_approx(x - top); });
  sum.each([](float& x) { x = 0; });
#pragma unroll 1
  for (int row = warp_index() * kTile; row < shared.rows; row += block_warps() * kTile) {
    const float* from = shared.l + (row + down) * kRow + at;
    const float* mass = shared.mass + row + down;
    float* out = shared.u + row + down;
#pragma unroll
    for (int r = 0; r < kTile; r += 4) {
      const RowPart k(from + r * kRow);
      const float reached = octet(k.dot_with(G), [](float a, float b) { return a + b; });
      const float u = mass[r] * power(fmaxf(reached, 1e-36f));  // 0 only where there is no key at all
      if (lane_index() % 8 == 0) out[r] = u;
      sum.add(k, u);
    }
  }
  sum.each([](float& x) { x += shuffle_xor(x, 8), x += shuffle_xor(x, 16); });
  float* part = shared.sums + warp_index() * kUsual + at;
  if (down == 0) *reinterpret_cast<Vec4*>(part) = sum.of[0], *reinterpret_cast<Vec4*>(part + kWarp) = sum.of[1];
}

// All iterations; leaves c, g^T, u and the factors of the plan's columns.
template <class T, class Peers>
SFK_DEVICE void solve_narrow(const AttentionParams& p, const NarrowHead& head, const NarrowShared<T>& shared,
                             const Peers& peers, float log_ref) {
  const int iterations = static_cast<int>(p.T);
  const auto relaxation = [&](Hyper which) {
    return p.hyper[which].data ? read(p.hyper[which], head.h) : static_cast<float>(p.scalars[which]);
  };
  const float lam_a = iterations ? relaxation(kLambdaA) : 0.0f, lam_b = relaxation(kLambdaB);
  for (int j = fresh(thread_index()); j < kUsual; j += block_threads()) shared.g[j] = shared.log_b[j];
#pragma unroll 1
  for (int t = 0; t < (iterations ? iterations : 1); ++t) {
    const int turn = t % 2 * kUsual;  // two, as the other blocks read behind
    sync_block();
    const float top = largest_of(shared.g);
    if (lam_a == 1)
      sum_columns(shared, top, [](float x) { return inverse_approx(x); });
    else
      sum_columns(shared, top, [&](float x) { return exp2_approx(-lam_a * log2_approx(x)); });
    sync_block();
    for (int j = thread_index(); j < kUsual; j += block_threads()) {
      float sum = 0;
#pragma unroll 1
      for (int w = 0; w < block_warps(); ++w) sum += shared.sums[w * kUsual + j];
      peers.own(shared.total, kTotalAt)[turn + j] = sum;
    }
    peers.sync();
    const double shift = double{log_ref} - double{lam_a} * top / kLog2e;
    for (int j = thread_index(); j < kUsual; j += block_threads()) {
      float sum = 0, found[kMostRanks];
      each_rank(found, 0.0f, [&](int r) { return peers.of(r, shared.total, kTotalAt)[turn + j]; }, peers.size());
#pragma unroll
      for (int r = 0; r < kMostRanks; ++r) sum += found[r];
      const bool reached = j < head.M && sum > 0;
      const float c = reached ? static_cast<float>(double{logf(sum)} + shift) : kNone;
      shared.factor[j] = reached ? 1 / sum : 0.0f;
      if (peers.rank() == 0 && j < head.M) *at(p.c, head.b, head.h, t, j) = c;
      if (iterations) shared.g[j] = reached ? shared.log_b[j] - lam_b * (c * kLog2e) : kNone;
    }
  }
  sync_block();
}

// K -> the plan's columns in place, as high and low parts.  A row is eight lanes' work.
template <class T>
SFK_DEVICE void form_narrow_plan(const NarrowShared<T>& shared) {
  const int at = lane_index() % 8 * 8, down = lane_index() / 8;
  float factor[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) factor[k] = shared.factor[at + k];
#pragma unroll 1
  for (int row = warp_index() * kTile; row < shared.rows; row += block_warps() * kTile)
#pragma unroll
    for (int r = 0; r < kTile; r += 4) {
      float* from = shared.l + (row + r + down) * kRow;
      const float u = shared.u[row + r + down];
      const Vec4 low = *reinterpret_cast<const Vec4*>(from + at), high = *reinterpret_cast<const Vec4*>(from + at + 4);
      const float k[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) w[i] = k[i] * u * factor[i];
      sync_warp();
      PlanRow<T>::store(from, kUsual, at, w);
    }
}

// Rows of the values on their way to shared memory, 16 bytes at a time; zeros for keys without mass and beyond E.
template <class T>
struct ValueRows {
  const NarrowShared<T>& shared;
  const T* from;
  T* to;
  int start, down, row;  // this thread's first row and its step; numbers of a row in memory
  bool wide;
  SFK_DEVICE ValueRows(const AttentionParams& p, const NarrowHead& head, const KeyShare& keys,
                       const NarrowShared<T>& shared_)
      : shared(shared_), row(static_cast<int>(p.value.stride[2])) {
    const int across = (shared.v_length - kShift<T>) / 8, e = thread_index() % across * 8;
    down = block_threads() / across, start = thread_index() / across, wide = e < p.E;
    if (start >= down) start = shared.rows;  // a thread beyond the last whole row
    from = static_cast<const T*>(p.value.data) + head.b * p.value.stride[0] + head.h * p.value.stride[1] +
           keys.first * p.value.stride[2] + e;
    to = shared.staged + e;
  }
  SFK_DEVICE void fetch(int first, int which) const {
    const int left = shared.rows - first, rows = left < shared.value_rows ? left : shared.value_rows;
    T* buffer = to + which * shared.value_rows * shared.v_length;
#pragma unroll 2
    for (int i = start; i < rows; i += down) {
      const bool present = wide && shared.mass[first + i] > 0;
      copy16_async(buffer + i * shared.v_length, from + static_cast<int64_t>(first + i) * row, present);
    }
    copies_commit();
  }
  SFK_DEVICE void fetch_first() const { fetch(0, 0), fetch(shared.value_rows, 1); }
};

// What a warp pools at a time: 32 references and 32 columns of the values, of every `sharing`th 16 keys where warps
// outnumber these pieces.
struct PoolTask {
  int pieces, sharing, piece, share, across;
  SFK_DEVICE PoolTask(int width, int done) {
    across = width / kNarrow;
    const int all = kUsual / kNarrow * across, warps = block_warps();
    pieces = all - done < warps ? all - done : warps, sharing = warps / pieces;
    piece = done + warp_index() % pieces, share = warp_index() / pieces;
  }
  SFK_DEVICE int reference(int of) const { return of / across * kNarrow; }
  SFK_DEVICE int column(int of) const { return of % across * kNarrow; }
};

// Its part of Σ_s W_sj v_s; the first values are on their way.
template <class T>
SFK_DEVICE void pool_piece(const NarrowShared<T>& shared, const ValueRows<T>& values, const PoolTask& task) {
  const int lane = lane_index(), ld = shared.v_length;
  const int plan = (lane / 16 * 8 + lane % 8) * kRow * 2 + task.reference(task.piece) + lane / 8 % 2 * 8;
  const int value = lane % 16 * ld + task.column(task.piece) + lane / 16 * 8;
  float acc[2][kNarrow / 8][4] = {};
  int buffer = 0;
#pragma unroll 1
  for (int first = 0; first < shared.rows; first += shared.value_rows, buffer ^= 1) {
    copies_wait<1>();
    sync_block();
    const int left = shared.rows - first, depth = left < shared.value_rows ? left : shared.value_rows;
    const T* rows = reinterpret_cast<const T*>(shared.l + first * kRow) + plan;
    const T* v = shared.staged + buffer * shared.value_rows * ld + value;
#pragma unroll 1
    for (int k = task.share * kTile; task.share < task.sharing && k < depth; k += task.sharing * kTile) {
      uint32_t b[2][4], a[4];
      load_matrices_transposed(b[0], v + k * ld), load_matrices_transposed(b[1], v + k * ld + 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // high and low parts of two times 16 references
        load_matrices_transposed(a, rows + k * kRow * 2 + i / 2 * kTile + i % 2 * kUsual);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_add<T>(acc[i / 2][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    sync_block();
    values.fetch(first + 2 * shared.value_rows, buffer);
  }
  float* part = shared.part + (warp_index() * kNarrow + lane / 4) * kPartRow + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n)
      *reinterpret_cast<Vec2*>(part + i * 8 * kPartRow + n * 8) = {acc[i / 2][n][i % 2 * 2],
                                                                   acc[i / 2][n][i % 2 * 2 + 1]};
}

SFK_DEVICE Vec4 sum_of(const Vec4& a, const Vec4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// use(row, e): four numbers of the parts of z, of thread `first` of so many; a row is one of 32 of a piece.
template <class Use>
SFK_DEVICE void each_of_parts(const PoolTask& task, int first, int threads, Use use) {
#pragma unroll 1
  for (int k = first; k < task.pieces * kNarrow * 8; k += threads) use(k / 8, k % 8 * 4);
}

// z_j = Σ_s W^k_sj v_s, summed over the warps that share the keys, then over the blocks in the order of their ranks.
template <class T, class Peers>
SFK_DEVICE void pool_values(const AttentionParams& p, const NarrowHead& head, const KeyShare& keys,
                            const NarrowShared<T>& shared, const Peers& peers) {
  const ValueRows<T> values(p, head, keys, shared);
  const int width = shared.v_length - kShift<T>, all = kUsual / kNarrow * (width / kNarrow), ranks = peers.size();
#pragma unroll 1
  for (int done = 0; done < all; done += block_warps()) {
    const PoolTask task(width, done);
    const auto store = [&](int row, int e, const Vec4& sum) {
      const int piece = done + row / kNarrow, j = task.reference(piece) + row % kNarrow,
                column = task.column(piece) + e;
      if (j < head.M && column < p.E) *reinterpret_cast<Vec4*>(at(p.z, head.b, head.h, j, column)) = sum;
    };
    if (done > 0) values.fetch_first();
    pool_piece(shared, values, task);
    sync_block();
    each_of_parts(task, thread_index(), block_threads(), [&](int row, int e) {
      const int place = row * kPartRow + e;
      Vec4 sum = {};
#pragma unroll 4
      for (int s = 0; s < task.sharing; ++s)
        sum = sum_of(sum, *reinterpret_cast<const Vec4*>(shared.part + s * task.pieces * kNarrow * kPartRow + place));
      if (ranks == 1) return store(row, e, sum);
      *reinterpret_cast<Vec4*>(peers.own(shared.part, kPartsAt) + place) = sum;
    });
    peers.sync();
    if (ranks == 1) continue;
    each_of_parts(task, peers.rank() * block_threads() + thread_index(), ranks * block_threads(), [&](int row, int e) {
      Vec4 sum = {}, found[kMostRanks];
      const auto part = [&](int r) {
        return *reinterpret_cast<const Vec4*>(peers.of(r, shared.part, kPartsAt) + row * kPartRow + e);
      };
      each_rank(found, Vec4{}, part, ranks);
#pragma unroll
      for (int r = 0; r < kMostRanks; ++r) sum = sum_of(sum, found[r]);
      store(row, e, sum);
    });
    peers.sync();
  }
}

}  // namespace
}  // namespace sfk
