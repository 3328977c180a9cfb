// Packed batches of bfloat16 tokens: every segment is a call of its own, whose bits are those of that call.
#pragma once
#include "../packed.h"
#include "attention.h"

namespace sfk {
namespace {

// Whether a call of its own gives each of its heads to one thread, by tiles and without them: then its bits do not
// depend on how many threads there are.
inline bool is_unshared(const AttentionParams& own) {
  return own.H % tile_threads(own) == 0 && own.H % useful_threads(own.threads, attention_flops(own)) == 0;
}

// `dense`: attention of one segment; `rest`: the kernel of packed batches of every dtype.
template <class Dense, class Rest>
void packed_tiles(const PackedStreamParams& p, Dense dense, Rest rest) {
  if (p.causal || !takes_tiles(p)) return rest(p);
  std::vector<AttentionParams> few;  // a thread each
  for (int64_t n = 0; n < p.N; ++n) {
    AttentionParams own = p;
    take_segment(own, p, n);
    if (!is_unshared(own))
      dense(own);
    else
      few.push_back(own), few.back().threads = 1;
  }
  const int64_t count = static_cast<int64_t>(few.size());
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1)
#endif
  for (int64_t i = 0; i < count; ++i) dense(few[i]);
}

}  // namespace
}  // namespace sfk
