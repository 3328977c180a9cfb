// The logits of a tile of tokens, ℓ_ij = (κ(x_i, y_j) − 1)/ε − τ²‖p_i − π_j‖², and their exponentials: in registers
// where the references are one chunk, else by chunks through shared memory.
#pragma once
#include "tiles.cuh"

namespace sfk {
namespace {

// A problem and how its kernel is laid out.
struct ResidentParams : AttentionParams {
  int32_t references = 0, padded_references = 0, stride = 0, coordinates = 0;  // see Head
  int32_t problems = 1;  // batch elements that a cluster takes one after another, all of one head
  int32_t groups = 1;    // clusters of a head: ⌈B/problems⌉

  ResidentParams() = default;
  explicit ResidentParams(const AttentionParams& p)
      : AttentionParams(p),
        references(static_cast<int32_t>(p.M)),
        padded_references(padded(p.M)),
        stride(LogitRows::padded_stride(p.M)),
        coordinates(p.ref_pos.data ? static_cast<int32_t>(p.P) : 0) {}
};

// What a kernel was compiled for: so many references, padded (0: any), problems without positions and dropout, and,
// where it knows the references, rows of logits without padding.
struct Form {
  int known;
  bool plain, swizzled = false;
};

// The head's constants.
struct Head : LogitRows {
  int b, h;
  int M, Mp, P;
  bool rbf, dropped;
  float beta, inv_eps, inv_eps_low, lam_a, lam_b, tau2;  // 1/ε = inv_eps + inv_eps_low
  // What dβ and dε count κ(ĉ − 1) and κ from: where all dℓ sum to 0 from orthogonal vectors, whose values take most of
  // the weight off the rounding errors of dℓ.
  float middle_slope, middle;
  SFK_DEVICE Head(const ResidentParams& p, int b_, int h_, const Form& form)
      : LogitRows{!form.known     ? p.stride
                  : form.swizzled ? form.known
                                  : padded_stride(form.known),
                  form.known && form.swizzled},
        b(b_),
        h(h_),
        M(p.references),
        Mp(form.known ? form.known : p.padded_references),
        P(form.plain ? 0 : p.coordinates),
        rbf(p.kernel == KernelKind::rbf),
        dropped(!form.plain && p.dropout_p > 0) {
    beta = hyper(p, kBandwidth), lam_a = hyper(p, kLambdaA), lam_b = hyper(p, kLambdaB);
    tau2 = hyper(p, kPositionScale), tau2 *= tau2;
    middle = p.d_c.data ? 1.0f : kappa(0, 1), middle_slope = p.d_c.data ? 0.0f : -middle;
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

// ℓ −= τ²‖p − π‖², coordinate by coordinate; nothing for tokens without a position.
template <class T>
SFK_DEVICE void place_chunk(const Head& head, const TileOf<T>& tile, const float* pi, const Positions& positions,
                            int first, int tiles, Chunk& l) {
  const int g = lane_index() / 4, j = first + 2 * (lane_index() % 4);
  bool placed[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) placed[r] = tile.present(g + 8 * r) && positions.placed(tile.first + g + 8 * r, head.P);
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

// ℓ + add of a tile and the references first.. first + 8·tiles, −∞ beyond M; top: raised to the maxima of the rows as
// far as this lane sees them.
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
  const int g = lane_index() / 4, turn = head.turn_anew(g), low = head.turned(lane_index() % 4 * 2, turn & 4);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<Vec2*>(out + (g + r * 8) * head.stride + first + head.turned(n * 8, turn & 24) + low) = {
          l[n][2 * r], l[n][2 * r + 1]};
  }
}
SFK_DEVICE void load_chunk(const Head& head, Chunk& l, int first, int tiles, const float* from) {
  const int g = lane_index() / 4, turn = head.turn_anew(g), low = head.turned(lane_index() % 4 * 2, turn & 4);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Vec2 x = *reinterpret_cast<const Vec2*>(from + (g + r * 8) * head.stride + first +
                                                    head.turned(n * 8, turn & 24) + low);
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

}  // namespace
}  // namespace sfk
