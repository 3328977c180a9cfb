#include <atomic>
#include <cstdlib>
#include <cstring>

#include "table.h"

namespace sfk {
namespace {

struct Entry {
  const KernelTable* table;
  bool runs;
};

int entries(Entry out[3]) {
  int n = 0;
#if defined(SFK_X86)
  out[n++] = {&kAvx512Table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")};
  out[n++] = {&kAvx2Table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
  out[n++] = {&kGenericTable, true};
  return n;
}

const KernelTable* find(const char* isa) {
  Entry all[3];
  const int n = entries(all);
  for (int i = 0; i < n; ++i)
    if (all[i].runs && (!isa || !*isa || std::strcmp(isa, all[i].table->isa) == 0)) return all[i].table;
  return nullptr;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

bool has_isa(const char* isa) { return find(isa) != nullptr; }

bool set_isa(const char* isa) {
  const KernelTable* table = find(isa);
  if (table) chosen = table;
  return table != nullptr;
}

const KernelTable& kernels() {
  const KernelTable* table = chosen;
  if (!table) {
    table = find(std::getenv("SETFORMER_KERNELS_CPU_ISA"));
    if (!table) table = find(nullptr);
    chosen = table;
  }
  return *table;
}

}  // namespace sfk
