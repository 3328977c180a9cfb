// A warp's tile of 16 tokens: from a strided tensor to shared memory, and its products.
//
// Products leave a lane with rows g, g + 8 (g = lane/4) and columns 2t, 2t + 1 (t = lane%4) of every 8 columns, as the
// tensor cores do; float32 tokens, which those would round, are multiplied the ordinary way into the same places.
#pragma once
#include "columns.cuh"

namespace sfk {
namespace {

constexpr int kTile = 16;     // tokens of a tile: the rows of a tensor-core product
constexpr int kColumns = 64;  // columns of products in registers at a time: 32 registers a thread
constexpr int kNarrow = 32;   // the same where the weights take registers too
constexpr int kUsual = 64;    // references, padded, that kernels of 16 bits are compiled for: the default, one chunk

// What a lane has of a tile's products with kColumns references or less: rows g and g + 8.
using Chunk = float[kColumns / 8][4];

// 16 bytes: they shift a row by four banks, so that eight rows lie in different ones.
template <class T>
constexpr int kShift = 16 / sizeof(T);

SFK_BOTH constexpr int padded(int64_t n) { return static_cast<int>((n + kTile - 1) / kTile) * kTile; }
// The number of references, padded, that a kernel of T is compiled for; 0 where there is only the one that takes any.
template <class T>
constexpr int kCompiled = sizeof(T) == 2 ? kUsual : 0;
// The same for the kernel that takes M of them.
template <class T>
constexpr int known_references(int64_t M) {
  return padded(M) == kCompiled<T> ? kCompiled<T> : 0;
}
// Numbers of a row of `depth` in shared memory.
template <class T>
SFK_BOTH int row_length(int64_t depth) {
  return padded(depth) + kShift<T>;
}

struct alignas(8) Vec2 {
  float x, y;
};

// One head's rows of a tensor [B,H,N,width].
template <class T>
struct Rows {
  T* base;
  int64_t row, column;
  int width;
  bool vector;  // 16 bytes at a time
  SFK_DEVICE Rows(const View& v, int64_t b, int64_t h)
      : base(static_cast<T*>(v.data) + b * v.stride[0] + h * v.stride[1]),
        row(v.stride[2]),
        column(v.stride[3]),
        width(static_cast<int>(v.size[3])),
        vector(column == 1 && row % kShift<T> == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0) {}
};

// Rows first.. to shared memory [rows, ld], by `step` threads of which this is number `index`.  Zeros beyond the width
// and for rows that are absent: from `count` on, and where the log mass is −∞.
template <class T>
SFK_DEVICE void stage(const Rows<T>& from, T* to, int ld, int rows, int64_t first, int64_t count, const float* mass,
                      int index, int step) {
  const int chunks = (ld - kShift<T>) / kShift<T>, down = step / chunks, along = step % chunks;
  int i = index / chunks, chunk = index % chunks;
#pragma unroll 1
  for (; i < rows; i += down, chunk += along) {
    if (chunk >= chunks) {  // a row further: cheaper than a division for every 16 bytes
      chunk -= chunks;
      if (++i >= rows) break;
    }
    const int d = chunk * kShift<T>;
    const bool present = i < count && (!mass || mass[i] != kNone);
    const T* src = from.base + (first + i) * from.row + d * from.column;
    T* dst = to + i * ld + d;
    if (present && from.vector && d + kShift<T> <= from.width) {
      copy16_async(dst, src);
      continue;
    }
#pragma unroll 1
    for (int c = 0; c < kShift<T>; ++c) dst[c] = present && d + c < from.width ? src[c * from.column] : T{};
  }
}

// Lane t of four has words 0..3; afterwards word t of lanes 0..3.
SFK_DEVICE void transpose_words(uint32_t (&w)[4]) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int low = mask == 1 ? 2 * k : k, high = low + mask;
      const bool odd = lane_index() & mask;
      const uint32_t got = shuffle_xor(odd ? w[low] : w[high], mask);
      if (odd)
        w[low] = got;
      else
        w[high] = got;
    }
}

// A tile's products, kNarrow columns from e0 on, rounded to the rows of `to` from `first` on, as many as there are:
// 16 bytes at a time where they lie so.
template <class T>
SFK_DEVICE void store_tile(const Rows<T>& to, int64_t first, int64_t count, int e0,
                           const float (&acc)[kNarrow / 8][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  if constexpr (sizeof(T) == 2) {
    if (to.vector && e0 + kNarrow <= to.width) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = pack<T>(acc[n][2 * r], acc[n][2 * r + 1]);
        transpose_words(w);
        T* row = to.base + (first + g + 8 * r) * to.row + e0;
        if (g + 8 * r < count) *reinterpret_cast<Bits4*>(row + 8 * t) = {w[0], w[1], w[2], w[3]};
      }
      return;
    }
  }
#pragma unroll
  for (int n = 0; n < kNarrow / 8; ++n)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = g + k / 2 * 8, e = e0 + n * 8 + 2 * t + k % 2;
      if (i < count && e < to.width) to.base[(first + i) * to.row + e * to.column] = rounded<T>(acc[n][k]);
    }
}

// 1/‖x‖ of the tile's row lane/2, 0 where ‖x‖ ≤ 1e-12.
template <class T>
SFK_DEVICE float inverse_norm(const T* x, int ld, int depth) {
  const T* row = x + lane_index() / 2 * ld;
  float sum = 0;
  for (int d = lane_index() % 2; d < depth; d += 2) sum += to_float(row[d]) * to_float(row[d]);
  sum += shuffle_xor(sum, 1);
  return sum > 1e-24f ? 1 / sqrtf(sum) : 0.0f;
}

// acc += X Yᵀ of the tile X [16,depth] and 8·tiles rows of Y [.,depth].
template <class T>
SFK_DEVICE void rows_product(Chunk& acc, const T* x, const T* y, int ld, int depth, int tiles) {
  const int lane = lane_index();
#pragma unroll 1
  for (int k = 0; k < depth; k += kTile) {
    uint32_t a[4], b[4];
    load_matrices(a, x + lane % 16 * ld + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      if (n >= tiles) continue;
      load_matrices(b, y + (n * 8 + lane / 16 * 8 + lane % 8) * ld + k + lane / 8 % 2 * 8);
      multiply_add<T>(acc[n], a, b[0], b[1]);
      multiply_add<T>(acc[n + 1], a, b[2], b[3]);
    }
  }
}

SFK_DEVICE float dot(const Vec4& a, const Vec4& b, float c) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}

template <>
SFK_DEVICE void rows_product<float>(Chunk& acc, const float* x, const float* y, int ld, int depth, int tiles) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    const Vec4 x0 = *reinterpret_cast<const Vec4*>(x + g * ld + k);
    const Vec4 x1 = *reinterpret_cast<const Vec4*>(x + (g + 8) * ld + k);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n >= tiles) continue;
      const Vec4 y0 = *reinterpret_cast<const Vec4*>(y + (n * 8 + 2 * t) * ld + k);
      const Vec4 y1 = *reinterpret_cast<const Vec4*>(y + (n * 8 + 2 * t + 1) * ld + k);
      acc[n][0] = dot(x0, y0, acc[n][0]), acc[n][1] = dot(x0, y1, acc[n][1]);
      acc[n][2] = dot(x1, y0, acc[n][2]), acc[n][3] = dot(x1, y1, acc[n][3]);
    }
  }
}

// acc += A B of A [16,16] in registers and 8·tiles columns of rows B [16,.].
template <class T>
SFK_DEVICE void columns_product(float (&acc)[kNarrow / 8][4], const uint32_t (&a)[4], const T* b, int ld, int tiles) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < kNarrow / 8; n += 2) {
    if (n >= tiles) continue;
    uint32_t r[4];
    load_matrices_transposed(r, b + lane % 16 * ld + n * 8 + lane / 16 * 8);
    multiply_add<T>(acc[n], a, r[0], r[1]), multiply_add<T>(acc[n + 1], a, r[2], r[3]);
  }
}

// acc += (A + A') B, B read once.
template <class T>
SFK_DEVICE void columns_products(float (&acc)[kNarrow / 8][4], const uint32_t (&a)[4], const uint32_t (&also)[4],
                                 const T* b, int ld, int tiles) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < kNarrow / 8; n += 2) {
    if (n >= tiles) continue;
    uint32_t r[4];
    load_matrices_transposed(r, b + lane % 16 * ld + n * 8 + lane / 16 * 8);
    multiply_add<T>(acc[n], a, r[0], r[1]), multiply_add<T>(acc[n + 1], a, r[2], r[3]);
    multiply_add<T>(acc[n], also, r[0], r[1]), multiply_add<T>(acc[n + 1], also, r[2], r[3]);
  }
}

// acc += W B of weights W [16,depth], weight(i, k), and 8·tiles columns of rows B [depth,.].
template <class T, class Weight>
struct WeightsProduct {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], Weight weight, const T* b, int ld, int depth, int tiles) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int k = 0; k < depth; k += kTile) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = pack<T>(weight(g + i % 2 * 8, k + 2 * t + i / 2 * 8), weight(g + i % 2 * 8, k + 2 * t + i / 2 * 8 + 1));
      columns_product<T>(acc, a, b + k * ld, ld, tiles);
    }
  }
};

template <class Weight>
struct WeightsProduct<float, Weight> {
  SFK_DEVICE static void run(float (&acc)[kNarrow / 8][4], Weight weight, const float* b, int ld, int depth,
                             int tiles) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      const float w0 = weight(g, k), w1 = weight(g + 8, k);
#pragma unroll
      for (int n = 0; n < kNarrow / 8; ++n) {
        if (n >= tiles) continue;
        const Vec2 v = *reinterpret_cast<const Vec2*>(b + k * ld + n * 8 + 2 * t);
        acc[n][0] = fmaf(w0, v.x, acc[n][0]), acc[n][1] = fmaf(w0, v.y, acc[n][1]);
        acc[n][2] = fmaf(w1, v.x, acc[n][2]), acc[n][3] = fmaf(w1, v.y, acc[n][3]);
      }
    }
  }
};

template <class T, class Weight>
SFK_DEVICE void weights_product(float (&acc)[kNarrow / 8][4], Weight weight, const T* b, int ld, int depth, int tiles) {
  WeightsProduct<T, Weight>::run(acc, weight, b, ld, depth, tiles);
}

// acc += W B of weights in registers and 8·tiles columns of rows B [8·depth,.].
template <class T>
SFK_DEVICE void chunk_product(float (&acc)[kNarrow / 8][4], const Chunk& w, int depth, const T* b, int ld, int tiles) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; n += 2) {
    if (n >= depth) continue;
    // The places of a product's results are those of its left operand.
    const uint32_t a[4] = {pack<T>(w[n][0], w[n][1]), pack<T>(w[n][2], w[n][3]), pack<T>(w[n + 1][0], w[n + 1][1]),
                           pack<T>(w[n + 1][2], w[n + 1][3])};
    columns_product<T>(acc, a, b + n * 8 * ld, ld, tiles);
  }
}

// Where a row of numbers in 16 bits, two in the place of a float, keeps column j: every chunk of columns as high parts,
// then low parts.
SFK_DEVICE int half_place(int Mp, int j, bool low) {
  const int first = j / kColumns * kColumns, width = Mp - first < kColumns ? Mp - first : kColumns;
  return 2 * first + (j - first) + (low ? width : 0);
}

// Rows of logits in shared memory, of which eight lie in different banks: by 8 more numbers than a multiple of 32, or,
// of kUsual numbers exactly, by an order of each row's pieces of 16 bytes.
struct LogitRows {
  int stride;
  bool swizzled;

  static SFK_BOTH constexpr int padded_stride(int64_t M) { return (padded(M) + 23) / 32 * 32 + 8; }
  // Pieces of eight rows: 0, 2, 4, 6, 1, 3, 5, 7.  So the halves of four neighbouring rows that lanes read as pairs of
  // floats share no bank either.
  SFK_DEVICE static int turn(int i) { return (i & 3) * 8 + (i & 4); }
  SFK_DEVICE int turned(int j, int turn) const { return swizzled ? j ^ turn : j; }
  SFK_DEVICE int place(int i, int j) const { return i * stride + turned(j, turn(i)); }
  // turn(i) made anew: of a tile a lane has many places, and no registers to hold them from one tile to the next.
  SFK_DEVICE int turn_anew(int i) const { return swizzled ? turn(fresh(i)) : 0; }
};

// Weights of tokens and references, rounded to T for products, in the place of logits: of 16 bits two matrices have
// room there, each chunk of both where that chunk's floats were.
template <class T>
struct Weights {
  float* first;  // of the first token's row, which is a multiple of 8
  LogitRows rows;
  int Mp;
  bool second;  // of the two: in the places of low parts

  SFK_DEVICE T* at(int i, int j, int turn) const {
    T* row = reinterpret_cast<T*>(first + i * rows.stride);
    return row + rows.turned(sizeof(T) == 2 ? half_place(Mp, j, second) : j, 2 * turn);
  }
  // Of a row, two references side by side.
  SFK_DEVICE void store(int i, int j, int turn, float x, float y) const {
    if constexpr (sizeof(T) == 2)
      *reinterpret_cast<uint32_t*>(at(i, j, turn)) = pack<T>(x, y);
    else
      *reinterpret_cast<Vec2*>(at(i, j, turn)) = {x, y};
  }
  // acc += W B of 16 tokens and 8·tiles columns of rows B [Mp,.].
  SFK_DEVICE void times(float (&acc)[kNarrow / 8][4], const T* b, int ld, int tiles) const {
    if constexpr (sizeof(T) == 2) {
      const int turn = rows.turn_anew(lane_index());
#pragma unroll 1
      for (int k = 0; k < Mp; k += kTile) {
        uint32_t a[4];
        load_matrices(a, at(lane_index() % 16, k + lane_index() / 16 * 8, turn));
        columns_product<T>(acc, a, b + k * ld, ld, tiles);
      }
    } else {
      weights_product<T>(acc, [&](int i, int j) { return *at(i, j, 0); }, b, ld, Mp, tiles);
    }
  }
  // acc += Wᵀ B of 16 references from j0 on and 8·tiles columns of rows B [depth,.].
  SFK_DEVICE void transposed_times(float (&acc)[kNarrow / 8][4], int j0, const T* b, int ld, int depth,
                                   int tiles) const {
    if constexpr (sizeof(T) == 2) {
      const int lane = lane_index();
      const T* from = at(lane / 16 * 8 + lane % 8, j0 + lane / 8 % 2 * 8, rows.turn_anew(lane));
#pragma unroll 1
      for (int k = 0; k < depth; k += kTile) {
        uint32_t a[4];
        load_matrices_transposed(a, from + k * 2 * rows.stride);
        columns_product<T>(acc, a, b + k * ld, ld, tiles);
      }
    } else {
      weights_product<T>(acc, [&](int j, int i) { return *at(i, j0 + j, 0); }, b, ld, depth, tiles);
    }
  }
};

// One tile's tokens: x [16,ld] and 1/‖x‖ [16] in shared memory, the first one's index, how many there are, and the log
// masses of keys.
template <class T>
struct TileOf {
  const T* x;
  const float* inverse;
  int64_t first;
  int count;
  const float* mass;
  SFK_DEVICE bool present(int i) const { return i < count && (!mass || mass[i] != kNone); }
};

// Tiles of a warp in shared memory: one is on its way while another is worked on.
template <class T>
constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;  // two of float32 would take room from the logits

// What a warp needs to walk over tiles: tokens first.. first + count of a head, and room for kBuffers tiles and [16]
// norms.
template <class T>
struct Walk {
  Rows<T> from;
  int64_t first;
  int count, tiles;
  const float* mass;  // null: all take part
  bool norms;
  T* buffers;
  int ld;
  float* inverse;

  SFK_DEVICE void fetch(int tile, int buffer) const {
    const int i = tile * kTile;
    if (tile < tiles)
      stage(from, buffers + buffer * kTile * ld, ld, kTile, first + i, count - i, mass ? mass + i : nullptr,
            lane_index(), kWarp);
    copies_commit();
  }

  // visit(tile, tokens) for the tiles start, start + step, ..
  template <class Visit>
  SFK_DEVICE void each(int start, int step, Visit visit) const {
    constexpr bool ahead = kBuffers<T> == 2;
    int buffer = 0;
    if (ahead) fetch(start, 0);
#pragma unroll 1
    for (int tile = start; tile < tiles; tile += step) {
      fetch(ahead ? tile + step : tile, ahead ? buffer ^ 1 : 0);
      copies_wait<kBuffers<T> - 1>();
      sync_warp();
      const T* x = buffers + buffer * kTile * ld;
      const float scale = norms ? inverse_norm(x, ld, ld - kShift<T>) : 1.0f;
      if (lane_index() % 2 == 0) inverse[lane_index() / 2] = scale;
      sync_warp();
      const int i = tile * kTile;
      visit(tile, TileOf<T>{x, inverse, first + i, count - i, mass ? mass + i : nullptr});
      sync_warp();
      if (ahead) buffer ^= 1;
    }
  }
};

}  // namespace
}  // namespace sfk
