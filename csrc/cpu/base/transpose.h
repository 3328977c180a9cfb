// Turning tiles.
#pragma once
#include <algorithm>

#include "vec.h"

namespace sfk {
namespace {

constexpr int64_t kTurned = 16;  // rows and columns that are turned at once

template <class F>
void turn(int64_t rows, int64_t cols, const F* src, int64_t ld, F* dst, int64_t dst_ld) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) dst[j * dst_ld + i] = src[i * ld + j];
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen: pairs, then fours, then the four lanes of every register.
inline void turn_square(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * ld);
  SFK_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  SFK_UNROLL
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]), r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]), r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  SFK_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512 x = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), y = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 w = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * dst_ld, _mm512_shuffle_f32x4(x, z, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * dst_ld, _mm512_shuffle_f32x4(y, w, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * dst_ld, _mm512_shuffle_f32x4(x, z, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * dst_ld, _mm512_shuffle_f32x4(y, w, 0xdd));
  }
}
#else
inline void turn_square(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  turn(kTurned, kTurned, src, ld, dst, dst_ld);
}
#endif
inline void turn_square(const double* src, int64_t ld, double* dst, int64_t dst_ld) {
  turn(kTurned, kTurned, src, ld, dst, dst_ld);
}

// src [rows][ld] -> dst [cols][dst_ld]
template <class F>
void transpose(int64_t rows, int64_t cols, const F* src, int64_t ld, F* dst, int64_t dst_ld) {
  for (int64_t i = 0; i < rows; i += kTurned)
    for (int64_t j = 0; j < cols; j += kTurned) {
      const F* from = src + i * ld + j;
      F* to = dst + j * dst_ld + i;
      if (rows - i >= kTurned && cols - j >= kTurned)
        turn_square(from, ld, to, dst_ld);
      else
        turn(std::min(kTurned, rows - i), std::min(kTurned, cols - j), from, ld, to, dst_ld);
    }
}

}  // namespace
}  // namespace sfk
