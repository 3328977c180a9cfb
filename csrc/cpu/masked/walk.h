// Steps of a walk over tiles of keys, as products (where the sums stay in range) and in the log domain.
#pragma once

#include "block.h"

namespace sfk {
namespace {

// What row sums V Exᵀ and column sums U Ex may not fall below, for the terms they have lost to be below their rounding.
template <class F>
struct Floor {
  F row, column;
};
// Masses below e^kThin may be what a sum consists of: fewer factors are then left to it.
template <class F>
constexpr F kThin = sizeof(F) == 4 ? F(-40) : F(-300);
template <class F>
Floor<F> floor_of(F lowest, bool backward) {
  const bool thin = lowest < kThin<F>;
  if constexpr (sizeof(F) == 4) {
    if (backward) return thin ? Floor<F>{1e-8f, 1e-14f} : Floor<F>{1e-17f, 1e-17f};
    return thin ? Floor<F>{1e-10f, 1e-20f} : Floor<F>{1e-26f, 1e-27f};
  } else {
    return thin ? Floor<F>{1e-80, 1e-150} : Floor<F>{1e-150, 1e-150};
  }
}

// p -> 1/p in place.  Returns the smallest p.
template <class F>
F invert(int64_t count, F* p) {
  Vec<F> least = splat(kInf<F>);
  for (int64_t k = 0; k < count; k += kLanes<F>) {
    const Vec<F> x = load(p + k);
    least = vmin(x, least);
    store(p + k, reciprocal(x));
  }
  return reduce_min<F>(least);
}

// The masses of a tile: [n][kQueries], or one a key where it is full.
template <class F>
struct TileMasses {
  const F *all, *of_key;  // all is null where the tile is full
  Vec<F> operator()(int64_t s, int64_t i) const { return all ? load(all + s * kQueries + i) : splat(of_key[s]); }
};

// u [n][kQueries] = masses · x^λ.
template <class F>
void scale_masses(int64_t n, const TileMasses<F>& masses, F lam, const F* x, F* u) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0, k = s * kQueries; i < kQueries; i += kLanes<F>, k += kLanes<F>) {
      const Vec<F> factor = load(x + k);
      store(u + k, masses(s, i) * (lam == 1 ? factor : vexp<F>(lam * vlog<F>(factor))));
    }
}

// out [n][kQueries] = masses times a factor a key.
template <class F>
void scale_keys(int64_t n, const TileMasses<F>& masses, const F* factor, F* out) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) store(out + s * kQueries + i, masses(s, i) * factor[s]);
}

// Whether every column sum of a query that sees a key lies in range; those of the others become 1.
template <class F>
bool settle_sums(int64_t M, const F* seen, F floor, F* sums) {
  Vec<F> least = splat<F>(1), most = splat<F>(1), sane{};
  for (int64_t k = 0; k < M * kQueries; k += kLanes<F>) {
    const Vec<F> there = load(seen + k % kQueries), x = there == F(0) ? splat<F>(1) : load(sums + k);
    least = vmin(x, least), most = vmax(x, most);
    sane += x - x;  // NaN where x is none, which a minimum may pass over
    store(sums + k, x);
  }
  return reduce_add<F>(sane) == 0 && reduce_min<F>(least) >= floor && reduce_max<F>(most) * floor <= 1;
}

// LSE_j(logits_sj + g_j) of each key and query [n][kQueries]; logits [n][Mp], g [M][kQueries].
template <class F>
void lse_of_rows(int64_t n, int64_t M, int64_t Mp, const F* logits, const F* g, F* out) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      const F* row = logits + s * Mp;
      Vec<F> top = splat(-kInf<F>), sum{};
      for (int64_t j = 0; j < M; ++j) top = vmax(top, row[j] + load(g + j * kQueries + i));
      for (int64_t j = 0; j < M; ++j) sum += vexp<F>(row[j] + load(g + j * kQueries + i) - top);
      store(out + s * kQueries + i, top + vlog<F>(sum));
    }
}

// Takes a tile into the running sums Σ_s e^{logits_sj + f_s} = sum e^{top} of each reference and query [M][kQueries].
template <class F>
void add_columns(int64_t n, int64_t M, int64_t Mp, const F* logits, const F* f, F* top, F* sum) {
  for (int64_t j = 0; j < M; ++j)
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      const Vec<F> before = load(top + j * kQueries + i);
      Vec<F> most = before, total{};
      for (int64_t s = 0; s < n; ++s) most = vmax(most, logits[s * Mp + j] + load(f + s * kQueries + i));
      const Vec<F> shift = most == -kInf<F> ? Vec<F>{} : most;
      for (int64_t s = 0; s < n; ++s) total += vexp<F>(logits[s * Mp + j] + load(f + s * kQueries + i) - shift);
      store(top + j * kQueries + i, most);
      store(sum + j * kQueries + i, load(sum + j * kQueries + i) * vexp<F>(before - shift) + total);
    }
}

// log C = top + log sum in place of the sum, 0 for queries that see nothing.
template <class F>
void log_of_columns(int64_t M, const F* seen, const F* top, F* sum) {
  for (int64_t k = 0; k < M * kQueries; k += kLanes<F>) {
    const Vec<F> there = load(seen + k % kQueries);
    store(sum + k, there == F(0) ? Vec<F>{} : load(top + k) + vlog<F>(load(sum + k)));
  }
}

}  // namespace
}  // namespace sfk
