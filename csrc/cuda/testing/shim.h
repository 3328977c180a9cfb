// What device.cuh is on a machine without a GPU: every thread of a block is a fiber, and a collective is a place where
// a fiber waits until all that take part have arrived.
//
// - Fibers run one at a time, each until its next collective.  Which goes on then is a schedule's choice: the next of
//   all, of the same warp while one of it can run (else every collective of a warp would be a barrier of the block), or
//   of the same block (else every barrier of a block would be one of the cluster); each in ascending and descending
//   order of threads.  A kernel whose barriers suffice gives the same bits in all of them.
// - races.h sees what no schedule shows.
// - Shared memory is a heap buffer of exactly the size asked for, so that AddressSanitizer sees what lies outside.  It
//   is full of NaN when a block starts, and is taken away with the block's last thread.
// - A wait that can never end (a barrier that some threads do not reach, two different collectives) ends the program.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace sfk::shim {

struct Grid {
  int64_t blocks;
  int threads, cluster;
  size_t shared;
  bool together = false;  // rows of so many blocks, all at a time, and no clusters
};

// Who goes on where one fiber has to wait: any, or first one of its warp, of its block.
enum class First { any, warp, block };
struct Schedule {
  const char* name = "any ascending";
  First first = First::any;
  bool descending = false;
};
const std::vector<Schedule>& schedules();
void set_schedule(const Schedule& schedule);

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
int grid_width();
int grid_column();
int grid_row();
void sync_grid();
void sync_warp();
float shuffle_xor(float x, int mask);
uint32_t shuffle_xor(uint32_t x, int mask);

float from_bf16(uint16_t x);
float from_f16(uint16_t x);
uint16_t to_bf16(float x);
uint16_t to_f16(float x);

// Asynchronous copies, of zeros from nowhere, happen when they are waited for, so that a missing wait shows.
void copy16_async(void* shared, const void* global);
void copies_commit();
void copies_wait(int pending);

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);

}  // namespace sfk::shim
