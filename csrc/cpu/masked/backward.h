// set_attention under a query-dependent mask, backward: exact for the T iterations that ran, which run again: nothing
// but the inputs is saved.
//
// By blocks of queries, with D_ij = Σ_s U_is Ex_sj ⟨do_i, v_s⟩/C_ij = ⟨do_i, z_ij⟩:
// dS = W^q (D − Σ W^q D),  dlog C^T = −W^q D − λ_b dS;  then downwards in t, with dC = dlog C/C,
// df^t = U^t ⊙ (dC Exᵀ) (and the pooling's part in the last),  dP = −λ_a df/P,  dlog V^{t−1} = V ⊙ (dP Ex),
// dlog C^{t−1} = −λ_b dlog V^{t−1}.  What the keys get is a sum over the queries of products of such pairs.
#pragma once
#include "gradients.h"
#include "iterations.h"

namespace sfk {
namespace {

template <class F>
class MaskedBackwardWorker {
 public:
  MaskedBackwardWorker(const MaskedParams& p, MaskTurns& turns)
      : p_(p),
        turns_(turns),
        it_(p),
        sums(p, it_.refs),
        steps_(it_.potentials.steps),
        Mp_(it_.refs.Mp),
        Ep_(it_.Ep),
        inverse_((steps_ - 1) * p.S * kQueries),
        u_(it_.mask.keys() * kQueries),
        a_(it_.mask.keys() * kQueries),
        y_(Mp_ * kQueries),
        d_c_(Mp_ * kQueries),
        d_v_(Mp_ * kQueries),
        v_rows_(kQueries * Mp_),
        y_rows_(kQueries * Mp_),
        d_x_(kQueries * it_.refs.Dp),
        d_o_(kQueries * Ep_),
        d_o_lanes_(Ep_ * kQueries) {}

  void run(int64_t item) {
    begin(item % p_.B, item / p_.B);
    wide_begun_ = false;
    for (int64_t row0 = 0; row0 < p_.L; row0 += kQueries) block(row0, std::min(kQueries, p_.L - row0));
    if (!wide_begun_) return sums.store(it_.keys, it_.b, it_.h);
    wide_->sums.add(sums);
    wide_->sums.store(wide_->it_.keys, it_.b, it_.h);
  }
  void begin(int64_t b, int64_t h) {
    it_.begin(b, h, kBackwardRange<F>);
    sums.clear();
  }

  void block(int64_t row0, int64_t n) {
    it_.begin_block(row0, n);
    logs_ = !it_.iterate(true, inverse_);
    if constexpr (!kIsWide<F>)
      if (logs_) return wide().block(row0, n);
    if (logs_) prepare_in_logs();
    it_.read(logs_);
    load_d_o();
    logs_ ? pool_in_logs() : pool();
    read_gradient();
    for (int64_t t = steps_ - 1; t >= 0; --t) {
      logs_ ? iterate_in_logs(t) : iterate(t);
      if (t == 0) break;
      fill(d_c_.data(), Mp_ * kQueries, F(0));
      add_potential_gradient(t - 1, d_v_);
    }
    store_masses();
  }

 private:
  template <class>
  friend class MaskedBackwardWorker;

  MaskedBackwardWorker<double>& wide() {
    if (!wide_) wide_ = std::make_unique<MaskedBackwardWorker<double>>(p_, turns_);
    if (!wide_begun_) wide_->begin(it_.b, it_.h);
    wide_begun_ = true;
    return *wide_;
  }

  F* inverse(int64_t t, const KeyTile& at) {
    return inverse_ + (std::max<int64_t>(t - 1, 0) * p_.S + at.s0) * kQueries;
  }
  F* mean(const KeyTile& at) const { return it_.u_of(at); }

  void load_d_o() {
    F skip[kQueries];
    for (int64_t i = 0; i < it_.n; ++i) skip[i] = it_.mask.seen[i] == 0 ? -kInf<F> : F(0);
    load_rows<F>(p_.d_o, it_.b, it_.h, it_.row0, it_.n, skip, d_o_, Ep_);
    fill(d_o_ + it_.n * Ep_, (kQueries - it_.n) * Ep_, F(0));
    transpose<F>(kQueries, p_.E, d_o_, Ep_, d_o_lanes_, kQueries);
  }

  // U^t of a tile.
  void set_u(int64_t t, const KeyTile& at) {
    if (t == 0) return scale_keys<F>(at.n, it_.n_of(at), it_.keys.first + at.s0, u_);
    scale_masses<F>(at.n, it_.n_of(at), it_.refs.lam_a, inverse(t, at), u_);
  }

  // D to d_c_; dv, the pooling's part of df^T and of the keys' gradients.
  void pool() {
    const F *c = it_.potentials.sums(steps_ - 1), *keep = it_.potentials.keep, *w = it_.potentials.w;
    for (int64_t k = 0; k < p_.M * kQueries; k += kLanes<F>)
      store(y_ + k, load(w + k) * load(keep + k) * reciprocal(load(c + k)));
    by_rows(y_, y_rows_);
    fill(d_c_.data(), Mp_ * kQueries, F(0));
    for (const KeyTile& at : it_.mask.tiles) pool_tile(at);
    for (int64_t k = 0; k < p_.M * kQueries; k += kLanes<F>) store(d_c_ + k, load(d_c_ + k) * reciprocal(load(c + k)));
  }

  void pool_tile(const KeyTile& at) {
    F *r = it_.tile, *part = mean(at);
    set_u(steps_ - 1, at);
    value_products(at);
    it_.by_keys(at, y_, r);
    for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>) {
      const Vec<F> u = load(u_ + k), x = load(a_ + k) * u;
      store(part + k, x * load(r + k));
      store(r + k, u * load(r + k));
      store(a_ + k, x);
    }
    add_d_value(at, r);
    it_.by_references(at, a_, d_c_);
    add_d_exp(at, a_, y_rows_);
  }

  // ⟨do_i, v_s⟩ of a tile to a_.
  void value_products(const KeyTile& at) {
    const Rows<F> v = it_.keys.values(at);
    gemm<F>(at.n, kQueries, p_.E, v.at, v.ld, 1, d_o_lanes_, kQueries, a_, kQueries, false);
  }
  void add_d_value(const KeyTile& at, const F* weights) {
    gemm<F>(at.n, Ep_, kQueries, weights, kQueries, 1, d_o_, Ep_, sums.d_value + at.s0 * Ep_, Ep_, true);
  }
  // Σ_i left_is right_ij; left [n][kQueries], right [kQueries][Mp].
  void add_d_exp(const KeyTile& at, const F* left, const F* right) {
    gemm<F>(at.n, Mp_, kQueries, left, kQueries, 1, right, Mp_, sums.d_exp + at.s0 * Mp_, Mp_, true);
  }
  // The same for the first iteration of a full tile, where U is one number a key; right in y_rows_.
  void add_d_exp_of_full(const KeyTile& at) {
    F* total = v_rows_;
    fill(total, Mp_, F(0));
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) store(total + j, load(total + j) + load(y_rows_ + i * Mp_ + j));
    for (int64_t s = 0; s < at.n; ++s)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        F* out = sums.d_exp + (at.s0 + s) * Mp_ + j;
        store(out, load(out) + u_[s * kQueries] * load(total + j));
      }
  }
  void by_rows(const F* lanes, F* rows) {
    fill(rows, kQueries * Mp_, F(0));
    transpose<F>(p_.M, kQueries, lanes, kQueries, rows, Mp_);
  }

  // From D in d_c_: dS and dq; dlog C^T in d_c_.
  void read_gradient() {
    F *d_s = y_, *d_c = d_c_;
    const F *w = it_.potentials.w, *keep = it_.potentials.keep;
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      Vec<F> mean{}, total{};
      for (int64_t k = i; k < p_.M * kQueries; k += kQueries) {
        const Vec<F> d = load(d_c + k) * load(keep + k);
        store(d_c + k, d);
        mean += d * load(w + k), total += load(w + k);
      }
      mean = mean / (total == F(0) ? splat<F>(1) : total);
      for (int64_t k = i; k < p_.M * kQueries; k += kQueries) {
        const Vec<F> weight = load(w + k), d = load(d_c + k);
        store(d_s + k, weight * (d - mean));
        store(d_c + k, -weight * d);
      }
    }
    add_potential_gradient(steps_ - 1, d_s);
    by_rows(d_s, y_rows_);
    const F* nothing = nullptr;
    const BlockQueries<F>& q = it_.queries;
    logit_grads<F>(it_.refs, it_.n, q.kappa, q.pos, y_rows_, nothing, sums.refs_grads);
    token_grads<F>(it_.refs, it_.b, it_.h, it_.row0, it_.n, q.x, q.inv, q.kappa, y_rows_, p_.d_query, d_x_,
                   sums.refs_grads);
  }

  // d_g = dg of step t, which follows log C^t: adds to d_c_ what that gets, to dlog b and to dλ_b.
  void add_potential_gradient(int64_t t, const F* d_g) {
    const F* c = it_.potentials.sums(t);
    for (int64_t j = 0; j < p_.M; ++j) {
      Vec<F> d_b{}, d_lam{};
      for (int64_t k = j * kQueries; k < (j + 1) * kQueries; k += kLanes<F>) {
        const Vec<F> d = load(d_g + k);
        d_b += d;
        if (p_.T && p_.d_hyper) d_lam += d * (logs_ ? load(c + k) : vlog<F>(load(c + k)));
        if (p_.T) store(d_c_ + k, load(d_c_ + k) - it_.refs.lam_b * d);
      }
      sums.d_log_b[j] += reduce_add<F>(d_b);
      sums.refs_grads.hyper[kLambdaB] -= reduce_add<F>(d_lam);
    }
  }

  // df^t, and with it what the keys get from step t; dlog V^{t−1} to d_v_.
  void iterate(int64_t t) {
    const F *c = it_.potentials.sums(t), *v = t > 0 ? it_.potentials.v(t - 1) : nullptr;
    for (int64_t k = 0; k < p_.M * kQueries; k += kLanes<F>) store(d_c_ + k, load(d_c_ + k) * reciprocal(load(c + k)));
    by_rows(d_c_, y_rows_);
    fill(d_v_.data(), Mp_ * kQueries, F(0));
    if (v) by_rows(v, v_rows_);
    for (const KeyTile& at : it_.mask.tiles) {
      set_u(t, at);
      it_.by_keys(at, d_c_, a_);
      for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>) store(a_ + k, load(a_ + k) * load(u_ + k));
      if (t == 0 && at.full)
        add_d_exp_of_full(at);
      else
        add_d_exp(at, u_, y_rows_);
      collect(t, at);
      if (!v) continue;
      const F* inv = inverse(t, at);
      for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>)
        store(a_ + k, -it_.refs.lam_a * load(a_ + k) * load(inv + k));
      it_.by_references(at, a_, d_v_);
      add_d_exp(at, a_, v_rows_);
    }
    for (int64_t k = 0; v && k < p_.M * kQueries; k += kLanes<F>) store(d_v_ + k, load(d_v_ + k) * load(v + k));
  }

  // From the column part of df^t in a_ to df^t, which adds up in the mean; what sums over the queries alone.
  void collect(int64_t t, const KeyTile& at) {
    const bool last = t == steps_ - 1;
    for (int64_t s = 0; s < at.n; ++s) {
      Vec<F> sum{};
      for (int64_t k = s * kQueries; k < (s + 1) * kQueries; k += kLanes<F>) {
        const Vec<F> before = load(mean(at) + k), df = last ? load(a_ + k) + before : load(a_ + k);
        store(a_ + k, df);
        store(mean(at) + k, last ? df : before + df);
        sum += df;
      }
      if (t == 0) sums.d_first[at.s0 + s] += reduce_add<F>(sum);
    }
    if (p_.T && p_.d_hyper) collect_relaxation(t, at);
  }

  // dλ_a = −Σ df LSE_j(ℓ + g), about a value that all keys share.
  void collect_relaxation(int64_t t, const KeyTile& at) {
    double total = 0;
    for (int64_t s = 0; s < at.n; ++s) {
      const F below = t == 0 ? it_.keys.lse[at.s0 + s] : F(0);
      const F shared = it_.keys.m[at.s0 + s] - it_.refs.middle_logit() + below;
      Vec<F> sum{};
      for (int64_t k = s * kQueries; k < (s + 1) * kQueries; k += kLanes<F>) {
        Vec<F> lse = splat(shared);
        if (t > 0) lse += logs_ ? load(inverse(t, at) + k) : -vlog<F>(load(inverse(t, at) + k));
        sum += load(a_ + k) * lse;
      }
      total += reduce_add<F>(sum);
    }
    sums.refs_grads.hyper[kLambdaA] -= total;
  }

  // Σ_s Σ_t df^t of a query is 0, as a factor of its masses cancels: what it is by rounding, all its masses share.
  void center() {
    Buffer<F> total(kQueries), mass(kQueries);
    fill(total.data(), kQueries, F(0)), fill(mass.data(), kQueries, F(0));
    const auto n = [&](const KeyTile& at, int64_t k) {
      return logs_ ? vexp<F>(load(it_.masses_of(at) + k)) : it_.n_of(at)(k / kQueries, k % kQueries);
    };
    for (const KeyTile& at : it_.mask.tiles)
      for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>) {
        store(total + k % kQueries, load(total + k % kQueries) + load(mean(at) + k));
        store(mass + k % kQueries, load(mass + k % kQueries) + n(at, k));
      }
    for (int64_t i = 0; i < kQueries; ++i) total[i] = mass[i] > 0 ? total[i] / mass[i] : F(0);
    for (const KeyTile& at : it_.mask.tiles)
      for (int64_t k = 0; k < at.n * kQueries; k += kLanes<F>)
        store(mean(at) + k, load(mean(at) + k) - load(total + k % kQueries) * n(at, k));
  }

  void store_masses() {
    if (p_.d_mask || p_.d_log_a) center();
    for (const KeyTile& at : it_.mask.tiles)
      for (int64_t s = 0; s < at.n; ++s) {
        Vec<F> sum{};
        for (int64_t i = 0; i < kQueries; i += kLanes<F>) sum += load(mean(at) + s * kQueries + i);
        sums.d_mass[at.s0 + s] += reduce_add<F>(sum);
      }
    if (!p_.d_mask) return;
    turns_.wait(it_.b, it_.h, it_.row0 / kQueries);
    for (const KeyTile& at : it_.mask.tiles) it_.mask.add_gradient(it_.b, it_.h, at, mean(at));
    turns_.pass(it_.b, it_.h, it_.row0 / kQueries);
  }

  void prepare_in_logs();
  void pool_in_logs();
  void iterate_in_logs(int64_t t);
  void rows_in_logs(int64_t t, const KeyTile& at, const F* logits, F* d_logits);

  const MaskedParams& p_;
  MaskTurns& turns_;
  MaskedIterations<F> it_;

 public:
  MaskedSums<F> sums;

 private:
  int64_t steps_, Mp_, Ep_;
  bool logs_ = false;                // whether the block is computed in the log domain
  Buffer<F> inverse_;                // [T − 1][S][kQueries] 1/P^t (in logs: log P^t)
  Buffer<F> u_, a_;                  // [keys][kQueries]
  Buffer<F> y_, d_c_, d_v_;          // [Mp][kQueries]
  Buffer<F> v_rows_, y_rows_, d_x_;  // [kQueries][Mp] [kQueries][Mp] [kQueries][Dp]
  Buffer<F> d_o_, d_o_lanes_;        // [kQueries][Ep] [Ep][kQueries]
  std::unique_ptr<MaskedBackwardWorker<double>> wide_;
  bool wide_begun_ = false;  // for the head at hand
};

}  // namespace
}  // namespace sfk

#include "backward_logs.h"
