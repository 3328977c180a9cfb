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
    if (takes_tiles(own_)) {
      inner_.run(h, team);
      if (!left_[h]) return;
    }
    rest_(head_of(own_, 0, h));
  }

 private:
  const PackedParams& pack_;
  AttentionParams own_;
  Rest rest_;
  std::vector<char> left_;
  TileWorker inner_;
};

// `all` takes a pack in which no segment is for tiles, `rest` a head of a segment that is not.
template <class All, class Rest>
void tile_packed(const PackedParams& p, All all, Rest rest) {
  AttentionParams one = p;
  one.S = 2;  // of the segments each says for itself whether it is long enough
  if (p.causal || !takes_tiles(one)) return all(p);
  run_packed(p, 0.25, false, [&](const AttentionParams& largest, int threads) {
    return std::make_unique<PackedTileWorker<Rest>>(p, largest, threads, rest);
  });
}

}  // namespace
}  // namespace sfk
