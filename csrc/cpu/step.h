// One token of each sequence on its state, in place: a step of the causal scan whose cost is that of reading the state.
//
// The L queries are the heads of a group: one key, one state, each with an answer of its own.  Nothing is packed:
// references are read where they lie, once, for key and queries together.
#pragma once
#include "causal.h"

namespace sfk {
namespace {

// The sum of each of kLanes vectors, one a lane.
template <class F>
SFK_INLINE Vec<F> sums_of(const Vec<F>* v) {
  F sums[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) sums[i] = reduce_add<F>(v[i]);
  return load(sums);
}
#if defined(__AVX512F__)
// By halves that are exchanged between pairs of vectors.
template <>
SFK_INLINE Vec<float> sums_of<float>(const Vec<float>* v) {
  __m512 four[4];
  SFK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto pair = [](Vec<float> a, Vec<float> b) {
      return _mm512_castps_pd(
          _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b)));
    };
    const __m512d a = pair(v[4 * i], v[4 * i + 1]), b = pair(v[4 * i + 2], v[4 * i + 3]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (Vec<float>)halves(halves(four[0], four[1]), halves(four[2], four[3]));
}
#endif

// The first n numbers of a vector, then zeros.
template <class F>
SFK_INLINE Vec<F> load_some(const F* p, int64_t n) {
#if defined(__AVX512F__)
  const uint32_t there = (1u << n) - 1;
  if constexpr (sizeof(F) == 4)
    return (Vec<F>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), p);
  else
    return (Vec<F>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(there), p);
#else
  F some[kLanes<F>] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
#endif
}

// Products of y [n] with kTokens rows x, padded with zeros, whose lanes sum to ⟨y, x_t⟩, then those of y with itself,
// if kSquares; in an order that n alone decides.  They go to out[t·kLanes].
template <class F, int kTokens, bool kSquares>
SFK_INLINE void products(int64_t n, const F* y, const F* x, int64_t ld, Vec<F>* out) {
  constexpr int kRows = kTokens + kSquares;
  Vec<F> acc[kRows];
  for (int t = 0; t < kRows; ++t) acc[t] = Vec<F>{};
  const auto add = [&](Vec<F> of_y, int64_t d) {
    for (int t = 0; t < kTokens; ++t) acc[t] += of_y * load(x + t * ld + d);
    if (kSquares) acc[kTokens] += of_y * of_y;
  };
  int64_t d = 0;
  for (; d + kLanes<F> <= n; d += kLanes<F>) add(load(y + d), d);
  if (d < n) add(load_some(y + d, n - d), d);
  for (int t = 0; t < kRows; ++t) out[t * kLanes<F>] = acc[t];
}

// 1/‖y_r‖ of kLanes rows [kLanes][ld] whose squares sum to these, and 0 where ‖y_r‖ <= 1e-12.
template <class F>
Vec<F> inverse_lengths(Vec<F> sums, int64_t n, const F* y, int64_t ld) {
  F inverse[kLanes<F>];
  store(inverse, sums);
  for (int r = 0; r < kLanes<F>; ++r) {
    const F norm = std::sqrt(inverse[r]);
    inverse[r] = norm <= F(1e-12) ? F(0) : 1 / norm;
  }
  if (reduce_max<F>(sums) == kInf<F>)
    for (int r = 0; r < kLanes<F>; ++r)
      if (lane<F>(sums, r) == kInf<F>) inverse[r] = static_cast<F>(1 / large_norm<F>(y + r * ld, n));
  return load(inverse);
}

template <class F>
class StepWorker {
 public:
  explicit StepWorker(const StepParams& p)
      : p_(p),
        refs_(p),
        Mp_(refs_.Mp),
        Dp_(refs_.Dp),
        columns_(Mp_),
        inv_(pad<F>(1 + p.L)),
        parts_((2 + p.L) * kLanes<F> * kLanes<F>),
        x_(pad<F>(1 + p.L) * Dp_),
        y_(kLanes<F> * p.D),
        pos_(p.P),
        v_(p.E),
        o_(p.L * p.E),
        l_((1 + p.L) * Mp_),
        c_(Mp_),
        c_lost_(Mp_),
        k_(Mp_),
        log_c_(Mp_),
        g_(Mp_) {
    fill(x_.data(), pad<F>(1 + p.L) * Dp_, F(0));
  }

  void run(int64_t item) {
    const int64_t h = item / p_.B, b = item % p_.B, row = p_.rows ? p_.rows[b] : b;
    // An index is read on the device that it lies on, so that it is here that one out of range is found: it is none.
    if (row < 0 || row >= p_.states.size[0]) {
      fill(o_.data(), p_.L * p_.E, F(0));
      return answer(b, h);
    }
    refs_.pack_numbers(p_, h);
    F la = log_mass(b, h), decay = 0;
    if (p_.log_decay) load_row<F>(p_.log_decay, b * p_.log_decay.stride[0] + h * p_.log_decay.stride[1], 1, 1, &decay);
    const bool present = la != -kInf<F>;
    F* state = static_cast<F*>(p_.states.data) + row * p_.states.stride[0] + h * p_.states.stride[1];
    logits(b, h, present);
    if (present) {
      F lse;
      causal_weights<F>(refs_, p_.T, 1, &la, l_, &lse);
      load_row_of<F>(p_.value, b, h, 0, v_);
    } else {
      fill(l_.data(), Mp_, -kInf<F>);
      fill(v_.data(), p_.E, F(0));
    }
    take_and_read(state, present, present ? static_cast<double>(decay) : 0.0);
    answer(b, h);
  }

 private:
  F log_mass(int64_t b, int64_t h) const {
    F la = 0;
    if (!p_.log_a) return la;
    const int64_t at = b * p_.log_a.stride[0] + h * p_.log_a.stride[1];
    if (p_.log_a.dtype == kBool) return static_cast<const uint8_t*>(p_.log_a.data)[at] ? la : -kInf<F>;
    load_row<F>(p_.log_a, at, 1, 1, &la);
    return la;
  }

  void answer(int64_t b, int64_t h) {
    for (int64_t i = 0; i < p_.L; ++i) store_row_of<F>(p_.o, b, h, i, o_ + i * p_.E);
  }

  // ℓ of the key [Mp], then of the queries [L][Mp].
  void logits(int64_t b, int64_t h, bool present) {
    const int64_t first = present ? 0 : 1;  // a key without mass is not read
    fill(x_.data(), present ? 0 : p_.D, F(0));
    if (present) load_row_of<F>(p_.key, b, h, 0, x_);
    for (int64_t i = 0; i < p_.L; ++i) load_row_of<F>(p_.query, b, h, i, x_ + (1 + i) * Dp_);
    Vec<F> square[kLanes<F>];
    for (int64_t i = 0; refs_.rbf && i <= p_.L; i += kLanes<F>) {
      const F* x = x_ + i * Dp_;
      for (int64_t r = 0; r < kLanes<F>; ++r) products<F, 0, true>(p_.D, x + r * Dp_, nullptr, 0, square + r);
      store(inv_ + i, inverse_lengths<F>(sums_of<F>(square), p_.D, x, Dp_) * refs_.beta);
    }
    Vec<F>* const parts = reinterpret_cast<Vec<F>*>(parts_.data());
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      int64_t ld;
      const F* const y = references(h, j, ld);
      for (int64_t r = 0; r < kLanes<F>; ++r) {
        const F *row = y + r * ld, *x = x_ + first * Dp_;
        Vec<F>* out = parts + r;
        int64_t left = 1 + p_.L - first;
        for (; left >= 2; left -= 2, x += 2 * Dp_, out += 2 * kLanes<F>) products<F, 2, false>(p_.D, row, x, Dp_, out);
        left ? products<F, 1, true>(p_.D, row, x, Dp_, out) : products<F, 0, true>(p_.D, row, x, Dp_, out);
      }
      const Vec<F>* const own = parts + (1 + p_.L - first) * kLanes<F>;
      const Vec<F> length = refs_.rbf ? inverse_lengths<F>(sums_of<F>(own), p_.D, y, ld) : splat(F(1));
      for (int64_t i = first; i <= p_.L; ++i) {
        Vec<F> kappa = sums_of<F>(parts + (i - first) * kLanes<F>) * length;
        if (refs_.rbf) kappa = vexp<F>(kappa * inv_[i] - refs_.beta);
        store(l_ + i * Mp_ + j, kappa);
      }
    }
    for (int64_t i = first; i <= p_.L; ++i) {
      if (p_.P) load_row_of<F>(i ? p_.query_pos : p_.key_pos, b, h, i ? i - 1 : 0, pos_);
      logit_tile<F>(refs_, 1, l_ + i * Mp_, pos_, l_ + i * Mp_);
    }
  }

  // Rows j.. of a head's references, `ld` apart: where they lie, or a copy where their numbers lie apart or rows end.
  const F* references(int64_t h, int64_t j, int64_t& ld) {
    const View& r = p_.references;
    if (r.stride[2] == 1 && j + kLanes<F> <= p_.M) {
      ld = r.stride[1];
      return static_cast<const F*>(r.data) + h * r.stride[0] + j * ld;
    }
    ld = p_.D;
    for (int64_t i = 0; i < kLanes<F>; ++i)
      if (j + i < p_.M)
        load_row_of<F>(r, 0, h, j + i, y_ + i * ld);
      else
        fill(y_ + i * ld, ld, F(0));
    return y_;
  }

  // The state takes in the key, if there is one, and the queries read it.
  void take_and_read(F* state, bool present, double decay) {
    const int64_t E = p_.E, width = 2 * E + 3;
    const Fade<F> fade(decay);
    for (F* p : {c_.data(), c_lost_.data(), k_.data()}) fill(p + p_.M, Mp_ - p_.M, F(0));
    for (int64_t j = 0; j < p_.M; ++j) {
      const F* row = state + j * width;
      c_[j] = row[E], c_lost_[j] = row[2 * E + 1], k_[j] = row[2 * E + 2];
    }
    if (present) {
      columns_.begin(Mp_, l_, c_, k_, fade);
      for (int64_t j = 0; j < Mp_; j += kLanes<F>)
        store(l_ + j, vexp<F>(less_turns<F>(load(l_ + j), load(columns_.top + j))));
      columns_.finish(Mp_, l_, c_, c_lost_, k_, fade);
    }
    fill(o_.data(), p_.L * E, F(0));
    if (c_[0] == F(0)) return;  // no key yet
    F* w = l_ + Mp_;
    for (int64_t j = 0; j < Mp_; j += kLanes<F>)
      store(log_c_ + j, less_turns<F>(vlog<F>(load(c_ + j) + load(c_lost_ + j)), -load(k_ + j)));
    for (int64_t i = 0; i < p_.L; ++i) causal_read<F>(refs_, p_.T, log_c_, w + i * Mp_, g_);
    for (int64_t i = 0; i < p_.L; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        const Vec<F> total = load(c_ + j) + load(c_lost_ + j);
        store(w + i * Mp_ + j, load(w + i * Mp_ + j) / (total > F(0) ? total : splat(F(1))));
      }
    present ? take_all<true>(state, fade.fade) : take_all<false>(state, 0);
    for (int64_t j = 0; present && j < p_.M; ++j) {
      F* row = state + j * width;
      row[E] = c_[j], row[2 * E + 1] = c_lost_[j], row[2 * E + 2] = k_[j];
    }
  }

  template <bool kPresent>
  void take_all(F* state, F fade) {
    constexpr int64_t kWide = 4 * kLanes<F>;
    int64_t e = 0;
    for (; e + kWide <= p_.E; e += kWide) take<kPresent, 4>(state, e, fade);
    for (; e + kLanes<F> <= p_.E; e += kLanes<F>) take<kPresent, 1>(state, e, fade);
    for (; e < p_.E; ++e) take_one<kPresent>(state, e, fade);
  }

  // kVecs vectors of sums of all columns from e on: (n, lost) take in v·added, and each o is their weighted sum.
  template <bool kPresent, int kVecs>
  void take(F* state, int64_t e, F fade) {
    const int64_t E = p_.E, width = 2 * E + 3;
    const F* w = l_ + Mp_;
    Vec<F> v[kVecs], first[kVecs];  // the first query's sums stay in registers
    for (int c = 0; c < kVecs; ++c) v[c] = load(v_ + e + c * kLanes<F>), first[c] = Vec<F>{};
    F* row = state + e;
    for (int64_t j = 0; j < p_.M; ++j, row += width) {
      const F added = l_[j], scale = columns_.scale[j], unit = columns_.unit[j];
      SFK_UNROLL
      for (int c = 0; c < kVecs; ++c) {
        F *at = row + c * kLanes<F>, *o = o_ + e + c * kLanes<F>;
        Vec<F> n = load(at), lost = load(at + E + 1);
        if (kPresent) {
          Vec<F> rest;
          n = two_sum<F>(n * scale, v[c] * added + (lost + (n + lost) * fade) * scale, rest) * unit;
          lost = rest * unit;
          store(at, n), store(at + E + 1, lost);
        }
        first[c] += (n + lost) * w[j];
        for (int64_t i = 1; i < p_.L; ++i) store(o + i * E, load(o + i * E) + (n + lost) * w[i * Mp_ + j]);
      }
    }
    for (int c = 0; c < kVecs; ++c) store(o_ + e + c * kLanes<F>, first[c]);
  }

  // One number of all columns.
  template <bool kPresent>
  void take_one(F* state, int64_t e, F fade) {
    const int64_t E = p_.E;
    const F* w = l_ + Mp_;
    F* row = state + e;
    for (int64_t j = 0; j < p_.M; ++j, row += 2 * E + 3) {
      F n = row[0], lost = row[E + 1];
      if (kPresent) {
        const F scale = columns_.scale[j], unit = columns_.unit[j];
        const F a = n * scale, b = v_[e] * l_[j] + (lost + (n + lost) * fade) * scale, s = a + b, of_b = s - a;
        lost = ((a - (s - of_b)) + (b - of_b)) * unit;
        n = s * unit;
        row[0] = n, row[E + 1] = lost;
      }
      for (int64_t i = 0; i < p_.L; ++i) o_[i * E + e] += (n + lost) * w[i * Mp_ + j];
    }
  }

  const StepParams& p_;
  Refs<F> refs_;
  int64_t Mp_, Dp_;
  Columns<F> columns_;
  Buffer<F> inv_, parts_, x_, y_, pos_, v_, o_, l_, c_, c_lost_, k_, log_c_, g_;
};

template <class F>
void causal_step(const StepParams& p) {
  run_heads<StepWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
