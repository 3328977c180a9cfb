// One head's references, packed, and the tiles of kernel values and logits against them.
#pragma once
#include "base/explog.h"
#include "base/gemm.h"
#include "base/tiles.h"
#include "base/transpose.h"

namespace sfk {
namespace {

// Rows of a tile.  96 = 16 register tiles of 6 rows, so that packed X [96][64] and its tile [96][64] stay in L2 beside
// the references; tiles wider than 256 references take 48 to stay there.
inline int64_t tile_rows(int64_t Mp) { return Mp <= 256 ? 96 : 48; }

template <class F>
struct Refs {
  int64_t M, Mp, D, Dp, P;
  bool rbf;
  F beta, inv_eps, inv_eps_low, lam_a, lam_b, tau;  // 1/ε = inv_eps + inv_eps_low to twice the precision of F
  F middle;                                         // κ of orthogonal vectors, as `BoundedKernel` rounds it
  Buffer<F> yt;                                     // [Dp][Mp] ŷ transposed (raw y for "dot")
  Buffer<F> y;                                      // [Mp][Dp] the same by rows
  Buffer<F> inv_norm;                               // [Mp]
  Buffer<F> log_b, b;                               // [Mp] padded with −inf and 0
  Buffer<F> pos_t;                                  // [P][Mp] padded with the last reference's
  int64_t packed_head = -1;

  explicit Refs(const AttentionParams& p) : Refs(p.M, p.D, p.ref_pos ? p.P : 0, p.kernel == KernelKind::rbf) {}
  Refs(int64_t M_, int64_t D_, int64_t P_, bool rbf_)
      : M(M_),
        Mp(pad<F>(M_)),
        D(D_),
        Dp(pad<F>(D_)),
        P(P_),
        rbf(rbf_),
        yt(Dp * Mp),
        y(Mp * Dp),
        inv_norm(Mp),
        log_b(Mp),
        b(Mp),
        pos_t(P_ * Mp) {}

  void pack(const AttentionParams& p, int64_t h) {
    if (h == packed_head) return;
    pack_numbers(p, h);
    pack_points(p.references, h);
  }

  // All of a head but its references themselves.
  void pack_numbers(const AttentionParams& p, int64_t h) {
    if (h == packed_head) return;
    packed_head = h;
    const auto value = [&](int i) {
      F given = static_cast<F>(p.scalars[i]);
      if (p.hyper[i]) load_row(p.hyper[i], h * p.hyper[i].stride[0], 1, 1, &given);
      return given;
    };
    set_kernel(value(kBandwidth), p.hyper[kEpsilon] ? static_cast<double>(value(kEpsilon)) : p.scalars[kEpsilon]);
    lam_a = value(kLambdaA);
    lam_b = value(kLambdaB);
    tau = value(kPositionScale);
    fill(log_b.data(), Mp, -kInf<F>);
    fill(log_b.data(), M, -std::log(static_cast<F>(M)));
    if (p.log_b) load_row<F>(p.log_b, h * p.log_b.stride[0], p.log_b.stride[1], M, log_b);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) store(b + j, vexp<F>(load(log_b + j)));
    Buffer<F> pos(P);
    for (int64_t j = 0; P && j < Mp; ++j) {
      load_row_of<F>(p.ref_pos, 0, h, std::min(j, M - 1), pos);
      for (int64_t c = 0; c < P; ++c) pos_t[c * Mp + j] = pos[c];
    }
  }

  // ℓ of orthogonal vectors at one place.
  F middle_logit() const { return (middle - 1) * inv_eps; }

  // The least ℓ of any token, as β and ε alone tell; −inf where they do not.  The largest is 0.
  F least() const { return rbf && !P ? static_cast<F>(std::expm1(-2.0 * beta)) * inv_eps : -kInf<F>; }

  // Whether no token's e^ℓ is far from 1, so that it needs no unit of its own.  With one reference every weight is 1,
  // and exactly so where it is e^{ℓ − m}.
  bool near() const { return M > 1 && least() >= -kNear; }
  F least_power() const { return least() - middle_logit(); }  // log of the smallest K (`weights_of`)
  static constexpr F kNear = 24;

  void set_kernel(F bandwidth, double epsilon) {
    beta = bandwidth;
    middle = rbf ? lane<F>(vpower<F>(splat(static_cast<F>(-kPowerUnit<F> * beta))), 0) : F(0);
    inv_eps = static_cast<F>(1 / epsilon);
    inv_eps_low = static_cast<F>(1 / epsilon - static_cast<double>(inv_eps));
  }

  void pack_points(const View& points, int64_t h) {
    fill(y.data(), Mp * Dp, F(0));
    for (int64_t j = 0; j < M; ++j) load_row_of<F>(points, 0, h, j, y + j * Dp);
    for (int64_t j = 0; rbf && j < M; ++j) {  // in double: an error of ŷ's length would be the same for every token
      double parts[kLanes<F>] = {}, sum = 0;
      for (int64_t d = 0; d < Dp; d += kLanes<F>)
        for (int i = 0; i < kLanes<F>; ++i) parts[i] += static_cast<double>(y[j * Dp + d + i]) * y[j * Dp + d + i];
      for (const double part : parts) sum += part;
      const double inv = sum <= 1e-24 ? 0 : 1 / std::sqrt(sum);
      inv_norm[j] = static_cast<F>(inv);
      for (int64_t d = 0; d < D; ++d) y[j * Dp + d] = static_cast<F>(y[j * Dp + d] * inv);
    }
    transpose<F>(Mp, Dp, y, Dp, yt, Mp);
  }
};

// κ of a token and a unit vector from their product, and e^{(κ − centre)/ε}: e^ℓ, where that is all there is of ℓ, for
// centre 1.
template <class F>
struct BoundedKernel {
  F centre, away, slope, slope_low;

  explicit BoundedKernel(const Refs<F>& r, F centre_ = 1) : centre(centre_) {
    const double exact = kPowerUnit<F> * (static_cast<double>(r.inv_eps) + r.inv_eps_low);
    away = static_cast<F>(kPowerUnit<F> * r.beta);
    slope = static_cast<F>(exact), slope_low = static_cast<F>(exact - slope);
  }
  // scale: away/‖x‖.
  SFK_INLINE Vec<F> kappa(Vec<F> product, F scale) const { return vpower<F>(product * scale - away); }
  SFK_INLINE Vec<F> power(Vec<F> kappa) const {
    const Vec<F> d = kappa - centre;
    return vpower<F>(d * slope + d * slope_low);
  }
  SFK_INLINE Vec<F> operator()(Vec<F> product, F scale) const { return power(kappa(product, scale)); }
};

// κ(x_i, y_j) of the n rows x [n][Dp]; inv = 1/‖x_i‖ (rbf).
template <class F>
void kernel_tile(const Refs<F>& r, int64_t n, Rows<F> x, const F* inv, F* kappa, Ahead* ahead = nullptr) {
  const int64_t Mp = r.Mp;
  gemm<F>(n, Mp, r.D, x.at, x.ld, 1, r.yt, Mp, kappa, Mp, false, ahead);
  if (!r.rbf) return;
  const BoundedKernel<F> kernel(r);
  for (int64_t i = 0; i < n; ++i) {
    const F along = kernel.away * inv[i];
    F* row = kappa + i * Mp;
    for (int64_t j = 0; j < Mp; j += kLanes<F>) store(row + j, kernel.kappa(load(row + j), along));
  }
}

// How many coordinates count for a token: all, or none where it has no position (NaN).
template <class F>
int64_t coordinates(const Refs<F>& r, const F* pos) {
  for (int64_t c = 0; c < r.P; ++c)
    if (std::isnan(pos[c])) return 0;
  return r.P;
}

// ‖p − π_j‖² of the P coordinates of one token, for the references from j on.
template <class F>
Vec<F> squared_distance(const Refs<F>& r, int64_t P, const F* pos, int64_t j) {
  Vec<F> sum{};
  for (int64_t c = 0; c < P; ++c) {
    const Vec<F> away = pos[c] - load(r.pos_t + c * r.Mp + j);
    sum += away * away;
  }
  return sum;
}

// Σ_j dℓ_j ‖p − π_j‖² of one token, whose dℓ sum to `total` but for rounding: a squared distance of thousands would
// multiply that error.  So squares count from the smallest on, and the smallest times the exact sum.
template <class F>
F distance_sum(const Refs<F>& r, int64_t P, const F* pos, const F* d_logits, F total) {
  Vec<F> lowest = splat(kInf<F>), sum{};
  for (int64_t j = 0; j < r.Mp; j += kLanes<F>) lowest = vmin(lowest, squared_distance<F>(r, P, pos, j));
  const F nearest = reduce_min<F>(lowest);
  for (int64_t j = 0; j < r.Mp; j += kLanes<F>)
    sum += load(d_logits + j) * (squared_distance<F>(r, P, pos, j) - nearest);
  return reduce_add<F>(sum) + nearest * total;
}

// ℓ = (κ − 1)/ε − τ²‖p − π‖² of the n rows with positions pos [n][P].  κ and ℓ may be the same tile.
template <class F>
void logit_tile(const Refs<F>& r, int64_t n, const F* kappa, const F* pos, F* logits) {
  const int64_t Mp = r.Mp;
  const F tau2 = r.tau * r.tau;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t P = coordinates(r, pos + i * r.P);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> d = load(kappa + i * Mp + j) - F(1);
      Vec<F> l = d * r.inv_eps + d * r.inv_eps_low;
      for (int64_t c = 0; c < P; ++c) {
        const Vec<F> away = pos[i * r.P + c] - load(r.pos_t + c * Mp + j);
        l -= tau2 * (away * away);
      }
      store(logits + i * Mp + j, l);
    }
  }
}

// Logits where κ is not needed again: both steps in one sweep over the tile.
template <class F>
void logits_of(const Refs<F>& r, int64_t n, Rows<F> x, const F* inv, const F* pos, F* tile, Ahead* ahead = nullptr) {
  if (!r.rbf || r.P) {
    kernel_tile<F>(r, n, x, inv, tile, ahead);
    return logit_tile<F>(r, n, tile, pos, tile);
  }
  gemm<F>(n, r.Mp, r.D, x.at, x.ld, 1, r.yt, r.Mp, tile, r.Mp, false, ahead);
  const BoundedKernel<F> kernel(r);
  for (int64_t i = 0; i < n; ++i, tile += r.Mp) {
    const F along = kernel.away * inv[i];
    for (int64_t j = 0; j < r.Mp; j += kLanes<F>) {
      const Vec<F> d = kernel.kappa(load(tile + j), along) - F(1);
      store(tile + j, d * r.inv_eps + d * r.inv_eps_low);
    }
  }
}

// K = of(i)(from) of row i, or of kWeighed its entries times g, and K g [n]; from and tile may be the same.
template <bool kWeighed, class F, class Of>
SFK_INLINE void power_rows(const Refs<F>& r, int64_t n, const F* from, F* tile, const F* g, F* dots, Of of) {
  for (int64_t i = 0; i < n; ++i, from += r.Mp, tile += r.Mp) {
    const auto power = of(i);
    Vec<F> sum{};
    for (int64_t j = 0; j < r.Mp; j += kLanes<F>) {
      const Vec<F> K = power(load(from + j)), w = K * load(g + j);
      sum += w;
      store(tile + j, kWeighed ? w : K);
    }
    dots[i] = reduce_add<F>(sum);
  }
}

// K = e^{ℓ − middle_logit()} from κ, of tokens whose logits are near.  Most lie about the middle, so that K and its
// logarithms are small numbers, rounded as such.  Columns without a reference get some number of that size, too; their
// g is 0.
template <bool kWeighed, class F>
void powers_of(const Refs<F>& r, int64_t n, const F* kappa, F* tile, const F* g, F* dots) {
  const BoundedKernel<F> kernel(r, r.middle);
  power_rows<kWeighed, F>(r, n, kappa, tile, g, dots,
                          [&](int64_t) { return [&](Vec<F> k) { return kernel.power(k); }; });
}

// The same from the tokens.
template <bool kWeighed, class F>
void weights_of(const Refs<F>& r, int64_t n, Rows<F> x, const F* inv, F* tile, const F* g, F* dots, Ahead* ahead) {
  gemm<F>(n, r.Mp, r.D, x.at, x.ld, 1, r.yt, r.Mp, tile, r.Mp, false, ahead);
  const BoundedKernel<F> kernel(r, r.middle);
  power_rows<kWeighed, F>(r, n, tile, tile, g, dots, [&](int64_t i) {
    return [&kernel, along = kernel.away * inv[i]](Vec<F> product) { return kernel(product, along); };
  });
}

}  // namespace
}  // namespace sfk
