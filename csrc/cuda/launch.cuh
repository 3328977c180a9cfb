// The host's side of a launch: cluster, shared memory, stream; every status of the runtime becomes an exception.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "device.cuh"

#ifndef SFK_SHIM
#include <cuda_runtime.h>
#endif

namespace sfk::cuda {

constexpr int kOldest = 8;  // the compute capability that cp.async and bfloat16 products came with

inline std::string too_old(const Device& device) {
  return "needs compute capability " + std::to_string(kOldest) + ".0 or newer, found " + std::to_string(device.major) +
         "." + std::to_string(device.minor);
}
inline std::string shared_memory_of(const Device& device) {
  return "the shared memory of " + std::to_string(device.clusters) + " block(s) of " +
         std::to_string(device.shared / 1024) + " KB";
}

struct Grid {
  int64_t blocks;  // of all clusters together
  int threads, cluster;
  size_t shared;
};

#ifdef SFK_SHIM

template <class Params>
void launch(void (*kernel)(Params), const char*, const Grid& grid, const Params& params, void*) {
  if (grid.blocks) shim::run({grid.blocks, grid.threads, grid.cluster, grid.shared}, [&] { kernel(params); });
}

#else

inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is told once
  throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

template <class Params>
void launch(void (*kernel)(Params), const char* name, const Grid& grid, const Params& params, void* stream) {
  if (grid.blocks == 0) return;
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(kernel, limit, static_cast<int>(grid.shared)), name);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks)), config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
}

#endif

}  // namespace sfk::cuda
