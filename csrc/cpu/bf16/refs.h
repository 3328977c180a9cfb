// One head's references as operands, and the kernel of a tile against them.
#pragma once
#include "../logits.h"
#include "pack.h"

namespace sfk {
namespace {

// ŷ is the sum of two bfloat16: rounded to one, its error would be the same for every token, and 1/ε times as large.
struct TileRefs {
  Refs<float> exact;
  int64_t D, M, Mp;            // in whole depths; all; in whole tiles
  Buffer<Bf16> rows, pairs;    // [Mp][2 D] high and low parts, for keys; [2 D/2][Mp][2], for queries
  float slope = 0, least = 0;  // log₂e/ε, and the least ℓ there can be

  explicit TileRefs(const AttentionParams& p)
      : exact(p), D(whole(p.D, kDepth)), M(p.M), Mp(exact.Mp), rows(Mp * 2 * D), pairs(2 * D * Mp) {}

  // Rows of the next block to ask for with every reference.
  int64_t share() const { return (kRows + M - 1) / M; }

  void pack(const AttentionParams& p, int64_t h) {
    if (h == exact.packed_head) return;
    exact.pack(p, h);
    slope = kLog2e * exact.inv_eps;
    least = static_cast<float>(std::expm1(-2.0 * exact.beta)) * exact.inv_eps;
    for (int64_t j = 0; j < Mp; ++j)
      for (int64_t d = 0; d < D; ++d) {
        const float y = d < exact.D ? exact.y[j * exact.Dp + d] : 0;
        const Bf16 high = Narrow<Bf16, float>::from(y), low = Narrow<Bf16, float>::from(y - to_f32(high));
        rows[j * 2 * D + d] = high, rows[j * 2 * D + D + d] = low;
        pairs[(d / 2 * Mp + j) * 2 + d % 2] = high, pairs[((D + d) / 2 * Mp + j) * 2 + d % 2] = low;
      }
  }
};

}  // namespace
}  // namespace sfk
