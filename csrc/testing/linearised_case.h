// The pass of transport to convergence against plain loops in double.
#pragma once
#include "cases.h"

namespace sfk {
namespace {

// A pass from the potentials log_b: the plan of f = log a − 0.9 s and g, its column sums, and PᵀR.
template <class F>
void linearised_case(const KernelTable& kernels) {
  Sinkhorn<F> c(pick({1, 2, 5}), pick({1, 9, 97, 130}), pick({1, 7, 33, 100}), 0);
  Tensor<F> s({c.G, c.N}, 0), f({c.G, c.N}, 0), found({c.G, c.M}, 0), mass({c.G, c.M}, Case<F>::layout()),
      lam({c.G}, 0), gram({c.G, c.M, c.M}, 0), rows({c.G, c.N, c.M}, 0);
  LinearisedParams p;
  p.G = c.G, p.N = c.N, p.M = c.M, p.f64 = sizeof(F) == 8, p.threads = static_cast<int>(pick({1, 2, 7}));
  lam.each([](int64_t, int64_t, int64_t, int64_t, F& x) { x = F(0.9); });
  p.log_kernel = c.l.view, p.log_a = c.log_a.view, p.lam_a = lam.view, p.g = c.log_b.view;
  p.s = s.view, p.f = f.view, p.c = found.view, p.mass = mass.view;
  const bool streamed = rng() % 2;
  (streamed ? p.gram : p.rows) = streamed ? gram.view : rows.view;
  kernels.linearised(p);
  const double tolerance = sizeof(F) == 8 ? 1e-10 : 3e-3;
  for (int64_t at = 0; at < c.G; ++at) {
    std::vector<double> D(c.M, 0.0), A(c.M * c.M, 0.0), row(c.M);
    for (int64_t i = 0; i < c.N; ++i) {
      for (int64_t j = 0; j < c.M; ++j) row[j] = static_cast<double>(c.l(at, i, j)) + c.log_b(at, j);
      const double total = lse(row), sent = std::exp(c.log_a(at, i) + (1 - 0.9) * total);
      for (int64_t j = 0; j < c.M; ++j) {
        const double P = sent * std::exp(row[j] - total);
        D[j] += P;
        for (int64_t k = 0; k < c.M; ++k) A[j * c.M + k] += P * std::exp(row[k] - total);
      }
      expect(std::fabs(s(at, i) - total) <= tolerance * (1 + std::fabs(total)), "linearised s", s(at, i), total);
    }
    for (int64_t j = 0; j < c.M; ++j) {
      expect(std::fabs(mass(at, j) - D[j]) <= tolerance * (1 + D[j]), "linearised mass", mass(at, j), D[j]);
      for (int64_t k = 0; streamed && k < c.M; ++k) {
        const double got = gram(at, j, k), want = A[j * c.M + k];
        expect(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)), "linearised gram", got, want);
      }
    }
  }
}

}  // namespace
}  // namespace sfk
