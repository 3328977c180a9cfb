// From dℓ and dκ of a tile to the gradients of tokens, references and hyperparameters: what the backward passes share.
#pragma once
#include "logits.h"

namespace sfk {
namespace {

// What one thread collects for the gradients of one head's references and hyperparameters.
template <class F>
struct RefGrads {
  Buffer<F> y;    // [Mp][Dp] with respect to ŷ (y for "dot")
  Buffer<F> pos;  // [P][Mp]
  double hyper[kNumHyper];
  bool wants_points, wants_hyper;
  bool balanced = false;  // all dℓ sum to 0: moving κ by `middle` only takes weight off their rounding errors
  RefGrads(const Refs<F>& r, bool points, bool hypers)
      : y(r.Mp * r.Dp), pos(r.P * r.Mp), wants_points(points), wants_hyper(hypers) {}
  void clear(const Refs<F>& r) {
    fill(y.data(), r.Mp * r.Dp, F(0));
    fill(pos.data(), r.P * r.Mp, F(0));
    std::fill(hyper, hyper + kNumHyper, 0.0);
  }
  void add(const Refs<F>& r, const RefGrads& other) {
    for (int64_t i = 0; i < r.Mp * r.Dp; ++i) y[i] += other.y[i];
    for (int64_t i = 0; i < r.P * r.Mp; ++i) pos[i] += other.pos[i];
    for (int i = 0; i < kNumHyper; ++i) hyper[i] += other.hyper[i];
  }
};

// Sums over one tile of dℓ for ε, τ and π; totals [n]: what the rows of dℓ sum to, null for 0.
template <class F>
void logit_grads(const Refs<F>& r, int64_t n, const F* kappa, const F* pos, const F* d_logits, const F* totals,
                 RefGrads<F>& out) {
  const int64_t Mp = r.Mp;
  if (!out.wants_hyper && r.P == 0) return;
  const F middle = out.balanced ? r.middle : F(1);
  double d_eps_sum = 0, d_tau_sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    Vec<F> d_eps{};
    const int64_t P = coordinates(r, pos + i * r.P);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> dl = load(d_logits + i * Mp + j);
      d_eps += dl * (load(kappa + i * Mp + j) - middle);
      for (int64_t c = 0; c < P; ++c) {
        const Vec<F> d = pos[i * r.P + c] - load(r.pos_t + c * Mp + j);
        store(out.pos + c * Mp + j, load(out.pos + c * Mp + j) + dl * d);
      }
    }
    d_eps_sum += reduce_add<F>(d_eps);
    if (P) d_tau_sum += distance_sum<F>(r, P, pos + i * r.P, d_logits + i * Mp, totals ? totals[i] : F(0));
  }
  out.hyper[kEpsilon] -= d_eps_sum * r.inv_eps * r.inv_eps;
  out.hyper[kPositionScale] -= 2.0 * r.tau * d_tau_sum;
}

// From dκ/unit [n][Mp] (overwritten): adds to dŷ and dβ, and gives dx [n][Dp] where its place is not null.
template <class F>
void kernel_grads(const Refs<F>& r, int64_t n, Rows<F> x, const F* inv, const F* kappa, F* d_kappa, F unit,
                  Place<F> d_x, RefGrads<F>& out) {
  const int64_t Mp = r.Mp, Dp = r.Dp;
  if (r.rbf) {
    const F middle = out.balanced ? -r.beta * r.middle : F(0);  // of κ log κ
    double d_beta_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> d_beta{};
      const F scale = r.beta * inv[i] * unit;
      for (int64_t j = 0; j < Mp; j += kLanes<F>) {
        const Vec<F> k = load(kappa + i * Mp + j), d = load(d_kappa + i * Mp + j), g = d * k;
        // dκ/dβ = κ log κ / β; where κ underflowed, so did g.
        if (out.wants_hyper) d_beta += g * vlog<F>(vmax(k, splat(std::numeric_limits<F>::min()))) - d * middle;
        store(d_kappa + i * Mp + j, g * scale);
      }
      if (out.wants_hyper) d_beta_sum += reduce_add<F>(d_beta);
    }
    out.hyper[kBandwidth] += d_beta_sum / r.beta * unit;
  } else {
    for (int64_t i = 0; i < n * Mp; ++i) d_kappa[i] *= unit;
  }
  if (out.wants_points) gemm<F>(r.M, Dp, n, d_kappa, 1, Mp, x.at, x.ld, out.y, Dp, true);
  if (!d_x.at) return;
  gemm<F>(n, Dp, r.M, d_kappa, Mp, 1, r.y, Dp, d_x.at, d_x.ld, false);
  for (int64_t i = 0; r.rbf && i < n; ++i) {
    F* const row = d_x.at + i * d_x.ld;
    Vec<F> acc{};
    for (int64_t d = 0; d < Dp; d += kLanes<F>) acc += load(x[i] + d) * inv[i] * load(row + d);
    const F along = reduce_add<F>(acc);
    for (int64_t d = 0; d < Dp; d += kLanes<F>) store(row + d, load(row + d) - load(x[i] + d) * inv[i] * along);
  }
}

// From dℓ [n][Mp] (overwritten) of rows row0.. of tokens: adds to dŷ and dβ, and writes d_tokens where it is asked for.
template <class F>
void token_grads(const Refs<F>& r, int64_t b, int64_t h, int64_t row0, int64_t n, Rows<F> x, const F* inv,
                 const F* kappa, F* d_logits, const View& d_tokens, F* room, RefGrads<F>& out) {
  const Place<F> d_x = place_of<F>(d_tokens, b, h, row0, d_tokens ? room : nullptr, r.Dp);
  kernel_grads<F>(r, n, x, inv, kappa, d_logits, r.inv_eps, d_x, out);
  store_placed<F>(d_tokens, b, h, row0, n, d_x, room);
}

// dŷ -> dy, and the sums of logit_grads -> dπ; writes one (b, h) of the outputs that are asked for.
template <class F>
void store_ref_grads(const Refs<F>& r, int64_t b, int64_t h, RefGrads<F>& g, const View& d_points, const View& d_pos) {
  Buffer<F> out(std::max(r.Dp, r.P));
  for (int64_t j = 0; d_points && j < r.M; ++j) {
    const F *row = g.y + j * r.Dp, *y = r.y + j * r.Dp;
    Vec<F> dots{};
    for (int64_t d = 0; d < r.Dp; d += kLanes<F>) dots += load(row + d) * load(y + d);
    const F along = reduce_add<F>(dots);
    for (int64_t d = 0; r.rbf && d < r.Dp; d += kLanes<F>)
      store(out + d, (load(row + d) - load(y + d) * along) * r.inv_norm[j]);
    store_row_of<F>(d_points, b, h, j, r.rbf ? out.data() : row);
  }
  for (int64_t j = 0; d_pos && j < r.M; ++j) {
    for (int64_t c = 0; c < r.P; ++c) out[c] = 2 * r.tau * r.tau * g.pos[c * r.Mp + j];
    store_row_of<F>(d_pos, b, h, j, out);
  }
}

}  // namespace
}  // namespace sfk
