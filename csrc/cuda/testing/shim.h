// What device.cuh is on a machine without a GPU: every thread of a block is a fiber, and a collective is a place where
// a fiber waits until all that take part have arrived.
//
// - Fibers run one at a time, each until its next collective, in ascending or descending order of threads.  A kernel
//   whose barriers suffice gives the same bits in both orders.
// - Shared memory is a heap buffer of exactly the size asked for, so that AddressSanitizer sees what lies outside, and
//   is full of NaN when a block starts.
// - A wait that can never end (a barrier that some threads do not reach, two different collectives) ends the program.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace sfk::shim {

struct Grid {
  int64_t blocks;
  int threads, cluster;
  size_t shared;
};

void set_descending(bool on);
void run(const Grid& grid, const std::function<void()>& kernel);

int thread_index();
int block_threads();
int64_t block_index();
int cluster_size();
int cluster_rank();
void* shared_memory();
void* map_shared(void* p, int rank);
void sync_block();
void sync_cluster();
void sync_warp();
float shuffle_xor(float x, int mask);
uint32_t shuffle_xor(uint32_t x, int mask);

float from_bf16(uint16_t x);
float from_f16(uint16_t x);
uint16_t to_bf16(float x);
uint16_t to_f16(float x);

// Asynchronous copies happen when they are waited for, so that a missing wait shows.
void copy16_async(void* shared, const void* global);
void copies_commit();
void copies_wait(int pending);

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);

}  // namespace sfk::shim
