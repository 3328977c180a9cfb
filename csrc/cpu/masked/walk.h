// Steps of a walk over tiles of keys, as products (where the sums stay in range) and in the log domain.
#pragma once
#include <atomic>

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

// p -> 1/p in place, and u = masses · p^{−λ}.  Returns the smallest p.
template <class F>
F divide(int64_t count, const F* masses, F lam, F* p, F* u) {
  Vec<F> least = splat(kInf<F>);
  for (int64_t k = 0; k < count; k += kLanes<F>) {
    const Vec<F> x = load(p + k), inverse = F(1) / x;
    least = vmin(x, least);
    Vec<F> factor = inverse;
    if (lam != 1) factor = vexp<F>(-lam * vlog<F>(x));
    store(p + k, inverse);
    store(u + k, load(masses + k) * factor);
  }
  return reduce_min<F>(least);
}

// out [n][kQueries] = masses times a factor a key.
template <class F>
void scale_keys(int64_t n, const F* masses, const F* factor, F* out) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < kQueries; i += kLanes<F>)
      store(out + s * kQueries + i, load(masses + s * kQueries + i) * factor[s]);
}

// Whether every column sum of a query that sees a key lies in range; those of the others become 1.
template <class F>
bool settle_sums(int64_t M, const F* seen, F floor, F* sums) {
  bool ok = true;
  for (int64_t k = 0; k < M * kQueries; ++k) {
    if (seen[k % kQueries] == 0) sums[k] = 1;
    ok = ok && sums[k] >= floor && sums[k] * floor <= 1;
  }
  return ok;
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
