// set_attention under a query-dependent mask, forward: every query with its own masses n_is, T iterations each; then
// W^q = softmax_j(ℓ_q + log V), A = U ⊙ ((W^q/C) Exᵀ), o = A v.
#pragma once
#include "iterations.h"

namespace sfk {
namespace {

template <class F>
class MaskedWorker {
 public:
  explicit MaskedWorker(const MaskedParams& p)
      : p_(p), it_(p), y_(it_.refs.Mp * kQueries), out_(it_.Ep * kQueries), rows_(kQueries * it_.Ep) {}

  void run(int64_t item) {
    begin(item % p_.B, item / p_.B);
    wide_begun_ = false;
    for (int64_t row0 = 0; row0 < p_.L; row0 += kQueries) block(row0, std::min(kQueries, p_.L - row0));
  }
  void begin(int64_t b, int64_t h) { it_.begin(b, h, Limits<F>::kRange); }

  void block(int64_t row0, int64_t n) {
    it_.begin_block(row0, n);
    const bool products = it_.iterate(false, nullptr);
    if constexpr (!kIsWide<F>)
      if (!products) return wide().block(row0, n);
    if (!products) it_.iterate_in_logs();
    it_.read(!products);
    for (int64_t k = 0; k < p_.M * kQueries; k += kLanes<F>)
      store(y_ + k, load(it_.potentials.w + k) * load(it_.potentials.keep + k));
    fill(out_.data(), it_.Ep * kQueries, F(0));
    products ? pool() : pool_in_logs();
    transpose<F>(p_.E, kQueries, out_, kQueries, rows_, it_.Ep);
    store_rows<F>(p_.o, it_.b, it_.h, row0, n, rows_.data(), it_.Ep, static_cast<const F*>(nullptr));
  }

 private:
  void pool() {
    const F* c = it_.potentials.sums(it_.potentials.steps - 1);
    for (int64_t k = 0; k < p_.M * kQueries; k += kLanes<F>) store(y_ + k, load(y_ + k) * reciprocal(load(c + k)));
    for (const KeyTile& at : it_.mask.tiles) {
      F *a = it_.tile, *u = it_.u_of(at);
      it_.by_keys(at, y_, a);
      for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>) store(a + k, load(a + k) * load(u + k));
      add_values(at);
    }
  }

  // o += A v of a tile.
  void add_values(const KeyTile& at) {
    const Rows<F> v = it_.keys.values(at);
    gemm<F>(p_.E, kQueries, at.n, v.at, 1, v.ld, it_.tile, kQueries, out_, kQueries, true);
  }

  // A = Σ_j e^{ℓ − m + f − log C} W^q.
  void pool_in_logs() {
    const F* c = it_.potentials.sums(it_.potentials.steps - 1);
    for (const KeyTile& at : it_.mask.tiles) {
      const F* logits = it_.keys.logs(at);
      for (int64_t s = 0; s < at.n; ++s)
        for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
          const Vec<F> f = load(it_.u_of(at) + s * kQueries + i);
          Vec<F> sum{};
          for (int64_t k = i, j = 0; j < p_.M; ++j, k += kQueries)
            sum += vexp<F>((logits[s * it_.refs.Mp + j] + f) - load(c + k)) * load(y_ + k);
          store(it_.tile + s * kQueries + i, sum);
        }
      add_values(at);
    }
  }

  MaskedWorker<double>& wide() {
    if (!wide_) wide_ = std::make_unique<MaskedWorker<double>>(p_);
    if (!wide_begun_) wide_->begin(it_.b, it_.h);
    wide_begun_ = true;
    return *wide_;
  }

  const MaskedParams& p_;
  MaskedIterations<F> it_;
  Buffer<F> y_;           // [Mp][kQueries] W^q/C
  Buffer<F> out_, rows_;  // [Ep][kQueries] and [kQueries][Ep] o
  std::unique_ptr<MaskedWorker<double>> wide_;
  bool wide_begun_ = false;  // for the head at hand
};

template <class F>
void masked_forward(const MaskedParams& p) {
  run_masked<MaskedWorker<F>>(p, masked_flops(p));
}

}  // namespace
}  // namespace sfk
