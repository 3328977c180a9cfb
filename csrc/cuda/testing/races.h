// Whether barriers order what threads do to memory.  The compiler announces every access of the kernels
// (-fsanitize=thread; its hooks stand in races.cpp, its library is not linked), and each is held against what was done
// last at that place.
//
// Two accesses of different threads, one of them a write, need a barrier between them that both wait at: of the warp,
// of the block or of the cluster that has both.  Shuffles and products of a warp order nothing, an asynchronous copy is
// under way until it has been waited for, and a block that ends takes its memory along.  So a missing barrier shows in
// every order of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace sfk::shim::races {

enum Scope { kOfWarp, kOfBlock, kOfCluster, kScopes };

// A thread, and when the last barrier was over that it waited at with all of its warp, block, cluster.
struct Thread {
  int number = 0;                 // in its cluster
  uintptr_t stack = 0, size = 0;  // nobody else's business
  uint32_t passed[kScopes] = {};
};

// From here on; off at first.
void watch(bool on);
// The first race since the last call; empty where there was none.
std::string found();

// The time of a barrier's end.
uint32_t barrier();
void pass(Thread& me, Scope scope, uint32_t barrier);
// Threads of a cluster start: they have seen all that was done before.
void start(Thread& me, int number, const void* stack, size_t size);
// Who runs from here on; null: the host.
void run(const Thread* thread, int block_threads);

void access(const void* at, size_t bytes, bool write, const void* from);
void copy_begins(const void* to, const void* from, size_t bytes);
void copy_ends(const void* to, size_t bytes);
// The last thread of a block leaves.
void leave(const void* shared, size_t bytes);

}  // namespace sfk::shim::races
