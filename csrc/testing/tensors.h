// Strided tensors of random numbers, in buffers of exactly the size that the strides reach, and what is expected of
// them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../params.h"

namespace sfk {
namespace {

std::mt19937 rng(12345);
double normal() { return std::normal_distribution<double>()(rng); }
int64_t pick(std::initializer_list<int64_t> of) { return of.begin()[rng() % of.size()]; }

constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

void expect(bool ok, const char* what, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: got %.17g, want %.17g\n", what, got, want);
}

// bfloat16, rounded to nearest.
struct Rounded {
  uint16_t bits;
  Rounded() = default;
  explicit Rounded(double value) {
    const float x = static_cast<float>(value);
    uint32_t u;
    std::memcpy(&u, &x, sizeof(u));
    bits = static_cast<uint16_t>(std::isnan(x) ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &u, sizeof(x));
    return x;
  }
};

// A strided tensor of F; layout 0 contiguous, 1 rows apart, 2 last two dimensions swapped, 3 every second element.
template <class F>
struct Tensor {
  View view;
  std::unique_ptr<F[]> memory;

  Tensor(std::vector<int64_t> size, int layout) {
    view.ndim = static_cast<int32_t>(size.size());
    view.dtype = sizeof(F) == 8 ? Dtype::f64 : sizeof(F) == 4 ? Dtype::f32 : Dtype::bf16;
    std::vector<int> order;
    for (int i = view.ndim - 1; i >= 0; --i) order.push_back(i);
    if (layout == 2 && order.size() > 1) std::swap(order[0], order[1]);
    int64_t step = layout == 3 ? 2 : 1, reach = 1;
    for (int dim : order) {
      view.size[dim] = size[dim], view.stride[dim] = step;
      reach += std::max<int64_t>(size[dim] - 1, 0) * step;
      step = step * std::max<int64_t>(size[dim], 1) + (layout == 1 ? 3 : 0);
    }
    memory.reset(new F[reach]);
    for (int64_t i = 0; i < reach; ++i) memory[i] = static_cast<F>(std::nan(""));
    view.data = memory.get();
  }
  F& operator()(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
    return memory[i * view.stride[0] + j * view.stride[1] + k * view.stride[2] + l * view.stride[3]];
  }
  template <class Fn>
  void each(Fn fn) {
    for (int64_t i = 0; i < view.size[0]; ++i)
      for (int64_t j = 0; j < view.size[1]; ++j)
        for (int64_t k = 0; k < view.size[2]; ++k)
          for (int64_t l = 0; l < view.size[3]; ++l) fn(i, j, k, l, (*this)(i, j, k, l));
  }
  Tensor& random(double scale = 1) {
    each([&](int64_t, int64_t, int64_t, int64_t, F& x) { x = static_cast<F>(scale * normal()); });
    return *this;
  }
};

double lse(const std::vector<double>& x) {
  double top = -kInf, sum = 0;
  for (double v : x) top = std::fmax(top, v);
  if (top == -kInf) return top;
  for (double v : x) sum += std::exp(v - top);
  return top + std::log(sum);
}

// d loss along a random direction of `x`, by differences of the plain loops, against ⟨gradient, direction⟩.
template <class C, class F>
void check_gradient(C& c, Tensor<F>& x, Tensor<F>& grad, const char* what) {
  const double step = 1e-6;
  std::vector<double> direction;
  double claimed = 0;
  x.each([&](int64_t i, int64_t j, int64_t k, int64_t l, F& value) {
    direction.push_back(std::isfinite(value) ? normal() : 0);
    const F g = grad(i, j, k, l);
    expect(std::isfinite(g), what, g, 0);
    claimed += direction.back() * g;
  });
  const auto move = [&](double by) {
    size_t n = 0;
    x.each([&](int64_t, int64_t, int64_t, int64_t, F& value) {
      const double d = direction[n++];
      if (d != 0) value += by * d;
    });
  };
  move(step);
  const double above = c.loss();
  move(-2 * step);
  const double below = c.loss();
  move(step);
  const double slope = (above - below) / (2 * step);
  expect(std::fabs(slope - claimed) <= 1e-4 * (std::fabs(slope) + 1), what, claimed, slope);
}

}  // namespace
}  // namespace sfk
