// What stays on the chip: a cluster of blocks has one head, each block a share of its keys, whose logits ℓ or
// K = e^{ℓ − row maximum} lie in shared memory from the one reading of the keys to the end.
#pragma once
#include "logits.cuh"

namespace sfk {
namespace {

constexpr int kThreads = 256;  // the most of a block
// Blocks of the forward kernel that a processor's registers hold: two where the number of references is known.
constexpr int blocks_a_processor(int known) { return known ? 2 : 1; }
constexpr int kValueRows = 64;         // values in shared memory at a time, twice
constexpr int kPartRow = kNarrow + 8;  // a row of a part of z: a quarter of the banks further than the one before

// A kernel's parameters.  Where things lie in shared memory comes from the host: read from constant memory where it is
// used, it takes no registers.
template <class Shared>
struct Launch : ResidentParams {
  Shared shared;
  using ResidentParams::ResidentParams;
};

// What one block holds of a head: so many keys (a multiple of 16), and so many steps of tokens at a time (backward).
struct BlockShape {
  int rows, warps, buffers;
};

// What forward and backward keep of a head and of its keys.
template <class T>
struct HeadShared {
  int rows, y_length, v_length;
  Place<float> l;                         // [rows,stride] or more: ℓ, or K
  Place<T> y, staged;                     // ŷ [Mp,y_length]; tiles of tokens
  Place<float> log_a, top;                // [rows] log masses, row maxima
  Place<float> log_b, pi;                 // [Mp] [Mp,P]
  Place<float> inverse, scratch, lowest;  // [warps,16] [warps] [1]

  HeadShared() = default;
  HeadShared(Arena& arena, const AttentionParams& p, const BlockShape& block, int stride, int64_t least,
             int64_t tokens_)
      : rows(block.rows), y_length(row_length<T>(p.D)), v_length(row_length<T>(p.E)) {
    const int Mp = padded(p.M), warps = block.warps;
    const int64_t logits = static_cast<int64_t>(rows) * stride;
    l = arena.take(logits > least ? logits : least);
    y = arena.take<T>(Mp * y_length), staged = arena.take<T>(tokens_);
    log_a = arena.take(rows), top = arena.take(rows);
    log_b = arena.take(Mp), pi = arena.take(Mp * (p.ref_pos.data ? p.P : 0));
    inverse = arena.take(warps * kTile), scratch = arena.take(warps), lowest = arena.take(1);
  }
};

// Shared memory of a block, forward.
template <class T>
struct AttentionShared : HeadShared<T> {
  Place<T> z;                          // [Mp,v_length]
  Place<float> part;                   // [warps,16,kPartRow] of z; lies where z will
  Place<float> weight, g, G, c;        // [rows] f or u; [Mp]
  Place<float> peaks, factor;          // [Mp] of the columns' sums; what the plan's columns are multiplied by
  Place<float> part_peak, part_total;  // see ColumnSums
  Place<float> peak, total;            // [2,Mp]

  static int64_t staged_numbers(const AttentionParams& p, int warps) {
    const int64_t tiles = warps * kBuffers<T> * kTile * row_length<T>(p.D),
                  values = 2 * kValueRows * row_length<T>(p.E);
    return tiles > values ? tiles : values;
  }
  AttentionShared() = default;
  AttentionShared(Arena& arena, const AttentionParams& p, const BlockShape& block)
      : HeadShared<T>(arena, p, block, LogitRows::padded_stride(p.M),
                      int64_t{block.warps} * kTile * LogitRows::padded_stride(p.M), staged_numbers(p, block.warps)) {
    const int warps = block.warps, rows_ = block.rows;
    const int M = static_cast<int>(p.M), Mp = padded(M), sharing = Strips(M, warps).sharing;
    const int pooled = Mp * this->v_length,
              parts = warps * kTile * kPartRow * static_cast<int>(sizeof(float) / sizeof(T));
    z = arena.take<T>(pooled > parts ? pooled : parts);
    part.at = z.at;
    weight = arena.take(rows_), g = arena.take(Mp), G = arena.take(Mp), c = arena.take(Mp);
    peaks = arena.take(Mp), factor = arena.take(Mp);
    peak = arena.take(2 * Mp), total = arena.take(2 * Mp);
    part_peak = arena.take(sharing * M), part_total = arena.take(sharing * M);
  }
};

// The keys of this block.
struct KeyShare {
  int64_t first;
  int count;
  // In 32 bits, as all lengths here are: a division of 64 costs a hundred instructions.
  SFK_BOTH static int each(int64_t S, int ranks) { return (static_cast<int>(S) + ranks - 1) / ranks; }
  SFK_DEVICE explicit KeyShare(int64_t S, int rank = cluster_rank(), int ranks = cluster_size()) {
    const int all = static_cast<int>(S), share = each(S, ranks), start = rank * share;
    first = start < all ? start : all;
    count = start + share < all ? share : all - static_cast<int>(first);
  }
};

// The head of this cluster and its batch elements: group number `group` of them.
struct Problems {
  int h, group, first, end;
  SFK_DEVICE explicit Problems(const ResidentParams& p) {
    const int cluster = static_cast<int>(block_index()) / cluster_size(), B = static_cast<int>(p.B);
    h = cluster / p.groups, group = cluster % p.groups, first = group * p.problems;
    end = first + p.problems < B ? first + p.problems : B;
  }
};

// ŷ (y for "dot"), log b and π of the head.
template <class T>
SFK_DEVICE void load_references(const AttentionParams& p, const Head& head, const HeadShared<T>& shared) {
  const int D = static_cast<int>(p.D), depth = shared.y_length - kShift<T>;
#pragma unroll 1
  for (int j = warp_index(); j < head.Mp; j += block_warps()) {
    float square = 0;
    for (int d = lane_index(); j < head.M && d < D; d += kWarp) {
      const float y = read(p.references, head.h, j, d);
      square += y * y;
    }
    square = warp_sum(square);
    const float scale = !head.rbf ? 1.0f : square > 1e-24f ? 1 / sqrtf(square) : 0.0f;
    for (int d = lane_index(); d < depth; d += kWarp)
      shared.y[j * shared.y_length + d] =
          rounded<T>(j < head.M && d < D ? read(p.references, head.h, j, d) * scale : 0.0f);
  }
  const float uniform = -logf(static_cast<float>(head.M));
  for (int j = thread_index(); j < head.Mp; j += block_threads()) {
    shared.log_b[j] = j >= head.M ? kNone : p.log_b.data ? read(p.log_b, head.h, j) : uniform;
#pragma unroll 1
    for (int c = 0; c < head.P; ++c) shared.pi[j * head.P + c] = j < head.M ? read(p.ref_pos, head.h, j, c) : 0.0f;
  }
}

// log a of this block's keys.
template <class T>
SFK_DEVICE void load_masses(const AttentionParams& p, const Head& head, const KeyShare& keys,
                            const HeadShared<T>& shared) {
  const float mass = -logf(static_cast<float>(p.S));
  for (int i = thread_index(); i < shared.rows; i += block_threads())
    shared.log_a[i] = i >= keys.count ? kNone : p.log_a.data ? read(p.log_a, head.b, head.h, keys.first + i) : mass;
}

// This warp's way over tokens first.. first + count of a head, in tiles up to `padded_count`.
template <class T>
SFK_DEVICE Walk<T> walk_over(const Rows<T>& from, const Head& head, const HeadShared<T>& shared, int64_t first,
                             int count, int padded_count, const float* mass) {
  T* buffers = shared.staged + warp_index() * kBuffers<T> * kTile * shared.y_length;
  float* inverse = shared.inverse + warp_index() * kTile;
  return {from, first, count, padded_count / kTile, mass, head.rbf, buffers, shared.y_length, inverse};
}

// The keys' logits less their rows' maxima m or, scaled, K and lowest = min ℓ − m of this block.  What a row's logits
// share, as a long way to every reference, cancels before it costs digits.
template <class T>
SFK_DEVICE void load_keys(const AttentionParams& p, const Head& head, const KeyShare& keys, const HeadShared<T>& shared,
                          bool scaled) {
  const Positions positions(p.key_pos, head);
  float lowest = 0;
  const auto walk =
      walk_over(Rows<T>(p.key, head.b, head.h), head, shared, keys.first, keys.count, shared.rows, shared.log_a);
  walk.each(warp_index(), block_warps(), [&](int tile, const TileOf<T>& x) {
    const int g = lane_index() / 4;
    float top[2], sum[2], *out = shared.l + tile * kTile * head.stride, *tops = shared.top + tile * kTile;
    Chunk l;
    lowest = fminf(lowest, tile_weights<T>(head, x, shared.y, shared.y_length, shared.pi, positions, nullptr, scaled,
                                           out, l, top, sum));
    if (lane_index() % 4 == 0) tops[g] = top[0], tops[g + 8] = top[1];
  });
  lowest = -block_max(-lowest, shared.scratch);
#pragma unroll 1
  for (int i = warp_index(); !scaled && i < shared.rows; i += block_warps())
    for (int j = lane_index(); j < head.Mp; j += kWarp) shared.l[head.place(i, j)] -= finite_or_zero(shared.top[i]);
  if (thread_index() == 0) *shared.lowest = lowest;
}

}  // namespace
}  // namespace sfk
