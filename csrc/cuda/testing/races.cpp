#include "races.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <unordered_map>

namespace sfk::shim::races {
namespace {

constexpr int kLanes = 32;
constexpr uintptr_t kGranule = 2;  // bytes of the smallest number
constexpr uintptr_t kPage = 1024;  // granules
constexpr uintptr_t kLines = 1024;

// The write that a granule saw last, the read, and the last reads by another thread, another warp, another block than
// that one's: where any read is not ordered before what comes next, one of these is not.
enum Kept { kWrite, kRead, kReadOfThread, kReadOfWarp, kReadOfBlock, kKept };

struct Granule {
  uint32_t time[kKept] = {};  // 0: never
  uint16_t thread[kKept] = {};
  uint16_t copier = 0;  // 1 + the thread that has a copy under way to here
};

struct Line {
  uintptr_t page;
  Granule* granules;
};

std::unordered_map<uintptr_t, std::unique_ptr<Granule[]>> pages;
Line lines[kLines] = {};
const Thread* running = nullptr;  // null where nobody watches
bool watching = false;
int threads_a_block = kLanes;
uint32_t now = 1;
std::string first;

Granule& granule(uintptr_t at) {
  const uintptr_t page = at / kPage;
  Line& line = lines[page % kLines];
  if (line.page != page || !line.granules) {
    std::unique_ptr<Granule[]>& found = pages[page];
    if (!found) found.reset(new Granule[kPage]);
    line = {page, found.get()};
  }
  return line.granules[at % kPage];
}

Scope scope_of(int a, int b) {
  if (a / kLanes == b / kLanes) return kOfWarp;
  return a / threads_a_block == b / threads_a_block ? kOfBlock : kOfCluster;
}

std::string name(int thread) {
  return "thread " + std::to_string(thread % threads_a_block) + " of block " + std::to_string(thread / threads_a_block);
}

void report(const char* does, const char* done, int by, const void* from) {
  if (!first.empty()) return;
  first = name(running->number) + " " + does + " what " + name(by) + " " + done + " with no barrier between";
  Dl_info where;
  if (!from || !dladdr(from, &where)) return;
  const auto offset = static_cast<const char*>(from) - static_cast<const char*>(where.dli_fbase);
  char text[32];
  std::snprintf(text, sizeof text, "+0x%lx", static_cast<unsigned long>(offset));
  first += std::string(": ") + where.dli_fname + text;
}

// Whether the access of a kind that g keeps is not ordered before what the running thread does now.
bool unordered(const Granule& g, Kept kind) {
  const int by = g.thread[kind], me = running->number;
  return g.time[kind] && by != me && g.time[kind] >= running->passed[scope_of(by, me)];
}

void keep(Granule& g, Kept to, Kept from) { g.time[to] = g.time[from], g.thread[to] = g.thread[from]; }

void set(Granule& g, Kept kind) { g.time[kind] = now, g.thread[kind] = static_cast<uint16_t>(running->number); }

void read(Granule& g) {
  const int last = g.thread[kRead], me = running->number;
  if (last != me) keep(g, kReadOfThread, kRead);
  if (last / kLanes != me / kLanes) keep(g, kReadOfWarp, kRead);
  if (last / threads_a_block != me / threads_a_block) keep(g, kReadOfBlock, kRead);
  set(g, kRead);
}

void write(Granule& g, const void* from) {
  for (Kept kind : {kRead, kReadOfThread, kReadOfWarp, kReadOfBlock}) {
    if (unordered(g, kind)) report("writes", "reads", g.thread[kind], from);
    g.time[kind] = 0;  // what comes after this write comes after these
  }
  set(g, kWrite);
}

template <class Visit>
void each_granule(const void* at, size_t bytes, Visit visit) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t g = address / kGranule; g <= (address + bytes - 1) / kGranule; ++g) visit(granule(g));
}

}  // namespace

void watch(bool on) { watching = on; }

std::string found() {
  std::string told;
  told.swap(first);
  return told;
}

uint32_t barrier() { return ++now; }

void pass(Thread& me, Scope scope, uint32_t barrier) {
  for (int s = 0; s <= scope; ++s) me.passed[s] = barrier;
}

void start(Thread& me, int number, const void* stack, size_t size) {
  me.number = number, me.stack = reinterpret_cast<uintptr_t>(stack), me.size = size;
  pass(me, kOfCluster, now);
}

void run(const Thread* thread, int block_threads) {
  running = watching ? thread : nullptr;
  threads_a_block = block_threads;
}

void access(const void* at, size_t bytes, bool writes, const void* from) {
  if (!running || reinterpret_cast<uintptr_t>(at) - running->stack < running->size) return;
  each_granule(at, bytes, [&](Granule& g) {
    if (g.copier) report(writes ? "writes" : "reads", "has a copy under way to", g.copier - 1, from);
    if (unordered(g, kWrite)) report(writes ? "writes" : "reads", "writes", g.thread[kWrite], from);
    writes ? write(g, from) : read(g);
  });
}

void copy_begins(const void* to, const void* from, size_t bytes) {
  if (!running) return;
  if (from) access(from, bytes, false, nullptr);
  access(to, bytes, true, nullptr);
  each_granule(to, bytes, [](Granule& g) { g.copier = static_cast<uint16_t>(running->number + 1); });
}

void copy_ends(const void* to, size_t bytes) {
  if (!running) return;
  each_granule(to, bytes, [](Granule& g) { g.copier = 0; });
  access(to, bytes, true, nullptr);
}

void leave(const void* shared, size_t bytes) {
  if (!running || bytes == 0) return;
  each_granule(shared, bytes, [](Granule& g) {
    for (Kept kind : {kWrite, kRead, kReadOfBlock})
      if (scope_of(g.thread[kind], running->number) == kOfCluster && unordered(g, kind))
        report("takes along as the last of its block", "uses", g.thread[kind], nullptr);
    set(g, kWrite);
    g.copier = 0;
  });
}

}  // namespace sfk::shim::races

// What -fsanitize=thread calls.
extern "C" {

#define SFK_HOOKS(bytes)                                                                                       \
  void __tsan_read##bytes(void* p) { sfk::shim::races::access(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { sfk::shim::races::access(p, bytes, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                                 \
    sfk::shim::races::access(p, bytes, false, __builtin_return_address(0));                                    \
  }                                                                                                            \
  void __tsan_unaligned_write##bytes(void* p) { sfk::shim::races::access(p, bytes, true, __builtin_return_address(0)); }
SFK_HOOKS(1)
SFK_HOOKS(2)
SFK_HOOKS(4)
SFK_HOOKS(8)
SFK_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  sfk::shim::races::access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  sfk::shim::races::access(p, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
