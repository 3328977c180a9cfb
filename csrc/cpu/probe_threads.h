#pragma once
#include <cstdint>

namespace sfk {

bool has_openmp();
double fma_peak(double seconds, int threads);
double exp_peak(double seconds, int threads);
// Copies arrays of `bytes` per thread for about `seconds`.
double copy_bandwidth(double seconds, int threads, int64_t bytes);

}  // namespace sfk
