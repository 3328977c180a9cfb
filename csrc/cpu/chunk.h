// A chunk of the causal scan as products of matrices, where its range allows.
//
// With ref_j the largest log weight of column j, of the chunk's keys and what came before them, and Γ_i the sum of the
// log gates from the chunk's first key on, all in units of e^{ref_j}:
//   e_sj = e^{ω_sj − ref_j − Γ_s},   C_ij = e^{Γ_i} (e^{before_j − ref_j} + Σ_{s<=i} e_sj),
//   o_i = Σ_{s<=i} A_is v_s + Σ_j X_ij n_j,   A_is = Σ_j X_ij e_sj,   X_ij = e^{Γ_i} W_ij/C_ij
// X may be large and e small, but X_ij e_sj is at most 1 where s <= i.
#pragma once
#include "base/reciprocal.h"
#include "scan.h"

namespace sfk {
namespace {

// Tokens of a chunk: whole register tiles and vectors.  24 to 96 are within 5 % of each other where M = D = E = 64, as
// more products with the state cost what fewer of tokens with tokens save; 48 is fastest.
inline int64_t chunk_rows(int64_t Mp) { return std::min<int64_t>(tile_rows(Mp), 48); }

// Tokens that are multiplied with all before the last of them, and with all after the first, their own later ones too.
constexpr int64_t kStrip = 2 * kTileRows;

template <class F>
class Chunk {
 public:
  Chunk(int64_t M, int64_t Mp, int64_t rows, int64_t Ep)
      : ref(Mp),
        e(rows * Mp),
        unit(rows * Mp),
        added(Mp),
        M_(M),
        Mp_(Mp),
        Ep_(Ep),
        ld_(pad<F>(rows)),
        e_t_(Mp * ld_),
        a_(rows * ld_),
        before_(Mp),
        growth_(rows),
        left_(rows) {}

  // The n keys with log masses la, log weights ω [n][Mp], values v [n][Ep] and log gates, null for none, after `scan`,
  // whose n is brought to this chunk's units; false, and nothing has changed, where the keys must be taken one by one.
  bool begin(int64_t n, const F* la, const F* omega, const F* gates, const F* v, Scan<F>& scan) {
    double far = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (gates) far -= gates[i];
      growth_[i] = static_cast<F>(std::exp(far));
      left_[i] = static_cast<F>(std::exp(-far));
    }
    if (!near(n, la, omega, far, scan) || !finite(n, {v, Ep_})) return false;
    weigh(n, omega, scan);
    if (!zero_times(Mp_, unit + (n - 1) * Mp_)) return false;
    for (int64_t j = 0; scan.seen && j < M_; ++j)
      for (int64_t k = j * Ep_; before_[j] != F(1) && k < (j + 1) * Ep_; k += kLanes<F>)
        store(scan.n + k, load(scan.n + k) * before_[j]);
    return true;
  }

  // ℓ of the queries [n][Mp] -> the numerators of W, whose sums are 1/scale; their softmax is blind to Γ.
  void weights(const Refs<F>& r, int64_t T, int64_t n, F* tile, F* g, F* scale) const {
    const F lam = T ? r.lam_b : F(0);
    for (int64_t j = 0; j < Mp_; ++j) g[j] = r.log_b[j] - lam * ref[j];
    for (int64_t k = 0; lam != 0 && lam != 1 && k < n * Mp_; k += kLanes<F>)
      store(tile + k, load(tile + k) + vlog<F>(load(unit + k)) * lam);
    exp_rows<F>(n, Mp_, tile, g, scale);
    for (int64_t i = 0; lam == 1 && i < n; ++i) {  // a factor 1/C takes no logarithm
      Vec<F> sum{};
      for (int64_t k = i * Mp_; k < (i + 1) * Mp_; k += kLanes<F>) {
        const Vec<F> w = load(tile + k) * load(unit + k);
        store(tile + k, w);
        sum += w;
      }
      scale[i] = 1 / reduce_add<F>(sum);
    }
  }

  // X in place, from W times 1/scale.
  void over_sums(int64_t n, const F* scale, F* w) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = i * Mp_; k < (i + 1) * Mp_; k += kLanes<F>)
        store(w + k, load(w + k) * (scale[i] * left_[i]) * load(unit + k));
  }

  // o [n][Ep] from X [n][Mp], the values and what came `before` [Mp][Ep], null for nothing.
  void read(int64_t n, const F* w, Rows<F> v, const F* before, F* o, Ahead* ahead = nullptr) {
    transpose<F>(n, Mp_, e, Mp_, e_t_, ld_);
    before ? gemm<F>(n, Ep_, M_, w, Mp_, 1, before, Ep_, o, Ep_, false, ahead) : fill(o, n * Ep_, F(0));
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t rows = std::min(kStrip, n - i), keys = i + rows;
      gemm<F>(rows, pad<F>(keys), M_, w + i * Mp_, Mp_, 1, e_t_, ld_, a_, ld_, false);
      for (int64_t k = 0; k < rows; ++k) fill(a_ + k * ld_ + i + k + 1, rows - k - 1, F(0));
      gemm<F>(rows, Ep_, keys, a_, ld_, 1, v.at, v.ld, o + i * Ep_, Ep_, true);
    }
  }

  // log of the units and C of every token, as `Scan` has them.
  void save_sums(int64_t n, const Scan<F>& scan, F* top, F* sum) const {
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      Vec<F> c = load(scan.sum + j) * load(before_ + j);
      for (int64_t k = j, i = 0; i < n; ++i, k += Mp_) {
        c += load(e + k);
        store(sum + k, c);
        store(top + k, c == F(0) ? splat(-kInf<F>) : load(ref + j));
      }
    }
  }

  // What this chunk's keys are to the state: Carried<F>::add.
  void add_to(Carried<F>& carried, int64_t n, const F* v, double decay) {
    if (any_) carried.add_weighted(n, e, added, ref, static_cast<F>(std::exp(decay)), v, decay);
  }

  Buffer<F> ref, e, unit, added;  // [Mp], [rows][Mp] x 2, [Mp]: unit is 1/C, 1 where no key has come; sums of e

 protected:
  // Whether all of the values [n][Ep] are: later ones are multiplied by 0, which must give 0.
  bool finite(int64_t n, Rows<F> v) const {
    if (v.ld == Ep_) return zero_times(n * Ep_, v.at);
    bool all = true;
    for (int64_t i = 0; i < n; ++i) all &= zero_times(Ep_, v[i]);
    return all;
  }
  // Whether 0 times each of n numbers, whole vectors, is 0.
  static bool zero_times(int64_t n, const F* x) {
    constexpr int64_t kParts = 4;  // sums side by side: one waits for its last addition
    Vec<F> zero[kParts] = {};
    int64_t k = 0;
    for (; k + kParts * kLanes<F> <= n; k += kParts * kLanes<F>) {
      SFK_UNROLL
      for (int64_t i = 0; i < kParts; ++i) zero[i] += load(x + k + i * kLanes<F>) * F(0);
    }
    for (; k < n; k += kLanes<F>) zero[0] += load(x + k) * F(0);
    return reduce_add<F>((zero[0] + zero[1]) + (zero[2] + zero[3])) == F(0);
  }

  int64_t M_, Mp_, Ep_;
  bool any_ = false;  // whether a key takes part

 private:
  // How far sums may lie below ref: both logarithms keep the digits of their sum.
  static constexpr F kNear = 16;
  // The same with what the gates take: weights that vanish beside ref are then below the rounding of any sum.
  static constexpr F kSpan = sizeof(F) == 4 ? F(55) : F(500);

  // ref, and whether all sums lie within the span of it; they only grow, so that the first of them tells.
  bool near(int64_t n, const F* la, const F* omega, double far, const Scan<F>& scan) {
    int64_t first = 0;
    while (first + 1 < n && la[first] == -kInf<F>) ++first;
    any_ = la[first] != -kInf<F>;
    Vec<F> widest{};
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> top = load(scan.top + j), floor = vmax(top, load(omega + first * Mp_ + j));
      Vec<F> peak = top;
      for (int64_t i = first; i < n; ++i) peak = vmax(peak, load(omega + i * Mp_ + j));
      const Vec<F> least = splat<F>(-kInf<F>), shift = peak == least ? Vec<F>{} : peak;
      widest = vmax(widest, peak == least ? Vec<F>{} : shift - floor);
      store(ref + j, shift);
      store(before_ + j, vexp<F>(top - shift));
    }
    const F furthest = reduce_max<F>(widest);
    return furthest <= kNear && furthest + far <= kSpan;
  }

  void weigh(int64_t n, const F* omega, const Scan<F>& scan) {
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> shift = load(ref + j), before = load(scan.sum + j) * load(before_ + j), one = splat<F>(F(1));
      Vec<F> sum{};
      for (int64_t k = j, i = 0; i < n; ++i, k += Mp_) {
        const Vec<F> w = vexp<F>(load(omega + k) - shift) * growth_[i];
        sum += w;
        const Vec<F> c = sum + before;
        store(e + k, w);
        store(unit + k, reciprocal(c == F(0) ? one : c * left_[i]));
      }
      store(added + j, sum);
    }
  }

  int64_t ld_;
  Buffer<F> e_t_, a_, before_, growth_, left_;  // [Mp][ld], [kStrip][ld], e^{top − ref} [Mp], e^{−Γ} and e^Γ [rows]
};

}  // namespace
}  // namespace sfk
