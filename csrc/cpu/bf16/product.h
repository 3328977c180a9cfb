// The product of bfloat16 as the processor has it, summed in float32: on tile registers (AMX) or on vectors
// (AVX512_BF16).
#pragma once
#include "../base/tiles.h"

namespace sfk {
namespace {

constexpr int64_t kTile = 16;   // rows of a tile, and its columns of float32
constexpr int64_t kDepth = 32;  // bfloat16 in a tile's row: terms of a sum that one instruction adds

// The left operand, [m][k] by rows, and the right one, [k/2][n][2]: of a column, two terms lie side by side.  An
// operand of fewer than K terms is read again from the start, as where the other one is the sum of two.
struct Operand {
  const Bf16* data;
  int64_t ld;     // from a row to the next, in bfloat16
  int64_t terms;  // along k
};

#if defined(__AMX_TILE__)
// The tile registers, all of 16 rows of 64 bytes, for as long as it lives, on the thread that made it.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = kTile;
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Up to 2 x 2 tiles of C.  Registers are named by numbers, which gcc makes text of.
template <bool kTwoRows, bool kTwoCols, bool kAdd>
SFK_INLINE void tile_block(int64_t K, const Operand& A, const Operand& B, float* C, int64_t ldc) {
  const int64_t a_bytes = A.ld * 2, b_bytes = B.ld * 2, c_bytes = ldc * 4;
  float* const below = C + kTile * ldc;
  if (kAdd) {
    _tile_loadd(0, C, c_bytes);
    if (kTwoCols) _tile_loadd(1, C + kTile, c_bytes);
    if (kTwoRows) _tile_loadd(2, below, c_bytes);
    if (kTwoRows && kTwoCols) _tile_loadd(3, below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0, a_at = 0, b_at = 0; k < K; k += kDepth) {
    const Bf16 *a = A.data + a_at, *b = B.data + b_at / 2 * B.ld;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoCols) {
      _tile_loadd(7, b + 2 * kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + kTile * A.ld, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (kTwoRows && kTwoCols) _tile_dpbf16ps(3, 5, 7);
    a_at = a_at + kDepth == A.terms ? 0 : a_at + kDepth;
    b_at = b_at + kDepth == B.terms ? 0 : b_at + kDepth;
  }
  _tile_stored(0, C, c_bytes);
  if (kTwoCols) _tile_stored(1, C + kTile, c_bytes);
  if (kTwoRows) _tile_stored(2, below, c_bytes);
  if (kTwoRows && kTwoCols) _tile_stored(3, below + kTile, c_bytes);
}

template <bool kTwoRows, bool kAdd>
void tile_rows_of(int64_t n, int64_t K, const Operand& A, Operand B, float* C, int64_t ldc) {
  for (; n >= 2 * kTile; n -= 2 * kTile, B.data += 4 * kTile, C += 2 * kTile)
    tile_block<kTwoRows, true, kAdd>(K, A, B, C, ldc);
  if (n) tile_block<kTwoRows, false, kAdd>(K, A, B, C, ldc);
}

// C [m][n] = A B, added to what is there where kAdd; m and n in whole tiles, K and the operands' terms in whole depths.
template <bool kAdd>
void tile_product(int64_t m, int64_t n, int64_t K, Operand A, const Operand& B, float* C, int64_t ldc) {
  // Some compilers' headers do not say that tiles are read from memory and written to it.
  __asm__ volatile("" : : : "memory");
  for (; m >= 2 * kTile; m -= 2 * kTile, A.data += 2 * kTile * A.ld, C += 2 * kTile * ldc)
    tile_rows_of<true, kAdd>(n, K, A, B, C, ldc);
  if (m) tile_rows_of<false, kAdd>(n, K, A, B, C, ldc);
  __asm__ volatile("" : : : "memory");
}
#else
struct TileRegisters {
  TileRegisters() {}  // so that one that is not used is no warning
};

// R rows of C and N vectors of its columns: R x N sums, N vectors of B and a pair of A that is broadcast.
template <int R, int N, bool kAdd>
SFK_INLINE void pair_tile(int64_t K, const Operand& A, const Operand& B, float* C, int64_t ldc) {
  __m512 sum[R][N];
  SFK_UNROLL
  for (int r = 0; r < R; ++r) {
    SFK_UNROLL
    for (int n = 0; n < N; ++n) sum[r][n] = kAdd ? _mm512_loadu_ps(C + r * ldc + n * kTile) : _mm512_setzero_ps();
  }
  for (int64_t k = 0, a_at = 0, b_at = 0; k < K; k += 2) {
    const Bf16 *a = A.data + a_at, *b = B.data + b_at / 2 * B.ld;
    __m512bh right[N];
    SFK_UNROLL
    for (int n = 0; n < N; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + 2 * kTile * n);
    SFK_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * A.ld, sizeof(pair));
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      SFK_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
    }
    a_at = a_at + 2 == A.terms ? 0 : a_at + 2;
    b_at = b_at + 2 == B.terms ? 0 : b_at + 2;
  }
  SFK_UNROLL
  for (int r = 0; r < R; ++r) {
    SFK_UNROLL
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(C + r * ldc + n * kTile, sum[r][n]);
  }
}

template <int N, bool kAdd>
void pair_columns(int64_t m, int64_t K, Operand A, const Operand& B, float* C, int64_t ldc) {
  constexpr int R = 6;
  for (; m >= R; m -= R, A.data += R * A.ld, C += R * ldc) pair_tile<R, N, kAdd>(K, A, B, C, ldc);
  for (; m >= 2; m -= 2, A.data += 2 * A.ld, C += 2 * ldc) pair_tile<2, N, kAdd>(K, A, B, C, ldc);
}

// C [m][n] = A B, added to what is there where kAdd; m and n in whole tiles, K and the operands' terms in whole depths.
template <bool kAdd>
void tile_product(int64_t m, int64_t n, int64_t K, const Operand& A, Operand B, float* C, int64_t ldc) {
  for (; n >= 4 * kTile; n -= 4 * kTile, B.data += 8 * kTile, C += 4 * kTile) pair_columns<4, kAdd>(m, K, A, B, C, ldc);
  for (; n >= 2 * kTile; n -= 2 * kTile, B.data += 4 * kTile, C += 2 * kTile) pair_columns<2, kAdd>(m, K, A, B, C, ldc);
  if (n) pair_columns<1, kAdd>(m, K, A, B, C, ldc);
}
#endif

}  // namespace
}  // namespace sfk
