// The causal scan token by token: what a chunk (chunk.h) begins with, and does where its weights are too far apart.
#pragma once
#include "attention.h"
#include "carried.h"

namespace sfk {
namespace {

// Log gates that were multiplied into sums since these were last measured by `top`.
//
// Each factor is rounded, but makes up for what those before it lost: so their product is right to one rounding.
template <class F>
class Gate {
 public:
  void reset() { log_ = 0, product_ = 1; }
  // What the sums are multiplied by at a token; `moved` is what must be added to `top`.
  F factor(F log_decay, F& moved) {
    moved = 0;
    if (log_decay == 0) return 1;
    log_ += log_decay;
    if (log_ < -kFar) {  // sums far below their measure would lose what comes next
      const F back = static_cast<F>(1 / product_);
      moved = static_cast<F>(log_);
      reset();
      return back;
    }
    const F next = static_cast<F>(std::exp(log_) / product_);
    product_ *= next;
    return next;
  }

 private:
  static constexpr double kFar = 16;
  double log_ = 0, product_ = 1;
};

// Factors of columns, rounded; what that loses is made up for by the column's next one.
template <class F>
class Factors {
 public:
  explicit Factors(int64_t columns) : columns_(columns), owed_(columns) {}
  void reset() { std::fill(owed_.data(), owed_.data() + columns_, 1.0); }
  // Below the normal numbers digits would be lost, and the next factor is also that of what is added in between.
  F next(int64_t j, double factor) {
    const double exact = factor * owed_[j];
    const F rounded = exact < std::numeric_limits<F>::min() ? F(0) : static_cast<F>(exact);
    owed_[j] = rounded > 0 ? exact / rounded : 1;
    return rounded;
  }

 private:
  int64_t columns_;
  Buffer<double> owed_;
};

// Running column sums of e^ω and e^ω v, scaled by e^{-top_j}; ω_sj = ℓ_sj + f̂_s + log a_s.
template <class F>
struct Scan {
  int64_t M, Mp, Ep;
  Buffer<F> top, sum, scale, weight, n;  // [Mp] x 4, [Mp][Ep]
  Gate<F> gate;
  bool seen = false;

  Scan(int64_t M_, int64_t Mp_, int64_t Ep_)
      : M(M_), Mp(Mp_), Ep(Ep_), top(Mp_), sum(Mp_), scale(Mp_), weight(Mp_), n(Mp_ * Ep_) {
    fill(n.data(), Mp_ * Ep_, F(0));
  }
  // What comes before a block.
  void begin(const Carried<F>& before) {
    seen = !before.empty();
    gate.reset();
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> c = load(before.c + j) + load(before.c_lost + j), k = load(before.k + j), t = k * F(kLn2);
      const Vec<F> missing = F(1) - less_turns<F>(t, k);  // 2^k/e^top
      store(top + j, c > F(0) ? t : splat(-kInf<F>));
      store(sum + j, c * missing);
      store(scale + j, missing);
    }
    for (int64_t j = 0; j < M; ++j)
      for (int64_t e = j * Ep; e < (j + 1) * Ep; e += kLanes<F>)
        store(n + e, (load(before.n + e) + load(before.n_lost + e)) * scale[j]);
  }
  // The sums fade and take in a key; `scale` and `weight` say how n must follow.
  void advance(const F* omega, F log_decay) {
    seen = true;
    F moved;
    const F factor = gate.factor(log_decay, moved);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> w = load(omega + j), old = load(top + j) + moved, next = vmax(old, w);
      const Vec<F> shift = next == -kInf<F> ? Vec<F>{} : next;
      const Vec<F> s = vexp<F>(old - shift) * factor, e = vexp<F>(w - shift);
      store(top + j, next);
      store(scale + j, s);
      store(weight + j, e);
      store(sum + j, load(sum + j) * s + e);
    }
  }
  void stay() {
    fill(scale.data(), Mp, F(1));
    fill(weight.data(), Mp, F(0));
  }
  // log C_j; −inf in the padding.
  void log_sums(F* out) const {
    for (int64_t j = 0; j < Mp; j += kLanes<F>) store(out + j, load(top + j) + vlog<F>(load(sum + j)));
  }
};

}  // namespace
}  // namespace sfk
