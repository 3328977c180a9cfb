// The CUDA kernels as a Python module that runs them on the CPU, on CPU tensors: the shim in place of the GPU.
#include "../bindings.h"
#include "shim.h"

PYBIND11_MODULE(cuda_shim, m) {
  sfk::bind_cuda(m);
  m.def("set_descending", &sfk::shim::set_descending);
}
