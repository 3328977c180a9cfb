// What the transport of rows pools: a block's weights times its values, and the weights themselves.
#pragma once
#include "transport.h"

namespace sfk {
namespace {

// u K to the tile, and its column sums.  K itself may be asked for again.
template <class F, class Source>
void Transport<F, Source>::weigh_rows(int64_t n, const F* K) {
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    Vec<F> sum{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<F> w = load(K + i * Mp_ + j) * u_[i];
      sum += w;
      store(tile_ + i * Mp_ + j, w);
    }
    store(state.sum + j, load(state.sum + j) + sum);
  }
}

// z_j = v of the row whose `present` is not 0, for every column.
template <class F, class Source>
void Transport<F, Source>::pool_lone(Source& src, int64_t row0, int64_t n, const F* present) {
  const Rows<F> v = src.values(row0, n, values_);
  for (int64_t i = 0; i < n; ++i) {
    if (present[i] == 0) continue;
    for (int64_t j = 0; j < Mp_; ++j) std::copy_n(v[i], Ep_, state.z + j * Ep_);
  }
}

template <class F, class Source>
F* Transport<F, Source>::pooled(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  const F lam = marg.T ? marg.lam_a : F(0);
  F* tile = log_ ? rows_tile<true>(src, row0, n, false, marg.M) : rows_tile<false>(src, row0, n, false, marg.M);
  if (log_) {
    // g^{T−1}, whose place G_ is: g has gone on to g^T.
    const F* before = marg.T > 1 ? c + (marg.T - 2) * Mp_ : nullptr;
    for (int64_t j = 0; j < Mp_; ++j)
      G_[j] = !before ? marg.log_b[j] : before[j] == -kInf<F> ? -kInf<F> : marg.log_b[j] - marg.lam_b * before[j];
    log_rows(src, row0, n, tile, G_, lam);
  } else {
    scaled_rows(src, row0, n, tile, lam, F(0));
    for (int64_t i = 0; i < n; i += kLanes<F>) store(u_ + i, vexp<F>(load(u_ + i) - ref_[0]));
  }
  for (int64_t i = 0; i < n; ++i) {
    F* row = tile + i * Mp_;
    if (state.lone) {
      fill(row, Mp_, F(la[row0 + i] != -kInf<F>));
      continue;
    }
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> x = load(row + j);
      store(row + j, (log_ ? vexp<F>(x + (u_[i] - load(ref_ + j))) : x * u_[i]) * load(inv_ + j));
    }
  }
  return tile;
}

}  // namespace
}  // namespace sfk
