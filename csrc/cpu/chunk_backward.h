// Gradients of a chunk of the causal scan without gates, as products of matrices.
//
// In the units of chunk.h, with X_ij = W_ij/C_ij, D_is = ⟨dO_i, v_s⟩ for s <= i, and G and h of what comes after the
// chunk:
//   ⟨dO_i, z_ij⟩ = (Σ_s D_is e_sj + ⟨dO_i, n_j⟩)/C_ij
//   dv_s = Σ_{i>=s} A_is dO_i + Σ_j e_sj G_j,   A_is = Σ_j X_ij e_sj
//   dω_sj = e_sj (Σ_{i>=s} (D_is X_ij + d log C_ij/C_ij) + ⟨G_j, v_s⟩ + h_j)
#pragma once
#include "chunk.h"

namespace sfk {
namespace {

template <class F>
class ChunkBackward {
 public:
  ChunkBackward(int64_t M, int64_t Mp, int64_t rows, int64_t E, int64_t Ep)
      : p(rows * Mp),
        M_(M),
        Mp_(Mp),
        E_(E),
        Ep_(Ep),
        ld_(pad<F>(rows)),
        d_(rows * ld_),
        a_(rows * ld_),
        e_(rows * Mp),
        x_(rows * Mp),
        turned_(std::max(std::max(Mp, Ep) * ld_, Mp * Ep)),
        high_(Mp),
        low_(Mp) {}

  // p = ⟨dO_i, z_ij⟩ of the queries.
  void pooled(int64_t n, const Chunk<F>& chunk, const Scan<F>& scan, const F* v, const F* d_o) {
    pairs(n, v, d_o);
    transpose<F>(Mp_, Ep_, scan.n, Ep_, turned_, Mp_);
    gemm<F>(n, Mp_, E_, d_o, Ep_, 1, turned_, Mp_, p, Mp_, false);
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t rows = std::min(kStrip, n - i);
      gemm<F>(rows, Mp_, i + rows, d_ + i * ld_, ld_, 1, chunk.e, Mp_, p + i * Mp_, Mp_, true);
    }
    for (int64_t k = 0; k < n * Mp_; k += kLanes<F>) store(p + k, load(p + k) * load(chunk.unit + k));
  }

  // p = dω, and dv, from ω, log units `top` [Mp], C, W and d log C [n][Mp]; G [Mp][Ep] and h [Mp] go from after the
  // chunk to before it.
  void keys(int64_t n, const F* omega, const F* top, const F* sum, const F* w, const F* d_log_c, const F* v,
            const F* d_o, F* G, double* h, F* dv) {
    pairs(n, v, d_o);
    factors(n, omega, top, sum, w);
    transpose<F>(n, Mp_, e_, Mp_, turned_, ld_);
    lower(n, M_, x_, Mp_, a_);
    transpose<F>(Mp_, Ep_, G, Ep_, turned_, Mp_);
    gemm<F>(n, Mp_, E_, v, Ep_, 1, turned_, Mp_, p, Mp_, false);
    gemm<F>(n, Ep_, M_, e_, Mp_, 1, G, Ep_, dv, Ep_, false);
    for (int64_t s = 0; s < n; s += kStrip) {
      const int64_t rows = std::min(kStrip, n - s), corner = s * ld_ + s;
      gemm<F>(rows, Mp_, n - s, d_ + corner, 1, ld_, x_ + s * Mp_, Mp_, p + s * Mp_, Mp_, true);
      gemm<F>(rows, Ep_, n - s, a_ + corner, 1, ld_, d_o + s * Ep_, Ep_, dv + s * Ep_, Ep_, true);
    }
    take_sums(n, sum, d_log_c, h);
    gemm<F>(M_, Ep_, n, x_, 1, Mp_, d_o, Ep_, G, Ep_, true);
  }

  Buffer<F> p;  // [rows][Mp]

 private:
  // D [n][ld], 0 where the key is later.
  void pairs(int64_t n, const F* v, const F* d_o) {
    transpose<F>(n, Ep_, v, Ep_, turned_, ld_);
    lower(n, E_, d_o, Ep_, d_);
  }

  // The lower triangle of x [n][K] times what is turned [K][n].
  void lower(int64_t n, int64_t K, const F* x, int64_t ld, F* out) const {
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t rows = std::min(kStrip, n - i), keys = i + rows;
      gemm<F>(rows, pad<F>(keys), K, x + i * ld, ld, 1, turned_, ld_, out + i * ld_, ld_, false);
      for (int64_t k = i; k < keys; ++k) fill(out + k * ld_ + k + 1, keys - k - 1, F(0));
    }
  }

  void factors(int64_t n, const F* omega, const F* top, const F* sum, const F* w) {
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> unit = load(top + j), none = splat(-kInf<F>), shift = unit == none ? Vec<F>{} : unit;
      for (int64_t k = j; k < n * Mp_; k += Mp_) {
        const Vec<F> c = load(sum + k);
        store(e_ + k, vexp<F>(load(omega + k) - shift));
        store(x_ + k, c > F(0) ? load(w + k) / c : Vec<F>{});
      }
    }
  }

  // The sums over later d log C/C, with twice the digits: they nearly cancel against the rest.
  void take_sums(int64_t n, const F* sum, const F* d_log_c, double* h) {
    for (int64_t j = 0; j < Mp_; ++j) high_[j] = static_cast<F>(h[j]), low_[j] = static_cast<F>(h[j] - high_[j]);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      Vec<F> total = load(high_ + j), rest = load(low_ + j);
      for (int64_t k = (n - 1) * Mp_ + j; k >= 0; k -= Mp_) {
        const Vec<F> c = load(sum + k);
        Vec<F> lost;
        total = two_sum<F>(total, c > F(0) ? load(d_log_c + k) / c : Vec<F>{}, lost);
        rest += lost;
        store(p + k, load(e_ + k) * ((load(p + k) + total) + rest));
      }
      store(high_ + j, total);
      store(low_ + j, rest);
    }
    for (int64_t j = 0; j < Mp_; ++j) h[j] = static_cast<double>(high_[j]) + low_[j];
  }

  int64_t M_, Mp_, E_, Ep_, ld_;
  Buffer<F> d_, a_, e_, x_, turned_;  // [rows][ld] x 2, [rows][Mp] x 2; [Ep][ld], [Mp][ld] or [Ep][Mp]
  Buffer<F> high_, low_;              // [Mp], of h in `take_sums`
};

}  // namespace
}  // namespace sfk
