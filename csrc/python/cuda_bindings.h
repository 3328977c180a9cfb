// The CUDA kernels' part of the Python module; kernels of other backends need not know CUDA.
#pragma once
#include <pybind11/pybind11.h>

namespace sfk {
void bind_cuda(pybind11::module_& m);
}
