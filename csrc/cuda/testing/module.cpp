// The CUDA kernels as a Python module that runs them on the CPU, on CPU tensors: the shim in place of the GPU.
#include <pybind11/stl.h>

#include <vector>

#include "../../python/cuda_bindings.h"
#include "shim.h"

namespace {

// What each of 64 threads reads from its neighbour's place in shared memory, with or without a barrier after writing.
std::vector<float> neighbours(bool barrier) {
  constexpr int kThreads = 64;
  std::vector<float> found(kThreads);
  sfk::shim::run({1, kThreads, 1, kThreads * sizeof(float)}, [&] {
    float* shared = static_cast<float*>(sfk::shim::shared_memory());
    const int i = sfk::shim::thread_index();
    shared[i] = static_cast<float>(i);
    if (barrier) sfk::shim::sync_block();
    found[i] = shared[(i + 1) % kThreads];
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(cuda_shim, m) {
  sfk::bind_cuda(m);
  m.def("set_descending", &sfk::shim::set_descending);
  m.def("neighbours", &neighbours);
}
