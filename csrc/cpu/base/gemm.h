// The one matrix product: C[i,n] (+)= Σ_k A[i*ars + k*acs] B[k*ldb + n].  A is broadcast, B is read as vectors, so n is
// a multiple of the vector width, and A may be read by rows or by columns at the same cost.
#pragma once
#include "vec.h"

namespace sfk {
namespace {

// Register tile: kTileRows x kTileVecs accumulators, + kTileVecs of B, + 1 broadcast fit the vector registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 + 4 + 1 of 32
#else
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 + 2 + 1 of 16
#endif

// Rows of memory that the next tile will read.  A product asks for them bit by bit, so that they arrive while it runs;
// asked for all at once they would fill the core's miss buffers, and it would wait as if it had read them.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;

  void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, row += stride) {
#if defined(__GNUC__)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
#endif
    }
  }
};

// What becomes of a product before it is stored: it is added to what stands there, or its rows are scaled.
template <class F>
struct Finish {
  bool accumulate = false;
  const F* scale = nullptr;  // [m], 1 where null
};

template <class F, int R, int N>
SFK_INLINE void gemm_tile(int64_t K, const F* A, int64_t ars, int64_t acs, const F* B, int64_t ldb, F* C, int64_t ldc,
                          Finish<F> finish) {
  constexpr int W = kLanes<F>;
  Vec<F> acc[R][N];
  SFK_UNROLL
  for (int r = 0; r < R; ++r) {
    SFK_UNROLL
    for (int n = 0; n < N; ++n) acc[r][n] = Vec<F>{};
  }
  for (int64_t k = 0; k < K; ++k) {
    Vec<F> b[N];
    SFK_UNROLL
    for (int n = 0; n < N; ++n) b[n] = load(B + k * ldb + n * W);
    SFK_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<F> a = splat<F>(A[r * ars + k * acs]);
      SFK_UNROLL
      for (int n = 0; n < N; ++n) acc[r][n] += a * b[n];
    }
  }
  SFK_UNROLL
  for (int r = 0; r < R; ++r) {
    SFK_UNROLL
    for (int n = 0; n < N; ++n) {
      F* out = C + r * ldc + n * W;
      // Added last: a sum over many calls then has the rounding of two short sums, not of one long one.
      if (finish.scale)
        store(out, acc[r][n] * finish.scale[r]);
      else
        store(out, finish.accumulate ? load(out) + acc[r][n] : acc[r][n]);
    }
  }
}

template <class F, int N>
void gemm_panel(int64_t m, int64_t K, const F* A, int64_t ars, int64_t acs, const F* B, int64_t ldb, F* C, int64_t ldc,
                Finish<F> finish, Ahead* ahead) {
  int64_t i = 0;
  const int64_t share = ahead ? (ahead->rows * kTileRows + m - 1) / m : 0;
  const auto rows_from = [=](int64_t row) {
    return Finish<F>{finish.accumulate, finish.scale ? finish.scale + row : nullptr};
  };
  for (; i + kTileRows <= m; i += kTileRows) {
    if (ahead) ahead->fetch(share);
    gemm_tile<F, kTileRows, N>(K, A + i * ars, ars, acs, B, ldb, C + i * ldc, ldc, rows_from(i));
  }
  for (; i + 2 <= m; i += 2) gemm_tile<F, 2, N>(K, A + i * ars, ars, acs, B, ldb, C + i * ldc, ldc, rows_from(i));
  if (i < m) gemm_tile<F, 1, N>(K, A + i * ars, ars, acs, B, ldb, C + i * ldc, ldc, rows_from(i));
}

template <class F>
void gemm(int64_t m, int64_t n, int64_t K, const F* A, int64_t ars, int64_t acs, const F* B, int64_t ldb, F* C,
          int64_t ldc, Finish<F> finish, Ahead* ahead = nullptr) {
  constexpr int W = kLanes<F>;
  int64_t j = 0;
  for (; j + kTileVecs * W <= n; j += kTileVecs * W)
    gemm_panel<F, kTileVecs>(m, K, A, ars, acs, B + j, ldb, C + j, ldc, finish, ahead);
  const int64_t left = (n - j) / W;
  if constexpr (kTileVecs > 2) {  // one vector of columns has too few sums to hide the latency of an addition
    if (left == 3) return gemm_panel<F, 3>(m, K, A, ars, acs, B + j, ldb, C + j, ldc, finish, ahead);
    if (left == 2) return gemm_panel<F, 2>(m, K, A, ars, acs, B + j, ldb, C + j, ldc, finish, ahead);
  }
  if (left == 1) gemm_panel<F, 1>(m, K, A, ars, acs, B + j, ldb, C + j, ldc, finish, ahead);
}

template <class F>
void gemm(int64_t m, int64_t n, int64_t K, const F* A, int64_t ars, int64_t acs, const F* B, int64_t ldb, F* C,
          int64_t ldc, bool accumulate, Ahead* ahead = nullptr) {
  gemm<F>(m, n, K, A, ars, acs, B, ldb, C, ldc, Finish<F>{accumulate, nullptr}, ahead);
}

}  // namespace
}  // namespace sfk
