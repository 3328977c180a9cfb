// The devices of this machine.
#include <map>
#include <mutex>
#include <utility>

#include "launch.cuh"

#ifndef SFK_SHIM
#include <cuda.h>
#endif

namespace sfk::cuda {

int device_count() { return runtime::device_count(); }

Device device(int index) {
  Device d = runtime::limits(index);
  const bool ask = d.clusters > 1 && runtime::has_context(index);
  for (int cluster = 2; ask && cluster <= d.clusters; cluster *= 2) {
    const int n = runtime::clusters_at_once(d, cluster);
    if (n == 0) d.clusters = cluster / 2;  // a part of a device, which has too few processors side by side
    d.at_once[cluster / 4] = n;
  }
  return d;
}

OnDevice::OnDevice(int index) {
  const int before = runtime::current();
  if (before == index) return;
  runtime::make_current(index);
  before_ = before;
}
// To make a device without a context the current one would give it one, half a gigabyte of its memory.
OnDevice::~OnDevice() {
  if (before_ >= 0 && runtime::has_context(before_)) runtime::make_current(before_);
}

#ifndef SFK_SHIM

namespace runtime {
namespace {

__global__ void whole_processor() {}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "asking a device for its limits");
  return value;
}

// What `find` says of a key, found once.
template <class Key, class Find>
auto once(const Key& key, Find find) {
  static std::mutex mutex;
  static std::map<Key, decltype(find())> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = find();
}

}  // namespace

int device_count() {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return 0;
  check(status, "counting devices");
  return n;
}

Device limits(int index) {
  return once(index, [&] {
    Device d;
    d.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    d.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
    d.processors = attribute(cudaDevAttrMultiProcessorCount, index);
    d.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    d.clusters = attribute(cudaDevAttrClusterLaunch, index) ? kLargestCluster : 1;
    d.together = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
    d.index = index;
    return d;
  });
}

int current() {
  int index = 0;
  check(cudaGetDevice(&index), "asking for the current device");
  return index;
}

void make_current(int index) { check(cudaSetDevice(index), "choosing a device"); }

bool has_context(int index) {
  using State = CUresult (*)(CUdevice, unsigned int*, int*);
  static const State state = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &status);
#endif
    return reinterpret_cast<State>(found);
  }();
  unsigned int flags = 0;
  int active = 0;
  return state && state(index, &flags, &active) == CUDA_SUCCESS && active;
}

int clusters_at_once(const Device& device, int cluster) {
  return once(std::make_pair(device.index, cluster), [&] {
    const OnDevice guard(device.index);
    allow_shared(reinterpret_cast<const void*>(whole_processor), device.shared);
    cudaLaunchAttribute size;
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster), config.blockDim = dim3(kWarp);
    config.dynamicSmemBytes = static_cast<size_t>(device.shared), config.attrs = &size, config.numAttrs = 1;
    int n = 0;
    check(cudaOccupancyMaxActiveClusters(&n, whole_processor, &config), "asking how many clusters fit");
    return n;
  });
}

void allow_shared(const void* kernel, int64_t bytes) {
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(kernel, limit, static_cast<int>(bytes)), "giving a kernel its shared memory");
}

}  // namespace runtime

#endif

}  // namespace sfk::cuda
