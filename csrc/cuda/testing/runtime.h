// CUDA's runtime as tests describe it, and what was done with it.
#pragma once
#include <string>
#include <vector>

#include "../cuda.h"

namespace sfk::shim {

struct Runtime {
  std::vector<cuda::Device> devices;
  std::vector<bool> contexts;
  int current = 0;
  std::vector<std::string> done;
};

Runtime& runtime();

}  // namespace sfk::shim
