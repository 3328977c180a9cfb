// A warp's tile of 16 tokens: from a strided tensor to shared memory, its products, its logits.
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
  const int chunks = (ld - kShift<T>) / kShift<T>;
#pragma unroll 1
  for (int k = index; k < rows * chunks; k += step) {
    const int i = k / chunks, d = k % chunks * kShift<T>;
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
SFK_DEVICE void rows_product<float>(Chunk& acc, const float* x, const float* y, int ld, int depth,
                                    int tiles) {
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

// A problem and how its kernel is laid out.
struct ResidentParams : AttentionParams {
  int32_t references = 0, padded_references = 0, stride = 0, coordinates = 0;  // see Head
  int32_t problems = 1;  // batch elements that a cluster takes one after another, all of one head
  int64_t groups = 1;    // clusters of a head: ⌈B/problems⌉

  // Numbers of a row of logits: 8 more than a multiple of 32, so that rows share no banks.
  SFK_BOTH static constexpr int row_stride(int64_t M) { return (padded(M) + 23) / 32 * 32 + 8; }
  ResidentParams() = default;
  explicit ResidentParams(const AttentionParams& p)
      : AttentionParams(p),
        references(static_cast<int32_t>(p.M)),
        padded_references(padded(p.M)),
        stride(row_stride(p.M)),
        coordinates(p.ref_pos.data ? static_cast<int32_t>(p.P) : 0) {}
};

// The head's constants.
struct Head {
  int64_t b, h;
  int M, Mp, stride, P;
  bool rbf;
  float beta, inv_eps, inv_eps_low, lam_a, lam_b, tau2;  // 1/ε = inv_eps + inv_eps_low
  // known: Mp where the kernel was compiled for it, else 0.
  SFK_DEVICE Head(const ResidentParams& p, int64_t b_, int64_t h_, int known)
      : b(b_),
        h(h_),
        M(p.references),
        Mp(known ? known : p.padded_references),
        stride(known ? ResidentParams::row_stride(known) : p.stride),
        P(p.coordinates),
        rbf(p.kernel == KernelKind::rbf) {
    beta = hyper(p, kBandwidth), lam_a = hyper(p, kLambdaA), lam_b = hyper(p, kLambdaB);
    tau2 = hyper(p, kPositionScale), tau2 *= tau2;
    const double inverse = 1 / (p.hyper[kEpsilon].data ? double{read(p.hyper[kEpsilon], h)} : p.scalars[kEpsilon]);
    inv_eps = static_cast<float>(inverse), inv_eps_low = static_cast<float>(inverse - inv_eps);
  }
  SFK_DEVICE float hyper(const AttentionParams& p, Hyper which) const {
    return p.hyper[which].data ? read(p.hyper[which], h) : static_cast<float>(p.scalars[which]);
  }
  SFK_DEVICE float kappa(float product, float inverse) const {
    return rbf ? exp_approx(product * (inverse * beta) - beta) : product;
  }
  SFK_DEVICE float logit(float kappa) const { return (kappa - 1) * inv_eps + (kappa - 1) * inv_eps_low; }
};

// Positions of the tokens, [.,P]; null where the problem has none.
struct Positions {
  const float* base;
  int64_t row, column;
  SFK_DEVICE Positions(const View& v, const Head& head)
      : base(head.P ? at(v, head.b, head.h) : nullptr), row(v.stride[2]), column(v.stride[3]) {}
  SFK_DEVICE float coordinate(int64_t token, int c) const { return base[token * row + c * column]; }
  // Whether a token has a position: one that is NaN stands for none.
  SFK_DEVICE bool placed(int64_t token, int P) const {
    float sum = 0;
#pragma unroll 1
    for (int c = 0; c < P; ++c) sum += coordinate(token, c);
    return sum == sum;
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

// ℓ −= τ²‖p − π‖², coordinate by coordinate; nothing for tokens without a position.
template <class T>
SFK_DEVICE void place_chunk(const Head& head, const TileOf<T>& tile, const float* pi, const Positions& positions,
                            int first, int tiles, Chunk& l) {
  const int g = lane_index() / 4, j = first + 2 * (lane_index() % 4);
  bool placed[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    placed[r] = tile.present(g + 8 * r) && positions.placed(tile.first + g + 8 * r, head.P);
#pragma unroll 1
  for (int c = 0; c < head.P; ++c)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float p = placed[r] ? positions.coordinate(tile.first + g + 8 * r, c) : 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (n >= tiles) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float away = p - pi[(j + n * 8 + k) * head.P + c];
          if (placed[r]) l[n][2 * r + k] -= head.tau2 * (away * away);
        }
      }
    }
}

// ℓ + add of a tile and the references first.. first + 8·tiles, −∞ beyond M; top: raised to the maxima of the rows as far
// as this lane sees them.
template <class T>
SFK_DEVICE void chunk_logits(const Head& head, const TileOf<T>& tile, const T* y, int ld, const float* pi,
                             const Positions& positions, const float* add, int first, int tiles, Chunk& l,
                             float (&top)[2]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const float inverse[2] = {tile.inverse[g], tile.inverse[g + 8]};
  rows_product<T>(l, tile.x, y + first * ld, ld, ld - kShift<T>, tiles);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int j = first + n * 8 + 2 * t + e % 2;
      float x = kNone;
      if (j < head.M) x = head.logit(head.kappa(l[n][e], inverse[e / 2])) + (add ? add[j] : 0.0f);
      l[n][e] = x;
    }
  }
  if (head.P) place_chunk(head, tile, pi, positions, first, tiles, l);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], l[n][e]);
  }
}

// Maxima and sums of rows g and g + 8, for the four lanes that share them.
SFK_DEVICE void row_maxima(float (&x)[2]) {
  for (int mask = 1; mask < 4; mask *= 2)
    for (int r = 0; r < 2; ++r) x[r] = fmaxf(x[r], shuffle_xor(x[r], mask));
}
SFK_DEVICE void row_sums(float (&x)[2]) {
  for (int mask = 1; mask < 4; mask *= 2)
    for (int r = 0; r < 2; ++r) x[r] += shuffle_xor(x[r], mask);
}

// x -> e^{x − top}; adds to sum, and lowers `lowest` to the smallest finite x − top.
SFK_DEVICE void exp_chunk(Chunk& l, int tiles, const float (&top)[2], float (&sum)[2], float& lowest) {
  const float base[2] = {finite_or_zero(top[0]), finite_or_zero(top[1])};
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float below = l[n][e] - base[e / 2];
      if (below != kNone) lowest = fminf(lowest, below);
      l[n][e] = exp_approx(below);
      sum[e / 2] += l[n][e];
    }
  }
}

// Between a lane's registers and its places of a tile [16,stride].
SFK_DEVICE void store_chunk(const Head& head, const Chunk& l, int first, int tiles, float* out) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<Vec2*>(out + (g + r * 8) * head.stride + first + n * 8 + 2 * t) = {l[n][2 * r], l[n][2 * r + 1]};
  }
}
SFK_DEVICE void load_chunk(const Head& head, Chunk& l, int first, int tiles, const float* from) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Vec2 x = *reinterpret_cast<const Vec2*>(from + (g + r * 8) * head.stride + first + n * 8 + 2 * t);
      l[n][2 * r] = x.x, l[n][2 * r + 1] = x.y;
    }
  }
}

// 8-column pieces of the chunk that starts at `first`.
SFK_DEVICE int chunk_tiles(const Head& head, int first) {
  return (head.Mp - first < kColumns ? head.Mp - first : kColumns) / 8;
}

// e^{ℓ + add − top} of a tile (or ℓ + add itself) in out [16,stride], and all of it in `last` where the references are
// one chunk.  top and sum: of rows g and g + 8; returns the smallest finite ℓ + add − top that this lane saw.
template <class T>
SFK_DEVICE float tile_weights(const Head& head, const TileOf<T>& tile, const T* y, int ld, const float* pi,
                              const Positions& positions, const float* add, bool exponentials, float* out, Chunk& last,
                              float (&top)[2], float (&sum)[2]) {
  const bool one = head.Mp <= kColumns;
  float lowest = 0;
  top[0] = top[1] = kNone, sum[0] = sum[1] = 0;
#pragma unroll 1
  for (int first = 0; first < head.Mp; first += kColumns) {
    const int tiles = chunk_tiles(head, first);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) last[n][e] = 0;
    chunk_logits(head, tile, y, ld, pi, positions, add, first, tiles, last, top);
    if (!one || !exponentials) store_chunk(head, last, first, tiles, out);
  }
  row_maxima(top);
  if (!exponentials) return lowest;
#pragma unroll 1
  for (int first = 0; first < head.Mp; first += kColumns) {
    const int tiles = chunk_tiles(head, first);
    if (!one) load_chunk(head, last, first, tiles, out);
    exp_chunk(last, tiles, top, sum, lowest);
    store_chunk(head, last, first, tiles, out);
  }
  row_sums(sum);
  return lowest;
}

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
    copies_wait<0>();
  }
};

}  // namespace
}  // namespace sfk
