// The host's side of a launch: cluster, shared memory, stream; every status of the runtime becomes an exception.
#pragma once
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"
#include "runtime.h"

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
  bool together = false;  // all blocks run at a time, or the launch fails; no clusters, but rows of so many blocks
};

#ifndef SFK_SHIM
inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is told once
  throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}
#endif

// Lets a kernel have all the shared memory of a block, once on every device: an attribute that each launch set to its
// own size could be another thread's by the time of the launch.
inline void allow_all_shared(const void* kernel, const Device& device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device.index})) return;
  runtime::allow_shared(kernel, device.shared);
  done.insert({kernel, device.index});
}

template <class Params>
void launch(void (*kernel)(Params), const char* name, const Grid& grid, const Params& params, const Device& device,
            void* stream) {
  if (grid.blocks == 0) return;
  allow_all_shared(reinterpret_cast<const void*>(kernel), device);
#ifdef SFK_SHIM
  (void)stream;
  runtime::launched(name);
  shim::run({grid.blocks, grid.threads, grid.cluster, grid.shared, grid.together}, [&] { kernel(params); });
#else
  cudaLaunchAttribute how;
  if (grid.together)
    how.id = cudaLaunchAttributeCooperative, how.val.cooperative = 1;
  else
    how.id = cudaLaunchAttributeClusterDimension, how.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  const auto width = static_cast<unsigned>(grid.together ? grid.cluster : grid.blocks);
  config.gridDim = dim3(width, static_cast<unsigned>(grid.blocks / width)), config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &how, config.numAttrs = grid.together || grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
#endif
}

}  // namespace sfk::cuda
