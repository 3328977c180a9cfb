// A vector of F as wide as the instruction set this file is compiled for, on GCC/Clang vector extensions.
// Elsewhere a "vector" is one scalar: the same kernels, without the width.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define SFK_INLINE inline __attribute__((always_inline))
#define SFK_UNROLL _Pragma("GCC unroll 8")
#if defined(__AVX512F__)
#define SFK_VBYTES 64
#elif defined(__AVX2__)
#define SFK_VBYTES 32
#else
#define SFK_VBYTES 16
#endif
#else
#define SFK_INLINE inline
#define SFK_UNROLL
#endif

namespace sfk {
namespace {

template <class F>
struct VecOf;
#if defined(__GNUC__)
template <>
struct VecOf<float> {
  static constexpr int W = SFK_VBYTES / 4;
  typedef float V __attribute__((vector_size(SFK_VBYTES)));
  typedef float U __attribute__((vector_size(SFK_VBYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(SFK_VBYTES)));
};
template <>
struct VecOf<double> {
  static constexpr int W = SFK_VBYTES / 8;
  typedef double V __attribute__((vector_size(SFK_VBYTES)));
  typedef double U __attribute__((vector_size(SFK_VBYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(SFK_VBYTES)));
};
#else
template <>
struct VecOf<float> {
  static constexpr int W = 1;
  using V = float;
  using U = float;
  using I = int32_t;
};
template <>
struct VecOf<double> {
  static constexpr int W = 1;
  using V = double;
  using U = double;
  using I = int64_t;
};
#endif

template <class F>
using Vec = typename VecOf<F>::V;
template <class F>
using IVec = typename VecOf<F>::I;
template <class F>
constexpr int kLanes = VecOf<F>::W;

template <class F>
SFK_INLINE Vec<F> load(const F* p) {
  return *reinterpret_cast<const typename VecOf<F>::U*>(p);
}
template <class F>
SFK_INLINE void store(F* p, Vec<F> v) {
  *reinterpret_cast<typename VecOf<F>::U*>(p) = v;
}
template <class F>
SFK_INLINE Vec<F> splat(F s) {
  return s - Vec<F>{};  // 0 is subtracted, not added: −0 keeps its sign
}
template <class To, class From>
SFK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
// a > b ? a : b and a < b ? a : b: b where either is NaN.  The intrinsics are one instruction; the ternary became two.
#if defined(__AVX512F__)
SFK_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
SFK_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
SFK_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
SFK_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
SFK_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
SFK_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
SFK_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
SFK_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
template <class V>
SFK_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
SFK_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
#endif

#if defined(__GNUC__)
template <class F>
SFK_INLINE F lane(Vec<F> v, int i) {
  return v[i];
}
// Folds a vector to one number by halves, so that the order of the additions is fixed.
#if defined(__AVX512F__)
template <class F>
SFK_INLINE F reduce_add(Vec<F> v) {
  if constexpr (sizeof(F) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
}
template <class F>
SFK_INLINE F reduce_max(Vec<F> v) {
  if constexpr (sizeof(F) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
}
#else
template <class F, class Op>
SFK_INLINE F fold(Vec<F> v, Op op) {
  typedef F Half __attribute__((vector_size(16)));
  constexpr int kParts = SFK_VBYTES / 16;
  Half part[kParts];
  std::memcpy(part, &v, sizeof(v));
  for (int i = 1; i < kParts; ++i) part[0] = op(part[0], part[i]);
  const F r = op(part[0][0], part[0][1]);
  if constexpr (sizeof(F) == 4) return op(r, op(part[0][2], part[0][3]));
  return r;
}
template <class F>
SFK_INLINE F reduce_add(Vec<F> v) {
  return fold<F>(v, [](auto x, auto y) __attribute__((always_inline)) { return x + y; });
}
template <class F>
SFK_INLINE F reduce_max(Vec<F> v) {
  return fold<F>(v, [](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; });
}
#endif
#else
template <class F>
SFK_INLINE F lane(F v, int) {
  return v;
}
template <class F>
SFK_INLINE F reduce_add(F v) {
  return v;
}
template <class F>
SFK_INLINE F reduce_max(F v) {
  return v;
}
#endif
template <class F>
SFK_INLINE F reduce_min(Vec<F> v) {
  return -reduce_max<F>(-v);
}

template <class F>
constexpr F kInf = std::numeric_limits<F>::infinity();

template <class F>
constexpr int64_t pad(int64_t n) {
  return (n + kLanes<F> - 1) / kLanes<F> * kLanes<F>;
}

}  // namespace
}  // namespace sfk
