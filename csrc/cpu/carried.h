// The state of a causal scan between blocks of keys, laid out in memory as reference/state.py says.
#pragma once
#include "base/explog.h"
#include "base/gemm.h"
#include "base/tiles.h"

namespace sfk {
namespace {

// (s, r): s = a + b as it is rounded, s + r = a + b exactly.
template <class F>
SFK_INLINE Vec<F> two_sum(Vec<F> a, Vec<F> b, Vec<F>& rest) {
  const Vec<F> s = a + b, of_b = s - a;
  rest = (a - (s - of_b)) + (b - of_b);
  return s;
}

// 2^n of integers n, 0 below the normal range.
template <class F>
SFK_INLINE Vec<F> power_of_two(Vec<F> n) {
  using C = ExpTable<F>;
  const Vec<F> low = splat<F>(F(1 - C::kBias)), kept = vmax(n, low);
  const IVec<F> exponent = (bit_cast<IVec<F>>(kept + C::kMagic) + C::kBias) << C::kBits;
  return n < low ? Vec<F>{} : bit_cast<Vec<F>>(exponent);
}

// ⌊log2 c⌋ of normal numbers c > 0.
template <class F>
SFK_INLINE Vec<F> floor_log2(Vec<F> c) {
  using C = LogTable<F>;
  return to_float<F>((bit_cast<IVec<F>>(c) >> C::kBits) - C::kBias);
}

template <class F>
SFK_INLINE Vec<F> ceiling(Vec<F> x) {
  using C = ExpTable<F>;
  const Vec<F> nearest = (x + C::kMagic) - C::kMagic;
  return nearest + (nearest < x ? splat<F>(F(1)) : Vec<F>{});
}

// x − k ln 2 in two parts, the first of which rounds nothing.
template <class F>
SFK_INLINE Vec<F> less_turns(Vec<F> x, Vec<F> k) {
  return (x - k * F(0.693359375)) - k * F(-2.121944400546905827679e-4);
}

constexpr double kLn2 = 0.69314718055994530942;

// e^decay = 2^turns (1 + fade).
template <class F>
struct Fade {
  F turns, fade;
  explicit Fade(double decay)
      : turns(static_cast<F>(std::nearbyint(decay * kLog2e))),
        fade(static_cast<F>(std::expm1(decay - std::nearbyint(decay * kLog2e) * kLn2))) {}
};

// What the columns of a state are multiplied by while it takes in keys: by `scale` with what they fade, then by `unit`.
template <class F>
struct Columns {
  Buffer<F> top, scale, unit;  // [Mp]
  explicit Columns(int64_t Mp) : top(Mp), scale(Mp), unit(Mp) {}

  // peak [Mp]: largest log weights of the new keys, −inf where there are none.
  void begin(int64_t Mp, const F* peak, const F* c, const F* k, const Fade<F>& fade) {
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> p = load(peak + j), none = splat<F>(-kInf<F>);
      const Vec<F> old = load(c + j) > F(0) ? load(k + j) + fade.turns : none;
      const Vec<F> highest = p == none ? none : ceiling<F>((p == none ? Vec<F>{} : p) * F(kLog2e));
      Vec<F> t = vmax(old, highest);
      t = t == none ? Vec<F>{} : t;
      store(top + j, t);
      store(scale + j, power_of_two<F>(old == none ? none : old - t));
    }
  }
  // The sums c and what rounding takes from them, and k; then `unit` brings the other columns to 1 <= c < 2 as well.
  void finish(int64_t Mp, const F* added, F* c, F* c_lost, F* k, const Fade<F>& fade) {
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> s = load(scale + j), c0 = load(c + j), lost = load(c_lost + j);
      Vec<F> rest;
      const Vec<F> total = two_sum<F>(s * c0, load(added + j) + s * (lost + (c0 + lost) * fade.fade), rest);
      const Vec<F> one = splat<F>(F(1)), shift = total > F(0) ? floor_log2<F>(total > F(0) ? total : one) : Vec<F>{};
      const Vec<F> u = power_of_two<F>(-shift);
      store(unit + j, u);
      store(c + j, total * u);
      store(c_lost + j, rest * u);
      store(k + j, total > F(0) ? load(top + j) + shift : Vec<F>{});
    }
  }
};

// One head's state, padded with zeros.
template <class F>
class Carried {
 public:
  Carried(int64_t M, int64_t Mp, int64_t E, int64_t Ep)
      : n(Mp * Ep),
        n_lost(Mp * Ep),
        c(Mp),
        c_lost(Mp),
        k(Mp),
        M_(M),
        Mp_(Mp),
        E_(E),
        Ep_(Ep),
        columns_(Mp),
        peak_(Mp),
        own_(Mp),
        added_c_(Mp),
        added_(Mp * Ep),
        row_(2 * E + 3) {}

  void load_state(const View& v, int64_t b, int64_t h) {
    for (F* p : {n.data(), n_lost.data()}) fill(p, Mp_ * Ep_, F(0));
    for (F* p : {c.data(), c_lost.data(), k.data()}) fill(p, Mp_, F(0));
    for (int64_t j = 0; v && j < M_; ++j) {
      load_row_of<F>(v, b, h, j, row_);
      std::copy(row_.data(), row_ + E_, n + j * Ep_);
      std::copy(row_ + E_ + 1, row_ + 2 * E_ + 1, n_lost + j * Ep_);
      c[j] = row_[E_], c_lost[j] = row_[2 * E_ + 1], k[j] = row_[2 * E_ + 2];
    }
  }
  void save_state(const View& v, int64_t b, int64_t h) {
    for (int64_t j = 0; v && j < M_; ++j) {
      std::copy(n + j * Ep_, n + j * Ep_ + E_, row_.data());
      std::copy(n_lost + j * Ep_, n_lost + j * Ep_ + E_, row_ + E_ + 1);
      row_[E_] = c[j], row_[2 * E_ + 1] = c_lost[j], row_[2 * E_ + 2] = k[j];
      store_row_of<F>(v, b, h, j, row_);
    }
  }
  bool empty() const { return c[0] == F(0); }

  // Takes in `rows` keys with log weights ω [rows][Mp], which fade by `later` [rows] until the last one (null: by
  // nothing), and values v [rows][Ep]; ω is overwritten.  The state fades by `decay`.
  void add(int64_t rows, F* omega, const F* later, const F* v, double decay) {
    const Fade<F> fade(decay);
    for (int64_t i = 0; later && i < rows; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) store(omega + i * Mp_ + j, load(omega + i * Mp_ + j) + later[i]);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      Vec<F> peak = load(omega + j);
      for (int64_t i = 1; i < rows; ++i) peak = vmax(peak, load(omega + i * Mp_ + j));
      store(peak_ + j, peak);
    }
    if (peak_[0] == -kInf<F>) return;  // no key takes part
    columns_.begin(Mp_, peak_, c, k, fade);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      Vec<F> sum{};
      for (int64_t i = 0; i < rows; ++i) {
        const Vec<F> w = vexp<F>(less_turns<F>(load(omega + i * Mp_ + j), load(columns_.top + j)));
        store(omega + i * Mp_ + j, w);
        sum += w;
      }
      store(added_c_ + j, sum);
    }
    take(rows, omega, v, fade);
  }

  // The same from weights e [rows][Mp], and what they sum to, of e^{−ref} and gates since the state: `left` is e^decay.
  void add_weighted(int64_t rows, const F* e, const F* sums, const F* ref, F left, const F* v, double decay) {
    const Fade<F> fade(decay);
    columns_.begin(Mp_, ref, c, k, fade);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> own = vexp<F>(less_turns<F>(load(ref + j), load(columns_.top + j))) * left;
      store(own_ + j, own);
      store(added_c_ + j, load(sums + j) * own);
    }
    take(rows, e, v, fade, own_);
  }

  // Adds to c and n, in units of 1: [Mp], [M][Ep].
  void add_sums(const F* sums, const F* n_sums) {
    const Fade<F> fade(0);
    fill(peak_.data(), Mp_, F(0));
    columns_.begin(Mp_, peak_, c, k, fade);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      store(own_ + j, power_of_two<F>(-load(columns_.top + j)));
      store(added_c_ + j, load(sums + j) * load(own_ + j));
    }
    columns_.finish(Mp_, added_c_, c, c_lost, k, fade);
    grow(n_sums, fade, own_);
  }

  // c and n as they stand, in units of 1: [Mp], [Mp][Ep]; not finite where they are too large for that.
  void plain(F* sums, F* n_sums) {
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> unit = power_of_two<F>(vmin(splat<F>(ExpTable<F>::kBias + 1), load(k + j)));
      store(own_ + j, unit);
      store(sums + j, (load(c + j) + load(c_lost + j)) * unit);
    }
    for (int64_t j = 0; j < M_; ++j)
      for (int64_t e = j * Ep_; e < (j + 1) * Ep_; e += kLanes<F>)
        store(n_sums + e, (load(n + e) + load(n_lost + e)) * own_[j]);
  }

  Buffer<F> n, n_lost, c, c_lost, k;  // [Mp][Ep] x 2, [Mp] x 3

 private:
  // own [Mp]: what the weights still are to be multiplied by, null for nothing.
  void take(int64_t rows, const F* weights, const F* v, const Fade<F>& fade, const F* own = nullptr) {
    columns_.finish(Mp_, added_c_, c, c_lost, k, fade);
    gemm<F>(M_, Ep_, rows, weights, 1, Mp_, v, Ep_, added_, Ep_, false);
    grow(added_, fade, own);
  }

  // n by what the columns' sums have been brought to.
  void grow(const F* sums, const Fade<F>& fade, const F* own) {
    for (int64_t j = 0; j < M_; ++j) {
      const F scale = columns_.scale[j], unit = columns_.unit[j], factor = own ? own[j] : F(1);
      for (int64_t e = j * Ep_; e < (j + 1) * Ep_; e += kLanes<F>) {
        const Vec<F> n0 = load(n + e), lost = load(n_lost + e);
        Vec<F> rest;
        const Vec<F> added = load(sums + e) * factor + (lost + (n0 + lost) * fade.fade) * scale;
        const Vec<F> total = two_sum<F>(n0 * scale, added, rest);
        store(n + e, total * unit);
        store(n_lost + e, rest * unit);
      }
    }
  }

  int64_t M_, Mp_, E_, Ep_;
  Columns<F> columns_;
  Buffer<F> peak_, own_, added_c_, added_, row_;
};

}  // namespace
}  // namespace sfk
