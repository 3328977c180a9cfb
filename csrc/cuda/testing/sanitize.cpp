// The CUDA kernels' own source on the shim, under sanitizers; every launch in both orders of threads, which must agree
// bit for bit.
#include <cstring>

#include "../../testing/cases.h"
#include "../cuda.h"
#include "shim.h"

using namespace sfk;

namespace {

// What a view's elements hold.
std::vector<float> contents(const View& v) {
  std::vector<float> all;
  for (int64_t i = 0; v && i < v.size[0]; ++i)
    for (int64_t j = 0; j < v.size[1]; ++j)
      for (int64_t k = 0; k < v.size[2]; ++k)
        for (int64_t l = 0; l < v.size[3]; ++l)
          all.push_back(
              static_cast<const float*>(v.data)[i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + l * v.stride[3]]);
  return all;
}

template <class Params>
void in_both_orders(const Params& p, void (*kernel)(const Params&, const cuda::Device&, void*),
                    std::initializer_list<const View*> results) {
  std::vector<float> found[2];
  for (int order = 0; order < 2; ++order) {
    shim::set_descending(order == 1);
    kernel(p, cuda::device(0), nullptr);
    for (const View* v : results)
      for (float x : contents(*v)) found[order].push_back(x);
  }
  expect(std::memcmp(found[0].data(), found[1].data(), found[0].size() * sizeof(float)) == 0, "order of threads", 1, 0);
}

void sinkhorn(const SinkhornParams& p) { in_both_orders(p, cuda::sinkhorn, {&p.f, &p.g, &p.c}); }
void sinkhorn_backward(const SinkhornParams& p) {
  in_both_orders(p, cuda::sinkhorn_backward, {&p.d_log_kernel, &p.d_log_a, &p.d_log_b, &p.d_lam});
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 5;
  KernelTable kernels = {};
  kernels.sinkhorn = sinkhorn, kernels.sinkhorn_backward = sinkhorn_backward;
  for (int i = 0; i < rounds; ++i) sinkhorn_case<float>(kernels);
  std::printf("cuda: %d rounds, %d failures\n", rounds, failures);
  return failures ? 1 : 0;
}
