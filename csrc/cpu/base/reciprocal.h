// The reciprocal, where it is what a kernel does most beside its products.
#pragma once
#include "vec.h"

namespace sfk {
namespace {

// 1/x of normal numbers.
#if defined(__AVX512F__)
SFK_INLINE Vec<float> reciprocal(
    Vec<float> x) {  // an estimate to 14 bits and one step of Newton's: a third of a division
  const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
}
#else
SFK_INLINE Vec<float> reciprocal(Vec<float> x) { return 1.0f / x; }
#endif
SFK_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

}  // namespace
}  // namespace sfk
