#include "probe_threads.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "isa/table.h"

namespace sfk {
namespace {

template <class Body>
double sum_over_threads(int threads, Body body) {
  double total = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
#endif
  for (int i = 0; i < threads; ++i) total += body();
  return total;
}

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

double fma_peak(double seconds, int threads) {
  return sum_over_threads(threads, [&] { return kernels().fma_rate(seconds); });
}

double exp_peak(double seconds, int threads) {
  return sum_over_threads(threads, [&] { return kernels().exp_rate(seconds); });
}

double copy_bandwidth(double seconds, int threads, int64_t bytes) {
  if (bytes < 1) return 0;
  std::vector<std::vector<char>> from(threads), to(threads);
  for (int i = 0; i < threads; ++i) from[i].assign(bytes, 1), to[i].assign(bytes, 2);
  double total = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
#endif
  for (int i = 0; i < threads; ++i) {
    const auto start = std::chrono::steady_clock::now();
    double elapsed = 0, moved = 0;
    do {
      std::memcpy(to[i].data(), from[i].data(), bytes);
      std::swap(to[i], from[i]);
      moved += 2.0 * bytes;
      elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    } while (elapsed < seconds);
    total += moved / elapsed;
  }
  return total;
}

}  // namespace sfk
