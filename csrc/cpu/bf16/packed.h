// Packed batches of bfloat16 tokens, forward: as attention.h, segment by segment.
#pragma once
#include "../packed.h"
#include "attention.h"

namespace sfk {
namespace {

// Heads of segments on tiles; those that tiles leave go to `rest`, one by one.
template <class Rest>
class PackedTileWorker {
 public:
  PackedTileWorker(const PackedParams& p, const AttentionParams& largest, int threads, Rest rest)
      : pack_(p), own_(largest), rest_(rest), left_(p.H), inner_(own_, threads, left_) {}
  KeySums& shared() { return inner_.shared(); }
  void run(int64_t n, int64_t h, const Team& team) {
    take_segment(own_, pack_, n);
    own_.threads = 1;
    inner_.run(h, team);
    if (left_[h]) rest_(head_of(own_, 0, h));
  }

 private:
  const PackedParams& pack_;
  AttentionParams own_;
  Rest rest_;
  std::vector<char> left_;
  TileWorker inner_;
};

// `all` takes a pack that is not for tiles, `rest` (attention, as it is of a dense call) a head of a segment that tiles
// left, or a segment whose read drops weights.
template <class All, class Rest>
void tile_packed(const PackedParams& p, All all, Rest rest) {
  if (p.causal || !takes_tiles(p)) return all(p);
  AttentionParams own = p;
  for (int64_t n = 0; p.dropout_p > 0 && p.o && n < p.N; ++n) {
    take_segment(own, p, n);
    rest(own);
  }
  if (p.dropout_p > 0 && p.o) return;
  run_packed(p, 0.25, false, [&](const AttentionParams& largest, int threads) {
    return std::make_unique<PackedTileWorker<Rest>>(p, largest, threads, rest);
  });
}

}  // namespace
}  // namespace sfk
