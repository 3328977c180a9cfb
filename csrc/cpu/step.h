// One token of each sequence on its state, in place: a step of the causal scan whose cost is that of reading the state.
//
// The L queries are the heads of a group: one key, one state, each with an answer of its own.  Nothing is packed:
// references are read where they lie, once, for key and queries together.
#pragma once
#include "causal.h"

namespace sfk {
namespace {

// ⟨a, b⟩ of n numbers, in an order that n alone decides.
template <class F>
F inner(int64_t n, const F* a, const F* b) {
  Vec<F> acc{};
  int64_t i = 0;
  for (; i + kLanes<F> <= n; i += kLanes<F>) acc += load(a + i) * load(b + i);
  F sum = reduce_add<F>(acc);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// 1/‖x‖, and 0 where ‖x‖ <= 1e-12.
template <class F>
F inverse_norm(int64_t n, const F* x) {
  double norm = std::sqrt(static_cast<double>(inner<F>(n, x, x)));
  if (norm == kInf<double>) norm = large_norm<F>(x, n);
  return norm <= 1e-12 ? F(0) : static_cast<F>(1 / norm);
}

template <class F>
class StepWorker {
 public:
  explicit StepWorker(const StepParams& p)
      : p_(p),
        refs_(p),
        Mp_(refs_.Mp),
        columns_(Mp_),
        inv_(1 + p.L),
        x_((1 + p.L) * p.D),
        y_(p.D),
        pos_(p.P),
        v_(p.E),
        o_(p.L * p.E),
        l_((1 + p.L) * Mp_),
        c_(Mp_),
        c_lost_(Mp_),
        k_(Mp_),
        log_c_(Mp_),
        g_(Mp_) {}

  void run(int64_t item) {
    const int64_t h = item / p_.B, b = item % p_.B, row = p_.rows ? p_.rows[b] : b;
    // An index is read on the device that it lies on, so that it is here that one out of range is found: it is none.
    if (row < 0 || row >= p_.states.size[0]) {
      fill(o_.data(), p_.L * p_.E, F(0));
      return answer(b, h);
    }
    refs_.pack_numbers(p_, h);
    F la = 0, decay = 0;
    if (p_.log_a) load_row<F>(p_.log_a, b * p_.log_a.stride[0] + h * p_.log_a.stride[1], 1, 1, &la);
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
  void answer(int64_t b, int64_t h) {
    for (int64_t i = 0; i < p_.L; ++i) store_row_of<F>(p_.o, b, h, i, o_ + i * p_.E);
  }

  // ℓ of the key [Mp], then of the queries [L][Mp].
  void logits(int64_t b, int64_t h, bool present) {
    const int64_t first = present ? 0 : 1;  // a key without mass is not read
    if (present) load_row_of<F>(p_.key, b, h, 0, x_);
    for (int64_t i = 0; i < p_.L; ++i) load_row_of<F>(p_.query, b, h, i, x_ + (1 + i) * p_.D);
    for (int64_t i = first; i <= p_.L; ++i) inv_[i] = refs_.rbf ? inverse_norm<F>(p_.D, x_ + i * p_.D) : F(1);
    const View& r = p_.references;
    const bool straight = r.stride[2] == 1;
    for (int64_t j = 0; j < p_.M; ++j) {
      const F* y = static_cast<const F*>(r.data) + h * r.stride[0] + j * r.stride[1];
      if (!straight) load_row_of<F>(r, 0, h, j, y_), y = y_;
      const F length = refs_.rbf ? inverse_norm<F>(p_.D, y) : F(1);
      for (int64_t i = first; i <= p_.L; ++i) l_[i * Mp_ + j] = inner<F>(p_.D, y, x_ + i * p_.D) * length;
    }
    for (int64_t i = first; i <= p_.L; ++i) {
      F* l = l_ + i * Mp_;
      fill(l + p_.M, Mp_ - p_.M, F(0));
      for (int64_t j = 0; refs_.rbf && j < Mp_; j += kLanes<F>)
        store(l + j, vexp<F>(load(l + j) * (refs_.beta * inv_[i]) - refs_.beta));
      if (p_.P) load_row_of<F>(i ? p_.query_pos : p_.key_pos, b, h, i ? i - 1 : 0, pos_);
      logit_tile<F>(refs_, 1, l, pos_, l);
    }
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
    for (int64_t j = 0; j < p_.M; ++j) {
      F* row = state + j * width;
      for (int64_t i = 0; i < p_.L; ++i) w[i * Mp_ + j] /= c_[j] + c_lost_[j];
      if (present) {
        take<true>(row, l_[j], columns_.scale[j], columns_.unit[j], fade.fade, w + j);
        row[E] = c_[j], row[2 * E + 1] = c_lost_[j], row[2 * E + 2] = k_[j];
      } else {
        take<false>(row, 0, 1, 1, 0, w + j);
      }
    }
  }

  // One column's sums: (n, lost) take in v·added, and each o their weighted sum; weights [L] lie Mp apart.
  template <bool kPresent>
  void take(F* row, F added, F scale, F unit, F fade, const F* weights) {
    const int64_t E = p_.E;
    int64_t e = 0;
    for (; e + kLanes<F> <= E; e += kLanes<F>) {
      Vec<F> n = load(row + e), lost = load(row + E + 1 + e);
      if (kPresent) {
        Vec<F> rest;
        n = two_sum<F>(n * scale, load(v_ + e) * added + (lost + (n + lost) * fade) * scale, rest) * unit;
        lost = rest * unit;
        store(row + e, n), store(row + E + 1 + e, lost);
      }
      for (int64_t i = 0; i < p_.L; ++i) {
        F* o = o_ + i * E + e;
        store(o, load(o) + (n + lost) * weights[i * Mp_]);
      }
    }
    for (; e < E; ++e) {
      F n = row[e], lost = row[E + 1 + e];
      if (kPresent) {
        const F a = n * scale, b = v_[e] * added + (lost + (n + lost) * fade) * scale, s = a + b, of_b = s - a;
        lost = ((a - (s - of_b)) + (b - of_b)) * unit;
        n = s * unit;
        row[e] = n, row[E + 1 + e] = lost;
      }
      for (int64_t i = 0; i < p_.L; ++i) o_[i * E + e] += (n + lost) * weights[i * Mp_];
    }
  }

  const StepParams& p_;
  Refs<F> refs_;
  int64_t Mp_;
  Columns<F> columns_;
  Buffer<F> inv_, x_, y_, pos_, v_, o_, l_, c_, c_lost_, k_, log_c_, g_;
};

template <class F>
void causal_step(const StepParams& p) {
  run_heads<StepWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
