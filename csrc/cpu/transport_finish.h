// The last pass of the transport's backward: the whole dℓ of a block, handed to the source.
#pragma once
#include "transport_backward.h"

namespace sfk {
namespace {

// Σ_j of the pooling's dℓ as it stands in acc_, in place of the df^T that ⟨v, dv⟩ gave: equal but for rounding, and
// what the R term must take away exactly where the two nearly cancel.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::settle_rows(const Marginals<F>& marg, int64_t row0, int64_t n) {
  const int64_t t = steps_ - 1;
  const F *q = row_q(t) + row0, *cq = cq_ + t * Mp_, *qd = basis_q(t), *lse = lse_ + t * stride_ + row0;
  F *df = df_ + t * stride_ + row0, *r = row_r(t) + row0, *inv = top_ + t * stride_ + row0;
  if (kLog) q_tile(t, row0, n, q_);
  for (int64_t i = 0; i < n; ++i) {
    if (given.la[row0 + i] == -kInf<F> || lse[i] == -kInf<F>) continue;
    Vec<F> sum{};
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> vdz = load(acc_ + i * Mp_ + j);
      sum += kLog ? load(q_ + i * Mp_ + j) * (vdz + load(qd + j))
                  : load(tile_ + i * Mp_ + j) * (vdz * load(cq + j) + load(qd + j));
    }
    const F settled = kLog ? reduce_add<F>(sum) : reduce_add<F>(sum) * q[i];
    gradients.d_la[row0 + i] += settled - df[i];
    if (marg.T) gradients.d_lam_a -= static_cast<double>(settled - df[i]) * (lse[i] - given.center);
    df[i] = settled;
    if (!kLog) r[i] = -marg.lam_a * settled * inv[i];
  }
}

// dℓ of the block as it stands in acc_, to the source.  Its rows sum to those of Q, less λ_a of them as Σ_j R = 1.
template <class F, class Source>
void TransportBackward<F, Source>::deliver(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  for (int64_t i = 0; i < n; ++i) u_[i] = (marg.T ? 1 - marg.lam_a : F(1)) * gradients.d_la[row0 + i];
  src.accept(row0, n, acc_, u_);
}

// dℓ_s = (1 − λ_a) Σ_t df^t_s: with one column R = 1 and every Q term is its own row sum.  Exactly 0 where λ_a = 1.
template <class F, class Source>
void TransportBackward<F, Source>::finish_one_column(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  fill(acc_.data(), n * Mp_, F(0));
  for (int64_t i = 0; i < n; ++i) acc_[i * Mp_] = (1 - marg.lam_a) * gradients.d_la[row0 + i];
  deliver(src, marg, row0, n);
}

// The whole dℓ of the block, handed to the source.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::finish_block(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  const int64_t last = steps_ - 1;
  if (Ep_ && marg.T && marg.M == 1) return finish_one_column(src, marg, row0, n);
  if (lone_) {
    fill(acc_.data(), n * Mp_, F(0));
  } else if (Ep_) {
    if (last != 0) values_ = src.values(row0, n, v_);
    Ahead ahead = src.values_ahead(row0, n);
    gemm<F>(n, Mp_, E_, values_.at, values_.ld, 1, dzt_, Mp_, acc_, Mp_, false, &ahead);
    settle_rows<kLog>(marg, row0, n);
  }
  if (!kLog) {
    const int64_t rank = marg.T ? 2 * steps_ : 1;
    gemm<F>(n, Mp_, rank, coefs_ + row0, 1, stride_, basis_, Mp_, r_, Mp_, false);
    const F *q = row_q(last) + row0, *cq = cq_ + last * Mp_;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        Vec<F> a = load(r_ + i * Mp_ + j);
        if (Ep_) a += q[i] * load(cq + j) * load(acc_ + i * Mp_ + j);
        store(acc_ + i * Mp_ + j, a * load(tile_ + i * Mp_ + j));
      }
    deliver(src, marg, row0, n);
    return;
  }
  if (!Ep_) fill(acc_.data(), n * Mp_, F(0));
  for (int64_t t = last; t >= 0; --t) {
    q_tile(t, row0, n, q_);
    const F *r = row_r(t) + row0, *df = df_ + t * stride_ + row0, *g = g_ + t * Mp_, *top = top_ + t * stride_ + row0;
    for (int64_t i = 0; i < n; ++i) {
      const F coef = marg.T ? -marg.lam_a * df[i] * r[i] : F(0);
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        const Vec<F> before = load(acc_ + i * Mp_ + j), Q = load(q_ + i * Mp_ + j);
        Vec<F> d = t == last ? Q * (before + load(basis_q(t) + j)) : before + Q * load(basis_q(t) + j);
        if (coef != 0) d += coef * vexp<F>((load(tile_ + i * Mp_ + j) + load(g + j)) - top[i]);
        store(acc_ + i * Mp_ + j, d);
      }
    }
  }
  deliver(src, marg, row0, n);
}

}  // namespace
}  // namespace sfk
