// Beside AVX-512: attention of bfloat16 tokens on tile registers.  All else is AVX-512's.
#include "../bf16/attention.h"
#include "table.h"

namespace sfk::amx {
namespace {

void attention(const AttentionParams& p) { tile_attention(p, avx512::table.attention); }

KernelTable with_tiles() {
  KernelTable all = avx512::table;
  all.isa = "amx", all.attention = attention;
  return all;
}

}  // namespace
const KernelTable table = with_tiles();
}  // namespace sfk::amx
