// The only door to the hardware: everything a kernel may use beyond plain C++ stands here, and all inline assembly.
//
// Compiled by nvcc it is the GPU.  Without it (SFK_SHIM) the same names come from testing/shim.h, which runs every
// thread of a block as a fiber on the CPU, so that the kernels' own source is tested where there is no GPU.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef SFK_SHIM
#include "testing/shim.h"
#define SFK_DEVICE inline
#define SFK_BOTH inline
#define SFK_KERNEL(threads) void
#else
#define SFK_DEVICE __device__ __forceinline__
#define SFK_BOTH __host__ __device__ __forceinline__
#define SFK_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#endif

namespace sfk {

constexpr int kWarp = 32;
constexpr float kNone = -INFINITY;  // log of nothing
constexpr float kLog2e = 1.4426950408889634f;

#ifdef SFK_SHIM

SFK_DEVICE int thread_index() { return shim::thread_index(); }
SFK_DEVICE int block_threads() { return shim::block_threads(); }
SFK_DEVICE int64_t block_index() { return shim::block_index(); }
SFK_DEVICE int cluster_size() { return shim::cluster_size(); }
SFK_DEVICE int cluster_rank() { return shim::cluster_rank(); }
SFK_DEVICE void* shared_memory() { return shim::shared_memory(); }
SFK_DEVICE void sync_block() { shim::sync_block(); }
SFK_DEVICE void sync_cluster() { shim::sync_cluster(); }
SFK_DEVICE float shuffle_xor(float x, int mask) { return shim::shuffle_xor(x, mask); }
SFK_DEVICE float exp2_approx(float x) { return std::exp2(x); }
template <class T>
SFK_DEVICE T* map_shared(T* p, int rank) {
  return static_cast<T*>(shim::map_shared(p, rank));
}

#else

SFK_DEVICE int thread_index() { return threadIdx.x; }
SFK_DEVICE int block_threads() { return blockDim.x; }
SFK_DEVICE int64_t block_index() { return blockIdx.x; }
SFK_DEVICE void* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}
SFK_DEVICE void sync_block() { __syncthreads(); }
SFK_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// 2^x to 2 ulp; results below 2^-126 are 0.
SFK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SFK_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return static_cast<int>(n);
#else
  return 1;
#endif
}

SFK_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
#else
  return 0;
#endif
}

// Every thread of every block of the cluster; what they wrote before is visible to all of them after.
SFK_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  if (cluster_size() > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The address, in the block `rank` of the cluster, of what p is in this block.
template <class T>
SFK_DEVICE T* map_shared(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return p;
#endif
}

#endif

SFK_DEVICE int warp_index() { return thread_index() / kWarp; }
SFK_DEVICE int lane_index() { return thread_index() % kWarp; }
SFK_DEVICE int block_warps() { return block_threads() / kWarp; }
SFK_DEVICE float exp_approx(float x) { return exp2_approx(x * kLog2e); }

// Over the lanes of a warp, in one order: every lane gets the same bits.
SFK_DEVICE float warp_sum(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
SFK_DEVICE float warp_max(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace sfk
