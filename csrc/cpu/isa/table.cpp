#include "table.h"

#include "../probe.h"
#include "unit.h"

namespace sfk::SFK_ISA {

#define SFK_DECLARE(name, Params) void name(const Params& p);
SFK_EACH_KERNEL(SFK_DECLARE)
#undef SFK_DECLARE

#define SFK_ENTRY(name, Params) name,
const KernelTable table = {SFK_NAME(SFK_ISA), SFK_EACH_KERNEL(SFK_ENTRY) fma_rate, exp_rate};
#undef SFK_ENTRY

}  // namespace sfk::SFK_ISA
