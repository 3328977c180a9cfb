#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#if defined(SFK_AMX) || defined(SFK_AVX512BF16)
#include <cpuid.h>
#endif
#if defined(SFK_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "table.h"

namespace sfk {
namespace {

struct Entry {
  const KernelTable* table;
  bool runs;
  bool by_name = false;  // only where it is asked for
};

#if defined(SFK_AVX512)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#if defined(SFK_AMX) || defined(SFK_AVX512BF16)
bool has_vectors_of_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif
#if defined(SFK_AMX)
// Whether the processor has tile registers of bfloat16 and the system saves them; asks Linux for their use, which it
// grants to a process, for all of its threads.
bool may_use_tiles() {
  constexpr unsigned kSaves = 1u << 27, kBf16 = 1u << 22, kTile = 1u << 24, kState = 3u << 17;
  constexpr int kAskForUse = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  if (!has_vectors_of_bf16()) return false;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kState) == kState && syscall(SYS_arch_prctl, kAskForUse, kTileData) == 0;
}
#endif

// Those of this build, the widest first: a build says which it holds (setup.py).
constexpr int kMostEntries = 5;
int entries(Entry out[kMostEntries]) {
  int n = 0;
#if defined(SFK_AMX)
  static const bool tiles = may_use_tiles();
  out[n++] = {&amx::table, tiles && runs_avx512()};
#endif
#if defined(SFK_AVX512BF16)
  // AMD's add twice as many products of bfloat16 in a cycle as of float32; Intel's add half as many instructions.
  static const bool vectors = runs_avx512() && has_vectors_of_bf16();
  out[n++] = {&avx512bf16::table, vectors, !__builtin_cpu_is("amd")};
#endif
#if defined(SFK_AVX512)
  out[n++] = {&avx512::table, runs_avx512()};
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
  Entry all[kMostEntries];
  const int n = entries(all);
  const bool any = !isa || !*isa;
  for (int i = 0; i < n; ++i)
    if (all[i].runs && (any ? !all[i].by_name : std::strcmp(isa, all[i].table->isa) == 0)) return all[i].table;
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
