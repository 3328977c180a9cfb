// What the machine could do: the arithmetic peaks that the kernels are measured against.
#pragma once
#include <chrono>

#include "base/explog.h"

namespace sfk {
namespace {

template <class Body>
double rate(double seconds, double per_call, Body body) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double calls = 0, elapsed = 0;
  do {
    body();
    calls += 1;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return calls * per_call / elapsed;
}

// Independent chains of fused multiply-adds held in registers; float32.
double fma_rate(double seconds) {
  constexpr int kChains = 12, kSteps = 4096;
  Vec<float> total{};
  const double result = rate(seconds, 2.0 * kChains * kSteps * kLanes<float>, [&] {
    Vec<float> acc[kChains];  // local, so that the chains live in registers; different, so that they stay apart
    for (int c = 0; c < kChains; ++c) acc[c] = splat(static_cast<float>(c));
    const Vec<float> a = splat(0.999f), b = splat(1e-3f);
    for (int i = 0; i < kSteps; ++i) {
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
      for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * a + b;
    }
    for (int c = 0; c < kChains; ++c) total += acc[c];
  });
  volatile float sink = reduce_add<float>(total);
  (void)sink;
  return result;
}

// vexp over an array that stays in the first-level cache; float32.
double exp_rate(double seconds) {
  constexpr int kCount = 2048;
  alignas(64) float x[kCount], y[kCount];
  for (int i = 0; i < kCount; ++i) x[i] = -20.0f * static_cast<float>(i) / kCount;
  const double result = rate(seconds, kCount, [&] {
    for (int i = 0; i < kCount; i += kLanes<float>) store(y + i, vexp<float>(load(x + i)));
#if defined(__GNUC__)
    __asm__ volatile("" : : "r"(y) : "memory");
#endif
  });
  return result;
}

}  // namespace
}  // namespace sfk
