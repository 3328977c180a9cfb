// Beside AVX-512: attention of bfloat16 tokens by the processor's own products of bfloat16, on tile registers (amx) or
// on vectors (avx512bf16).  All else is AVX-512's.
#include "../bf16/packed.h"
#include "table.h"
#include "unit.h"

namespace sfk::SFK_ISA {
namespace {

void attention(const AttentionParams& p) { tile_attention(p, avx512::table.attention); }
void packed(const PackedStreamParams& p) { packed_tiles(p, attention, avx512::table.packed); }

KernelTable with_bf16() {
  KernelTable all = avx512::table;
  all.isa = SFK_NAME(SFK_ISA), all.attention = attention, all.packed = packed;
  return all;
}

}  // namespace
const KernelTable table = with_bf16();
}  // namespace sfk::SFK_ISA
