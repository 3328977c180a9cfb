// One head's references as operands, and the kernel of a tile against them.
#pragma once
#include "../logits.h"
#include "pack.h"

namespace sfk {
namespace {

// ŷ is the sum of two bfloat16: rounded to one, its error would be the same for every token, and 1/ε times as large.
struct TileRefs {
  Refs<float> exact;
  int64_t D, M, Mp;           // in whole depths; all; in whole tiles
  Buffer<Bf16> rows, pairs;   // [Mp][2 D] high and low parts, for keys; [2 D/2][Mp][2], for queries
  float away = 0, slope = 0;  // β log₂e; log₂e/ε

  explicit TileRefs(const AttentionParams& p)
      : exact(p), D(whole(p.D, kDepth)), M(p.M), Mp(exact.Mp), rows(Mp * 2 * D), pairs(2 * D * Mp) {}

  // Rows of the next block to ask for with every reference.
  int64_t share() const { return (kRows + M - 1) / M; }

  void pack(const AttentionParams& p, int64_t h) {
    if (h == exact.packed_head) return;
    exact.pack(p, h);
    away = static_cast<float>(kLog2e * exact.beta), slope = static_cast<float>(kLog2e * exact.inv_eps);
    const auto vector = [](const float* from, bool there) { return there ? load(from) : Vec<float>{}; };
    constexpr int64_t W = kLanes<float>;
    for (int64_t j = 0; j < Mp; ++j)
      for (int64_t d = 0; d < D; d += 2 * W) {
        const float* y = exact.y + j * exact.Dp + d;
        const Vec<float> low = vector(y, d < exact.Dp), high = vector(y + W, d + W < exact.Dp);
        store_rounded(rows + j * 2 * D + d, low, high);
        store_rounded(rows + j * 2 * D + D + d, low - rounded(low), high - rounded(high));
      }
    for (int64_t d = 0; d < D; d += 2)
      for (int64_t j = 0; j < Mp; j += W) {
        const float* y = exact.yt + d * Mp + j;
        const Vec<float> upper = vector(y, d < exact.Dp), lower = vector(y + Mp, d < exact.Dp);
        store_pairs(pairs + (d * Mp + 2 * j), upper, lower);
        store_pairs(pairs + ((D + d) * Mp + 2 * j), upper - rounded(upper), lower - rounded(lower));
      }
  }
};

}  // namespace
}  // namespace sfk
