// Vector exp and log, about one unit in the last place, without tables or libm.
#pragma once
#include "vec.h"

namespace sfk {
namespace {

template <class F>
struct ExpTable;
template <>
struct ExpTable<float> {
  // Below kLow the result would be denormal and is 0; above kHigh it would overflow and stays finite.
  static constexpr float kLow = -87.33654f, kHigh = 88.0f;
  static constexpr float kLog2e = 1.44269504f, kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr int kBias = 127, kBits = 23, kTerms = 6;
  // exp(r) = 1 + r + r² Σ_k c_k r^k on |r| <= ln(2)/2 (Cephes' minimax coefficients, highest power first).
  static constexpr float c[kTerms] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                      4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct ExpTable<double> {
  static constexpr double kLow = -708.39, kHigh = 709.0;
  static constexpr double kLog2e = 1.4426950408889634, kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kBias = 1023, kBits = 52, kTerms = 12;
  // Taylor: the first term left out is below 2^-57 on |r| <= ln(2)/2.
  static constexpr double c[kTerms] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                       1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                       1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

#if defined(__AVX512F__)
// p · 2^n, 0 and infinity included: one instruction.
SFK_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
}
SFK_INLINE Vec<double> scale_by_power(Vec<double> p, Vec<double> n) {
  return (Vec<double>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
}
#endif

// x = n log 2 + r with |r| <= log(2)/2, for x in the range of the result: e^r − 1; `shifted` is n and kMagic.
template <class F>
SFK_INLINE Vec<F> reduced_expm1(Vec<F> x, Vec<F>& shifted) {
  using C = ExpTable<F>;
  shifted = x * C::kLog2e + C::kMagic;
  const Vec<F> n = shifted - C::kMagic;
  Vec<F> r = x - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  Vec<F> p = splat<F>(C::c[0]);
  SFK_UNROLL
  for (int i = 1; i < C::kTerms; ++i) p = p * r + C::c[i];
  return (p * r) * r + r;
}

// 2^n of a normal result; the low bits of `shifted` hold n, and what stands above them is shifted out.
template <class F>
SFK_INLINE Vec<F> power_of(Vec<F> shifted) {
  using C = ExpTable<F>;
  return bit_cast<Vec<F>>((bit_cast<IVec<F>>(shifted) + C::kBias) << C::kBits);
}

// exp(x); 0 below the normal range (so exp(−inf) = 0; AVX-512 goes on into the denormals), finite above it, NaN for
// NaN.
template <class F>
SFK_INLINE Vec<F> vexp(Vec<F> x) {
  using C = ExpTable<F>;
#if defined(__AVX512F__)
  const F low = 2 * C::kLow;
#else
  const F low = C::kLow;
#endif
  const Vec<F> xc = vmin(splat<F>(C::kHigh), vmax(splat<F>(low), x));
  Vec<F> shifted;
  const Vec<F> p = reduced_expm1<F>(xc, shifted) + F(1);
#if defined(__AVX512F__)
  return scale_by_power(p, shifted - C::kMagic);
#else
  return x < C::kLow ? Vec<F>{} : p * power_of<F>(shifted);
#endif
}

// exp(x) − 1 to the last places also where it is small; finite above the normal range of exp, NaN for NaN.
template <class F>
SFK_INLINE Vec<F> vexpm1(Vec<F> x) {
  using C = ExpTable<F>;
  Vec<F> shifted;
  const Vec<F> p = reduced_expm1<F>(vmin(splat<F>(C::kHigh), vmax(splat<F>(C::kLow), x)), shifted);
  const Vec<F> power = power_of<F>(shifted);
  return p * power + (power - F(1));
}

constexpr double kLog2e = 1.4426950408889634;

// 2^x for x < 128: vexp without its reduction, for what can be scaled by log₂e beforehand.  0 for −inf.
template <class F>
SFK_INLINE Vec<F> vexp2(Vec<F> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    constexpr int kFloor = 9;
    const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)x, kFloor);
    Vec<float> p = splat(2.16129149e-4f);  // minimax on [0, 1), 2e-9; what is left of x is the exponent
    p = p * r + 1.24678458e-3f;
    p = p * r + 9.67545155e-3f;
    p = p * r + 5.54852821e-2f;
    p = p * r + 2.40229309e-1f;
    p = p * r + 6.93147063e-1f;
    p = p * r + 1.0f;
    return scale_by_power(p, x);
  }
#endif
  return vexp<F>(x * F(1 / kLog2e));
}

// Powers of e that begin as powers of another base: e^x = vpower<F>(x · kPowerUnit<F>), in the cheaper base.
#if defined(__AVX512F__)
template <class F>
constexpr bool kByTwo = sizeof(F) == 4;
#else
template <class F>
constexpr bool kByTwo = false;
#endif
template <class F>
constexpr double kPowerUnit = kByTwo<F> ? kLog2e : 1.0;
template <class F>
SFK_INLINE Vec<F> vpower(Vec<F> x) {
  if constexpr (kByTwo<F>) return vexp2<F>(x);
  return vexp<F>(x);
}

template <class F>
struct LogTable;
template <>
struct LogTable<float> {
  using Int = int32_t;
  static constexpr int kBias = 127, kBits = 23, kTerms = 4;
  static constexpr Int kMask = 0x007fffff, kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3;
  static constexpr float kTiny = 1.17549435e-38f, kScale = 33554432.0f, kScaleBits = 25;
  static constexpr float kLn2Hi = 6.9313812256e-01f, kLn2Lo = 9.0580006145e-06f;
  static constexpr float c[kTerms] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
};
template <>
struct LogTable<double> {
  using Int = int64_t;
  static constexpr int kBias = 1023, kBits = 52, kTerms = 7;
  static constexpr Int kMask = 0x000fffffffffffff, kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e00000000;
  static constexpr double kTiny = 2.2250738585072014e-308, kScale = 18014398509481984.0, kScaleBits = 54;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double c[kTerms] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                       2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                       6.666666666666735130e-01};
};

#if defined(__GNUC__)
template <class F>
SFK_INLINE Vec<F> to_float(IVec<F> i) {
  return __builtin_convertvector(i, Vec<F>);
}
#else
template <class F>
SFK_INLINE F to_float(IVec<F> i) {
  return static_cast<F>(i);
}
#endif

// log(x) for x >= 0 (fdlibm's reduction to [√½, √2]); −inf at 0, +inf at +inf.
template <class F>
SFK_INLINE Vec<F> vlog(Vec<F> x) {
  using C = LogTable<F>;
  const Vec<F> scaled = x < C::kTiny ? x * C::kScale : x;
  const Vec<F> shift = x < C::kTiny ? splat<F>(-C::kScaleBits) : Vec<F>{};
  IVec<F> bits = bit_cast<IVec<F>>(scaled) + (C::kOne - C::kSqrtHalf);
  const Vec<F> k = to_float<F>((bits >> C::kBits) - C::kBias) + shift;
  bits = (bits & C::kMask) + C::kSqrtHalf;
  const Vec<F> f = bit_cast<Vec<F>>(bits) - F(1);
  const Vec<F> s = f / (f + F(2));
  const Vec<F> z = s * s;
  Vec<F> r = splat<F>(C::c[0]);
  SFK_UNROLL
  for (int i = 1; i < C::kTerms; ++i) r = r * z + C::c[i];
  const Vec<F> half_square = f * f * F(0.5);
  Vec<F> y = s * (half_square + r * z) + k * C::kLn2Lo - half_square + f + k * C::kLn2Hi;
  y = x == F(0) ? splat<F>(-kInf<F>) : y;
  return x == kInf<F> ? x : y;
}

}  // namespace
}  // namespace sfk
