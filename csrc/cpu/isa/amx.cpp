// Beside AVX-512: attention of bfloat16 tokens on tile registers.  All else is AVX-512's.
#include "../bf16/packed.h"
#include "table.h"

namespace sfk::amx {
namespace {

void attention(const AttentionParams& p) { tile_attention(p, avx512::table.attention); }
void packed(const PackedStreamParams& p) { packed_tiles(p, attention, avx512::table.packed); }

KernelTable with_tiles() {
  KernelTable all = avx512::table;
  all.isa = "amx", all.attention = attention, all.packed = packed;
  return all;
}

}  // namespace
const KernelTable table = with_tiles();
}  // namespace sfk::amx
