// Rows of bfloat16 as operands of products.
#pragma once
#include "../base/explog.h"
#include "../base/transpose.h"
#include "product.h"

namespace sfk {
namespace {

constexpr int64_t kRows = 64;                       // tokens of a block: two depths of a sum over tokens
constexpr int64_t kGroups = kRows / kLanes<float>;  // of as many tokens as a vector has lanes

inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

// Row i of one head, its elements one after another: in place, or in `room` where they are apart.
inline const Bf16* row_of(const View& v, int64_t b, int64_t h, int64_t i, Bf16* room) {
  const Bf16* row = static_cast<const Bf16*>(v.data) + row_offset(v, b, h, i);
  const int64_t stride = v.stride[3];
  if (stride == 1) return row;
  for (int64_t c = 0; c < v.size[3]; ++c) room[c] = row[c * stride];
  return room;
}

// Rows row0..row0+n to x [kRows][ld], padded with zeros.  Rows with skip = −inf are not read: zeros.
inline void copy_rows(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, const float* skip, Bf16* x,
                      int64_t ld, Bf16* room) {
  const int64_t C = v.size[3];
  for (int64_t i = 0; i < kRows; ++i, x += ld) {
    const bool absent = i >= n || (skip && skip[i] == -kInf<float>);
    const Bf16* row = absent ? room : row_of(v, b, h, row0 + i, room);
    for (int64_t c = 0; c < ld; c += 32)
      _mm512_storeu_si512(x + c, _mm512_maskz_loadu_epi16(absent ? 0 : first(C - c), row + c));
  }
}

// The same rows as a right operand [kRows/2][ld][2], and a column of ones after the last.
inline void pair_rows(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, const float* skip, Bf16* pairs,
                      int64_t ld, Bf16* room) {
  const int64_t C = v.size[3];
  const auto absent = [&](int64_t i) { return i >= n || (skip && skip[i] == -kInf<float>); };
  for (int64_t i = 0; i < kRows; i += 2, pairs += 2 * ld) {
    const bool no0 = absent(i), no1 = absent(i + 1);
    const Bf16* row0_of = no0 ? room : row_of(v, b, h, row0 + i, room);
    const Bf16* row1_of = no1 ? room : row_of(v, b, h, row0 + i + 1, room + ld);
    for (int64_t c = 0; c < ld; c += 16) {
      const __mmask16 some = static_cast<__mmask16>(first(C - c));
      const __m256i low = _mm256_maskz_loadu_epi16(no0 ? 0 : some, row0_of + c);
      const __m256i high = _mm256_maskz_loadu_epi16(no1 ? 0 : some, row1_of + c);
      const __m512i both =
          _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm512_storeu_si512(pairs + 2 * c, both);
    }
    pairs[2 * C] = pairs[2 * C + 1] = Bf16{0x3f80};
  }
}

// 1/‖x_i‖ · scale, 0 where ‖x‖ <= 1e-12, from a sum of squares; infinite ones are for the caller to see.
SFK_INLINE Vec<float> inverse_root(Vec<float> squares, float scale) {
  const Vec<float> root = (Vec<float>)_mm512_sqrt_ps((__m512)squares);
  return squares <= 1e-24f ? Vec<float>{} : scale / root;
}

SFK_INLINE Vec<float> add_squares(Vec<float> sum, const Bf16* x) {
  const __m512bh pairs = (__m512bh)_mm512_loadu_si512(x);
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, pairs, pairs);
}

// 16 float32 rounded to bfloat16, still as float32.
SFK_INLINE Vec<float> rounded(Vec<float> x) {
  const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
  return (Vec<float>)_mm512_slli_epi32(bits, 16);
}

// Two rows of float32 side by side, as a right operand has them, rounded.
SFK_INLINE void store_pairs(Bf16* to, Vec<float> upper, Vec<float> lower) {
  const __m512i high = (__m512i)rounded(lower), low = _mm512_srli_epi32((__m512i)rounded(upper), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(high, low));
}

// Two vectors of float32 as 32 bfloat16, rounded.
SFK_INLINE void store_rounded(Bf16* to, Vec<float> low, Vec<float> high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

}  // namespace
}  // namespace sfk
