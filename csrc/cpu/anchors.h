// What ⟨G_j, v_s⟩ and h_j of the causal scan's backward pass count from, where weights are too far apart for a chunk.
//
// There one key often holds a whole column: z_ij is its value, and h_j cancels ⟨G_j, v⟩ but for their rounding, which
// logits of thousands magnify.  From the value a_j of the key that last was the column's largest,
//   dω_sj = p_sj (⟨G_j, v_s − a_j⟩ + h'_j),   h'_j = h_j + ⟨G_j, a_j⟩
//   (d log C_ij)' = −W_ij ⟨dO_i, z_ij − a_j⟩ − λ_b dS_ij
// have differences that are 0 there.
#pragma once
#include "attention.h"

namespace sfk {
namespace {

template <class F>
class Anchors {
 public:
  Anchors(int64_t M, int64_t S, int64_t Ep) : M_(M), S_(S), Ep_(Ep), now_(M), a_(M * Ep), next_(Ep) {}

  // No anchors yet: a = 0.  Whether there will be any.
  void start(bool any) {
    if (any && !at_) at_.reset(S_ * M_);
    std::fill(now_.data(), now_.data() + M_, kNone);
    fill(a_.data(), M_ * Ep_, F(0));
  }
  const F* operator[](int64_t j) const { return a_ + j * Ep_; }

  // Key s, whose values are v, is the anchor of the columns where it is the largest so far.
  void advance(int64_t s, const F* omega, const F* top, const F* v) {
    for (int64_t j = 0; j < M_; ++j) {
      if (omega[j] < top[j]) continue;
      now_[j] = static_cast<int32_t>(s);
      std::copy(v, v + Ep_, a_ + j * Ep_);
    }
  }
  // Those of token s, for the way back.
  void keep(int64_t s) { std::copy(now_.data(), now_.data() + M_, at_ + s * M_); }

  // Whether column j has another anchor at token s.
  bool moves(int64_t s, int64_t j) const { return at_[s * M_ + j] != now_[j]; }
  // To that of token s: what h_j changes by, ⟨G_j, a_j⟩ of the new less that of the old.
  double move(int64_t s, int64_t j, const F* G, KeySource<F>& source) { return go(j, at_[s * M_ + j], G, source); }
  double leave(int64_t j, const F* G, KeySource<F>& source) { return go(j, kNone, G, source); }

 private:
  static constexpr int32_t kNone = -1;

  double go(int64_t j, int32_t key, const F* G, KeySource<F>& source) {
    if (now_[j] == key) return 0;
    F* a = a_ + j * Ep_;
    fill(next_.data(), Ep_, F(0));
    if (key != kNone) source.load_values(key, 1, next_);
    double change = 0;
    for (int64_t e = 0; e < Ep_; ++e) change += static_cast<double>(G[e]) * (static_cast<double>(next_[e]) - a[e]);
    std::copy(next_.data(), next_.data() + Ep_, a);
    now_[j] = key;
    return change;
  }

  int64_t M_, S_, Ep_;
  Buffer<int32_t> now_, at_;  // [M], [S][M]: keys
  Buffer<F> a_, next_;        // [M][Ep], [Ep]
};

}  // namespace
}  // namespace sfk
