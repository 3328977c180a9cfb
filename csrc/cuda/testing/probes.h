// Small kernels that need one barrier each, run with it and without: what the shim must see.
#pragma once
#include <vector>

namespace sfk::shim {

struct Probe {
  const char* name;
  // What thread i finds, of the numbers of its block and of the other one; `barrier`: whether the barrier is there.
  float (*find)(float* mine, float* other, int i, bool barrier);
};

const std::vector<Probe>& probes();
// What the threads of two blocks of two warps find.
std::vector<float> found(const Probe& probe, bool barrier);

}  // namespace sfk::shim
