// The devices of this machine.
#include <map>
#include <mutex>

#include "launch.cuh"

namespace sfk::cuda {

#ifdef SFK_SHIM

int device_count() { return 1; }
Device device(int) { return {9, 0, 132, 227 * 1024, kLargestCluster}; }  // an H100
OnDevice::OnDevice(int) : before_(0) {}
OnDevice::~OnDevice() {}

#else

int device_count() {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return 0;
  check(status, "counting devices");
  return n;
}

static int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "asking a device for its limits");
  return value;
}

Device device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  Device d;
  d.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  d.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  d.processors = attribute(cudaDevAttrMultiProcessorCount, index);
  d.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  d.clusters = attribute(cudaDevAttrClusterLaunch, index) ? kLargestCluster : 1;
  return known[index] = d;
}

OnDevice::OnDevice(int index) {
  check(cudaGetDevice(&before_), "asking for the current device");
  check(cudaSetDevice(index), "choosing a device");
}
OnDevice::~OnDevice() { cudaSetDevice(before_); }

#endif

}  // namespace sfk::cuda
