// A chunk of the causal scan where β and ε alone bound every logit, and masses are near 1: its sums need no units.
//
// Of a key only E = e^ℓ is computed, and of a query E and 1/C:
//   e_sj = E_sj u_s,  u_s = a_s (Σ_j b_j E_sj)^{−λ_a},   C_ij = before_j + Σ_{s<=i} e_sj,
//   X_ij = W_ij/C_ij,  W_ij = b_j E_ij/C_ij (T = 0: b_j E_ij) times what brings its sum to 1, and the output takes
//   last.
// The rest is a chunk's (chunk.h), with ref = 0 and no gates.
#pragma once
#include "chunk.h"

namespace sfk {
namespace {

template <class F>
class BoundedChunk : public Chunk<F> {
 public:
  using Chunk<F>::e, Chunk<F>::unit, Chunk<F>::added;

  BoundedChunk(int64_t M, int64_t Mp, int64_t rows, int64_t Ep) : Chunk<F>(M, Mp, rows, Ep), u_(pad<F>(rows)) {}

  // Whether the chunks of a head may be tried; λ_b = 1, as a power of C takes its logarithm.
  static bool may_hold(const CausalParams& p, const Refs<F>& r) {
    return r.near() && !p.log_decay && (p.T == 0 || r.lam_b == 1);
  }

  // The n keys x [n][Dp] with inverse norms inv, log masses la and values v [n][Ep], after keys of sums `before` [Mp];
  // false where weights or sums are too far from 1.
  bool begin(const Refs<F>& r, int64_t T, int64_t n, Rows<F> x, const F* inv, const F* la, Rows<F> v, const F* before,
             Ahead* ahead) {
    return this->finite(n, v) && weights_of(r, T, n, x, inv, la, ahead) && add_up(n, la, before);
  }

  // Queries x [n][Dp] to X of sums 1/scale.
  void read_weights(const Refs<F>& r, int64_t T, int64_t n, Rows<F> x, const F* inv, F* w, F* scale, Ahead* ahead) {
    gemm<F>(n, Mp_, r.D, x.at, x.ld, 1, r.yt, Mp_, w, Mp_, false, ahead);
    const BoundedKernel<F> kernel(r);
    for (int64_t i = 0; i < n; ++i) {
      const F along = kernel.away * inv[i];
      Vec<F> sum{};
      for (int64_t k = i * Mp_, j = 0; j < Mp_; j += kLanes<F>, k += kLanes<F>) {
        const Vec<F> over = load(unit + k);
        Vec<F> weight = kernel(load(w + k), along) * load(r.b + j);
        if (T) weight *= over;
        sum += weight;
        store(w + k, weight * over);
      }
      scale[i] = 1 / reduce_add<F>(sum);
    }
  }

  bool any() const { return this->any_; }

 private:
  using Chunk<F>::M_, Chunk<F>::Mp_, Chunk<F>::Ep_;

  // How far masses and sums may be from 1 either way: b E/C² of any query is then a normal number.
  static constexpr F kMass = F(1LL << 20), kSum = F(1LL << 40);

  // e = E u.
  bool weights_of(const Refs<F>& r, int64_t T, int64_t n, Rows<F> x, const F* inv, const F* la, Ahead* ahead) {
    gemm<F>(n, Mp_, r.D, x.at, x.ld, 1, r.yt, Mp_, e, Mp_, false, ahead);
    const BoundedKernel<F> kernel(r);
    for (int64_t i = 0; i < n; ++i) {
      const F along = kernel.away * inv[i];
      Vec<F> sum{};
      for (int64_t k = i * Mp_, j = 0; j < Mp_; j += kLanes<F>, k += kLanes<F>) {
        const Vec<F> E = kernel(load(e + k), along);
        sum += E * load(r.b + j);
        store(e + k, E);
      }
      u_[i] = reduce_add<F>(sum);
    }
    for (int64_t i = n; i < pad<F>(n); ++i) u_[i] = 1;
    bool near = true;
    for (int64_t i = 0; i < n; i += kLanes<F>) {
      Vec<F> u = load(u_ + i);
      if (!T)
        u = splat(F(1));
      else
        u = r.lam_a == 1 ? F(1) / u : vexp<F>(vlog<F>(u) * -r.lam_a);
      store(u_ + i, u);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (la[i] != 0) u_[i] *= std::exp(la[i]);
      near = near && (la[i] == -kInf<F> || (u_[i] <= kMass && u_[i] * kMass >= 1));
    }
    return near;
  }

  // C, and what the chunk adds to it.
  bool add_up(int64_t n, const F* la, const F* sums) {
    int64_t first = 0;
    while (first + 1 < n && la[first] == -kInf<F>) ++first;
    this->any_ = la[first] != -kInf<F>;
    Vec<F> low = splat(F(1)), high = splat(F(1));  // of sums that are not 0
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> before = load(sums + j), one = splat(F(1));
      Vec<F> sum{}, c = before;
      for (int64_t k = j, i = 0; i < n; ++i, k += Mp_) {
        const Vec<F> w = la[i] == -kInf<F> ? Vec<F>{} : load(e + k) * u_[i];
        sum += w;
        c = sum + before;
        if (i == first) low = vmin(low, c == F(0) ? one : c);
        store(e + k, w);
        store(unit + k, reciprocal(c == F(0) ? one : c));
      }
      high = vmax(high, c);
      store(added + j, sum);
    }
    return reduce_min<F>(low) * kSum >= 1 && reduce_max<F>(high) <= kSum;
  }

  Buffer<F> u_;  // [rows]
};

// The sums of a scan in units of 1, over a bundle of chunks: what these add is rounded as a sum of its own, and goes
// into the state at once.
template <class F>
class Bundle {
 public:
  static constexpr int64_t kRows = 192;

  Bundle(int64_t M, int64_t Mp, int64_t Ep)
      : c(Mp), M_(M), Mp_(Mp), Ep_(Ep), before_(Mp), added_(Mp), n_before_(Mp * Ep), n_added_(Mp * Ep), n_(Mp * Ep) {}

  void begin(Carried<F>& carried) {
    if (open_) return;
    open_ = true, grown_ = false;
    carried.plain(before_, n_before_);
    std::copy(before_.data(), before_ + Mp_, c.data());
    fill(added_.data(), Mp_, F(0));
    n = carried.empty() ? nullptr : n_before_.data();
  }
  // Takes in a chunk's weights and values.
  void add(int64_t rows, const BoundedChunk<F>& chunk, Rows<F> v, Ahead* ahead) {
    if (!chunk.any()) return;
    gemm<F>(M_, Ep_, rows, chunk.e, 1, Mp_, v.at, v.ld, n_added_, Ep_, grown_, ahead);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      store(added_ + j, load(added_ + j) + load(chunk.added + j));
      store(c + j, load(before_ + j) + load(added_ + j));
    }
    for (int64_t k = 0; k < M_ * Ep_; k += kLanes<F>) store(n_ + k, load(n_before_ + k) + load(n_added_ + k));
    grown_ = true, n = n_;
  }
  void end(Carried<F>& carried) {
    if (open_ && grown_) carried.add_sums(added_, n_added_);
    forget();
  }
  void forget() { open_ = false; }

  Buffer<F> c;           // [Mp]
  const F* n = nullptr;  // [M][Ep], null where no key has come

 private:
  bool open_ = false, grown_ = false;
  int64_t M_, Mp_, Ep_;
  Buffer<F> before_, added_, n_before_, n_added_, n_;  // [Mp] x 2, [Mp][Ep] x 3
};

}  // namespace
}  // namespace sfk
