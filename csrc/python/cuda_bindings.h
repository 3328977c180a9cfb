// The CUDA kernels' part of the Python module; kernels of other backends need not know CUDA.
#pragma once
#include <pybind11/pybind11.h>

#include <array>

#include "../params.h"

namespace sfk {

void bind_cuda(pybind11::module_& m);

// B, H, L, S, M, D, E, P, T: with the dtype all that a layout is made of.
using AttentionSizes = std::array<int64_t, 9>;
AttentionParams attention_sizes(const AttentionSizes& sizes, int dtype);

}  // namespace sfk
