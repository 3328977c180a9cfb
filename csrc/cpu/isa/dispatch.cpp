#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "table.h"

namespace sfk {
namespace {

struct Entry {
  const KernelTable* table;
  bool runs;
};

// Those of this build, the widest first: a build says which it holds (setup.py).
int entries(Entry out[3]) {
  int n = 0;
#if defined(SFK_AVX512)
  out[n++] = {&avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")};
#endif
#if defined(SFK_AVX2)
  out[n++] = {&avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#if defined(SFK_GENERIC) || !(defined(SFK_AVX2) || defined(SFK_AVX512))
  out[n++] = {&generic::table, true};
#endif
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
    if (!table) throw std::runtime_error("this build of the CPU kernels is for other processors only: build it again");
    chosen = table;
  }
  return *table;
}

}  // namespace sfk
