// The backward of query-dependent masks in the log domain: with Q^t = e^{ℓ + f^t − log C^t}, whose columns sum to 1,
// and R^t = e^{ℓ + g^{t−1} − log P^t}, whose rows do, every product is of numbers between 0 and 1 and gradients.
#pragma once
#include "backward.h"

namespace sfk {
namespace {

// log C^t, V^t, log n and log P^t of the block.
template <class F>
void MaskedBackwardWorker<F>::prepare_in_logs() {
  it_.iterate_in_logs();
  for (const KeyTile& at : it_.mask.tiles) {
    const F* logits = it_.keys.logs(at);
    for (int64_t t = 1; t < steps_; ++t)
      lse_of_rows<F>(at.n, p_.M, Mp_, logits, it_.potentials.v(t - 1), inverse(t, at));
  }
}

template <class F>
void MaskedBackwardWorker<F>::pool_in_logs() {
  const F* c = it_.potentials.sums(steps_ - 1);
  for (int64_t k = 0; k < p_.M * kQueries; ++k) y_[k] = it_.potentials.w[k] * it_.potentials.keep[k];
  fill(d_c_.data(), Mp_ * kQueries, F(0));
  for (const KeyTile& at : it_.mask.tiles) {
    F* d_logits = sums.d_logits() + at.s0 * Mp_;
    it_.set_f(steps_ - 1, at, inverse(steps_ - 1, at), u_);
    value_products(at);
    const F* logits = it_.keys.logs(at);
    for (int64_t s = 0; s < at.n; ++s)
      for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
        const Vec<F> f = load(u_ + s * kQueries + i), x = load(a_ + s * kQueries + i);
        Vec<F> weight{};
        for (int64_t k = i, j = 0; j < p_.M; ++j, k += kQueries) {
          const Vec<F> q = vexp<F>((logits[s * Mp_ + j] + f) - load(c + k)), part = q * load(y_ + k);
          weight += part;
          store(d_c_ + k, load(d_c_ + k) + q * x);
          d_logits[s * Mp_ + j] += reduce_add<F>(part * x);
        }
        store(it_.tile + s * kQueries + i, weight);
        store(mean(at) + s * kQueries + i, weight * x);
      }
    add_d_value(at, it_.tile);
  }
}

template <class F>
void MaskedBackwardWorker<F>::iterate_in_logs(int64_t t) {
  const F* c = it_.potentials.sums(t);
  fill(d_v_.data(), Mp_ * kQueries, F(0));
  for (const KeyTile& at : it_.mask.tiles) {
    F* d_logits = sums.d_logits() + at.s0 * Mp_;
    it_.set_f(t, at, inverse(t, at), u_);
    const F* logits = it_.keys.logs(at);
    for (int64_t s = 0; s < at.n; ++s)
      for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
        const Vec<F> f = load(u_ + s * kQueries + i);
        Vec<F> df{};
        for (int64_t k = i, j = 0; j < p_.M; ++j, k += kQueries) {
          const Vec<F> part = vexp<F>((logits[s * Mp_ + j] + f) - load(c + k)) * load(d_c_ + k);
          df += part;
          d_logits[s * Mp_ + j] += reduce_add<F>(part);
        }
        store(a_ + s * kQueries + i, df);
      }
    collect(t, at);
    if (t > 0) rows_in_logs(t, at, logits, d_logits);
  }
}

// −λ_a R^t df^t of a tile, to dlog V^{t−1} and dℓ.
template <class F>
void MaskedBackwardWorker<F>::rows_in_logs(int64_t t, const KeyTile& at, const F* logits, F* d_logits) {
  const F *g = it_.potentials.v(t - 1), *log_p = inverse(t, at);
  for (int64_t s = 0; s < at.n; ++s)
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      const Vec<F> back = -it_.refs.lam_a * load(a_ + s * kQueries + i), below = load(log_p + s * kQueries + i);
      for (int64_t k = i, j = 0; j < p_.M; ++j, k += kQueries) {
        const Vec<F> part = back * vexp<F>((logits[s * Mp_ + j] + load(g + k)) - below);
        store(d_v_ + k, load(d_v_ + k) + part);
        d_logits[s * Mp_ + j] += reduce_add<F>(part);
      }
    }
}

template <class F>
void masked_backward(const MaskedParams& p) {
  MaskTurns turns(p);
  run_masked<MaskedBackwardWorker<F>>(p, 2.5 * masked_flops(p), turns);
}

}  // namespace
}  // namespace sfk
