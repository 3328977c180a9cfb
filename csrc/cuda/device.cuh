// The only door to the hardware: everything a kernel may use beyond plain C++ stands here, and all inline assembly.
//
// Compiled by nvcc it is the GPU.  Without it (SFK_SHIM) the same names come from testing/shim.h, which runs every
// thread of a block as a fiber on the CPU, so that the kernels' own source is tested where there is no GPU.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef SFK_SHIM
#include "testing/shim.h"
#define SFK_DEVICE inline
#define SFK_BOTH inline
#define SFK_KERNEL(threads, blocks) void
#define SFK_APART inline
#define SFK_GIVEN
#else
#include <cooperative_groups.h>
#define SFK_DEVICE __device__ __forceinline__
#define SFK_BOTH __host__ __device__ __forceinline__
#define SFK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SFK_APART __device__ __noinline__  // what seldom runs: not between the instructions that do
#define SFK_GIVEN __grid_constant__        // parameters of a kernel that functions apart from it read where they are
#endif

namespace sfk {

constexpr int kWarp = 32;
constexpr float kNone = -INFINITY;  // log of nothing
constexpr float kLog2e = 1.4426950408889634f;

// Sixteen bits of a token; four numbers that are moved at once.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct alignas(16) Vec4 {
  float x, y, z, w;
};
struct alignas(16) Bits4 {
  uint32_t x, y, z, w;
};

#ifdef SFK_SHIM

SFK_DEVICE int thread_index() { return shim::thread_index(); }
SFK_DEVICE int block_threads() { return shim::block_threads(); }
SFK_DEVICE int64_t block_index() { return shim::block_index(); }
SFK_DEVICE int cluster_size() { return shim::cluster_size(); }
SFK_DEVICE int cluster_rank() { return shim::cluster_rank(); }
SFK_DEVICE void* shared_memory() { return shim::shared_memory(); }
SFK_DEVICE void sync_block() { shim::sync_block(); }
SFK_DEVICE void sync_cluster() { shim::sync_cluster(); }
SFK_DEVICE int grid_width() { return shim::grid_width(); }
SFK_DEVICE int grid_column() { return shim::grid_column(); }
SFK_DEVICE int grid_row() { return shim::grid_row(); }
SFK_DEVICE void sync_grid() { shim::sync_grid(); }
template <class T>
SFK_DEVICE T shuffle_xor(T x, int mask) {
  return shim::shuffle_xor(x, mask);
}
SFK_DEVICE void sync_warp() { shim::sync_warp(); }
SFK_DEVICE int fresh(int x) { return x; }
SFK_DEVICE float exp2_approx(float x) { return std::exp2(x); }
SFK_DEVICE float log2_approx(float x) { return std::log2(x); }
SFK_DEVICE float root_inverse_approx(float x) { return 1 / std::sqrt(x); }
SFK_DEVICE float inverse_approx(float x) { return 1 / x; }
template <class T>
SFK_DEVICE T* map_shared(T* p, int rank) {
  return static_cast<T*>(shim::map_shared(p, rank));
}
SFK_DEVICE float to_float(BF16 x) { return shim::from_bf16(x.bits); }
SFK_DEVICE float to_float(F16 x) { return shim::from_f16(x.bits); }
template <class T>
SFK_DEVICE uint32_t pack(float low, float high) {
  constexpr bool bf16 = std::is_same<T, BF16>::value;
  const uint32_t a = bf16 ? shim::to_bf16(low) : shim::to_f16(low);
  return a | static_cast<uint32_t>(bf16 ? shim::to_bf16(high) : shim::to_f16(high)) << 16;
}
SFK_DEVICE void copy16_async(void* shared, const void* global) { shim::copy16_async(shared, global); }
SFK_DEVICE void copy16_async(void* shared, const void* global, bool present) {
  shim::copy16_async(shared, present ? global : nullptr);
}
SFK_DEVICE void copies_commit() { shim::copies_commit(); }
template <int kPending>
SFK_DEVICE void copies_wait() {
  shim::copies_wait(kPending);
}
SFK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, false); }
SFK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) { shim::load_matrices(r, row, true); }
template <class T>
SFK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::multiply_add(c, a, b0, b1, std::is_same<T, BF16>::value);
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
template <class T>
SFK_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

SFK_DEVICE void sync_warp() { __syncwarp(); }

// x, of which the compiler then knows nothing: what is made of it is made anew, not kept in registers from before.
SFK_DEVICE int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x to 2 ulp; results below 2^-126 are 0.
SFK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same for 1 ulp of log2 x (2^-22 where that is small), of 1/√x and of 1/x.
SFK_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SFK_DEVICE float root_inverse_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SFK_DEVICE float inverse_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// Where a block is in a grid whose blocks run together.
SFK_DEVICE int grid_width() { return gridDim.x; }
SFK_DEVICE int grid_column() { return blockIdx.x; }
SFK_DEVICE int grid_row() { return blockIdx.y; }

// Every thread of such a grid; what they wrote before is visible to all of them after.
SFK_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

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

SFK_DEVICE float to_float(BF16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SFK_DEVICE float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two floats rounded to T, `low` in the low half.
template <class T>
SFK_DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  if (std::is_same<T, BF16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 16 bytes from global to shared memory behind the thread's back: there once its group has been waited for.
SFK_DEVICE void copy16_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// The same, or zeros where it is absent: nothing is read then.
SFK_DEVICE void copy16_async(void* shared, const void* global, bool present) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(present ? 16 : 0)
               : "memory");
}
SFK_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
SFK_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16 bits: lanes 8i..8i+7 name the rows of matrix i, 16 bytes each; lane l gets columns 2(l%4)
// and 2(l%4)+1 of row l/4 of each (transposed: of column l/4, those rows).
SFK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
SFK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// C [16,8] += A [16,16] B [16,8] of a warp.  With g = lane/4, t = lane%4: A's registers hold rows g, g+8, g, g+8 at
// columns 2t.. (two), 2t.., 2t+8.., 2t+8..; B's columns g at rows 2t.. and 2t+8..; C's rows g, g, g+8, g+8 at 2t, 2t+1.
template <class T>
SFK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (std::is_same<T, BF16>::value)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// Numbers in shared memory, by where they start: as a number of 32 bits, which every thread has alike, a place costs
// less than a pointer does.  Used as the pointer it stands for.
template <class T>
struct Place {
  int at = 0;  // in floats
  SFK_DEVICE operator T*() const { return reinterpret_cast<T*>(static_cast<float*>(shared_memory()) + at); }
};
template <class T>
SFK_DEVICE T* map_shared(const Place<T>& place, int rank) {
  return map_shared(static_cast<T*>(place), rank);
}

SFK_DEVICE float to_float(float x) { return x; }
template <class T>
SFK_DEVICE T rounded(float x) {
  return T{static_cast<uint16_t>(pack<T>(x, 0))};
}
template <>
SFK_DEVICE float rounded<float>(float x) {
  return x;
}

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
