// Rows of logits: their maxima, their exponentials, their products with a vector; and single numbers of a matrix.
#pragma once
#include "base/explog.h"
#include "base/tiles.h"

namespace sfk {
namespace {

template <class F>
F element(const View& v, int64_t i, int64_t j) {
  return static_cast<const F*>(v.data)[i * v.stride[0] + j * v.stride[1]];
}

// out[i] = Σ_j rows[i][j] v[j]
template <class F>
void row_dots(int64_t n, int64_t Mp, const F* rows, const F* v, F* out) {
  for (int64_t i = 0; i < n; ++i, rows += Mp) {
    Vec<F> acc{};
    for (int64_t j = 0; j < Mp; j += kLanes<F>) acc += load(rows + j) * load(v + j);
    out[i] = reduce_add<F>(acc);
  }
}

// G = exp(g − max g); returns max g, and the spread of the finite g.
template <class F>
F exp_shifted(int64_t M, int64_t Mp, const F* g, F* G, F& spread) {
  F top = -kInf<F>, low = kInf<F>;
  for (int64_t j = 0; j < M; ++j) {
    top = std::max(top, g[j]);
    if (g[j] != -kInf<F>) low = std::min(low, g[j]);
  }
  spread = top == -kInf<F> ? kInf<F> : top - low;  // nothing to shift by: left to log mode
  for (int64_t j = 0; j < Mp; j += kLanes<F>) store(G + j, vexp<F>(load(g + j) - top));
  return top;
}

// The maximum of a row of ℓ, whose columns M.. become −inf; a row that takes no part becomes all equal.
template <class F>
F row_maximum(int64_t M, int64_t Mp, F* row, bool absent) {
  if (absent) fill(row, M, F(0));
  for (int64_t j = M; j < Mp; ++j) row[j] = -kInf<F>;
  Vec<F> top = load(row);
  for (int64_t j = kLanes<F>; j < Mp; j += kLanes<F>) top = vmax(top, load(row + j));
  return reduce_max<F>(top);
}

// ℓ -> ℓ − m in place: what a row's logits share, as a long way to every reference, cancels before it costs digits.
template <class F>
void shift_rows(int64_t n, int64_t M, int64_t Mp, F* tile, const F* la, F* m) {
  for (int64_t i = 0; i < n; ++i, tile += Mp) {
    m[i] = row_maximum<F>(M, Mp, tile, la[i] == -kInf<F>);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) store(tile + j, load(tile + j) - m[i]);
  }
}

// ℓ -> e^{ℓ − m} in place.  Lowers `lowest` to the smallest finite ℓ − m.
template <class F>
void scale_rows(int64_t n, int64_t M, int64_t Mp, F* tile, const F* la, F* m, F& lowest) {
  Vec<F> low = splat(lowest);
  for (int64_t i = 0; i < n; ++i, tile += Mp) {
    m[i] = row_maximum<F>(M, Mp, tile, la[i] == -kInf<F>);
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> x = load(tile + j) - m[i];
      low = vmin(x == -kInf<F> ? Vec<F>{} : x, low);
      store(tile + j, vexp<F>(x));
    }
  }
  lowest = reduce_min<F>(low);
}

// logsumexp of a row of ℓ + add; also its parts: the maximum, and the sum of exponentials below it.
template <class F>
F row_lse(int64_t Mp, const F* row, const F* add, F* top_out = nullptr, F* sum_out = nullptr) {
  Vec<F> top = splat(-kInf<F>), sum{};
  for (int64_t j = 0; j < Mp; j += kLanes<F>) top = vmax(top, load(row + j) + load(add + j));
  const F m = reduce_max<F>(top);
  if (m == -kInf<F>) return m;
  for (int64_t j = 0; j < Mp; j += kLanes<F>) sum += vexp<F>(load(row + j) + load(add + j) - m);
  const F total = reduce_add<F>(sum);
  if (top_out) *top_out = m, *sum_out = total;
  return static_cast<F>(m + std::log(static_cast<double>(total)));
}

}  // namespace
}  // namespace sfk
