// The CUDA kernels' own source on the shim, under sanitizers; every launch in the first schedule and, by turns,
// another, which must agree bit for bit; some on the smallest device that takes them, in large clusters.
#include <cstring>

#include "../../testing/cases.h"
#include "../cuda.h"
#include "runtime.h"
#include "shim.h"

using namespace sfk;

namespace {

// The bytes of a view's elements.
std::vector<unsigned char> contents(const View& v) {
  const int64_t bytes = v.dtype == Dtype::f32 ? 4 : 2;
  std::vector<unsigned char> all;
  for (int64_t i = 0; v && i < v.size[0]; ++i)
    for (int64_t j = 0; j < v.size[1]; ++j)
      for (int64_t k = 0; k < v.size[2]; ++k)
        for (int64_t l = 0; l < v.size[3]; ++l) {
          const int64_t at = i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + l * v.stride[3];
          const unsigned char* p = static_cast<const unsigned char*>(v.data) + at * bytes;
          all.insert(all.end(), p, p + bytes);
        }
  return all;
}

// A device whose blocks have little shared memory: refusal(device) is empty where it takes the problem.
template <class Refusal>
cuda::Device smallest(Refusal refusal) {
  cuda::Device d = cuda::device(0);
  const int64_t most = d.shared;
  for (d.shared = 8 * 1024; d.shared < most && !refusal(d).empty();) d.shared += 4 * 1024;
  d.shared = std::min(d.shared, most);
  return d;
}

template <class Params>
void in_two_schedules(const Params& p, void (*kernel)(const Params&, const cuda::Device&, void*),
                      const cuda::Device& small, std::initializer_list<const View*> results,
                      const cuda::Device& usual = cuda::device(0)) {
  static size_t turn = 0;
  const std::vector<shim::Schedule>& all = shim::schedules();
  std::vector<unsigned char> found[2];
  for (int i = 0; i < 2; ++i) {
    shim::set_schedule(all[i ? 1 + turn % (all.size() - 1) : 0]);
    kernel(p, turn % 4 ? usual : small, nullptr);
    for (const View* v : results)
      for (unsigned char x : contents(*v)) found[i].push_back(x);
  }
  expect(found[0] == found[1], "schedules", 1, 0);
  ++turn;
}

void run_sinkhorn(const SinkhornParams& p, bool backward, std::initializer_list<const View*> results) {
  const auto refusal = [&](const cuda::Device& d) { return cuda::sinkhorn_refusal(d, p.N, p.M, backward); };
  in_two_schedules(p, backward ? cuda::sinkhorn_backward : cuda::sinkhorn, smallest(refusal), results);
}
void sinkhorn(const SinkhornParams& p) { run_sinkhorn(p, false, {&p.f, &p.g, &p.c}); }
void sinkhorn_backward(const SinkhornParams& p) {
  run_sinkhorn(p, true, {&p.d_log_kernel, &p.d_log_a, &p.d_log_b, &p.d_lam});
}

// A contiguous tensor of the same sizes in 16 bits, in a buffer of exactly its size; NaN stays NaN.
View in_half(const View& v, Dtype dtype, std::unique_ptr<uint16_t[]>& memory) {
  View half = v;
  int64_t count = 1;
  for (int d = 3; d >= 0; --d) half.stride[d] = count, count *= v.size[d];
  memory.reset(new uint16_t[count]);
  half.data = memory.get(), half.dtype = dtype;
  const std::vector<unsigned char> from = contents(v);
  for (int64_t i = 0; i < count; ++i) {
    float x;
    std::memcpy(&x, from.data() + 4 * i, 4);
    memory[i] = dtype == Dtype::bf16 ? shim::to_bf16(x) : shim::to_f16(x);
  }
  return half;
}

// The problem in 16 bits, its outputs too.
struct Half {
  std::unique_ptr<uint16_t[]> memory[8];
  AttentionParams p;
  Half(const AttentionParams& all, Dtype dtype) : p(all) {
    int n = 0;
    for (View* v : {&p.query, &p.key, &p.value, &p.o, &p.d_o, &p.d_query, &p.d_key, &p.d_value}) {
      if (*v) *v = in_half(*v, dtype, memory[n]);
      ++n;
    }
  }
};

// float32 last: its results are what the case is judged by.
template <class Run>
void in_all_dtypes(const AttentionParams& p, Run run) {
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) run(Half(p, dtype).p);
  run(p);
}

void attention_forward(const AttentionParams& p, const cuda::Device& device, void* stream) {
  std::unique_ptr<float[]> memory;
  cuda::attention(p, device, stream, [&](int64_t numbers) {
    memory.reset(new float[numbers]);
    return memory.get();
  });
}

void run_attention(const AttentionParams& p, bool backward, std::initializer_list<const View*> results) {
  const auto refusal = [&](const cuda::Device& d) { return cuda::attention_refusal(d, p, backward); };
  in_two_schedules(p, backward ? cuda::attention_backward : attention_forward, smallest(refusal), results);
}

void attention(const AttentionParams& p) {
  in_all_dtypes(p, [](const AttentionParams& q) { run_attention(q, false, {&q.o, &q.z, &q.c}); });
}

void attention_backward(const AttentionParams& p) {
  in_all_dtypes(p, [](const AttentionParams& q) {
    run_attention(
        q, true, {&q.d_query, &q.d_key, &q.d_value, &q.d_log_a, &q.d_references, &q.d_log_b, &q.d_hyper, &q.d_ref_pos});
  });
}

// What the kernel for logits that lie close together takes, in 16 bits; keys that are masked hold NaN.
void narrow_case() {
  Case<float> c(false, pick({1, 2}), 2, pick({1, 33, 100}), pick({1, 70, 300}), pick({49, 64}), pick({16, 64}),
                pick({8, 40, 136}), 0, pick({0, 1, 3}));
  c.eps = 0.05, c.kind = KernelKind::rbf;
  Tensor<float> y({c.H, c.M, c.D}, 0), o({c.B, c.H, c.L, c.E}, 0), z({c.B, c.H, c.M, c.E}, 0),
      sums({c.B, c.H, c.T > 1 ? c.T : 1, c.M}, 0);
  AttentionParams p = c.params(1);
  p.references = y.random().view, p.o = o.view, p.z = z.view, p.c = sums.view;
  const cuda::Device device = cuda::device(0);
  cuda::Device crowded = device;  // runs one cluster at a time; too small for wide values beside many keys
  crowded.shared = 128 * 1024, crowded.at_once[0] = crowded.at_once[1] = crowded.at_once[2] = 1;
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    const Half half(p, dtype);
    const cuda::Device& on = pick({0, 1}) && c.E <= 64 ? crowded : device;
    in_two_schedules(half.p, attention_forward, on, {&half.p.o, &half.p.z, &half.p.c}, on);
    expect(shim::runtime().done.back().find("launch attention_narrow") == 0, "the kernel of narrow logits", 1, 0);
    z.each([](int64_t, int64_t, int64_t, int64_t, float& x) { expect(std::isfinite(x), "z", x, 0); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 5;
  KernelTable kernels = {};
  kernels.sinkhorn = sinkhorn, kernels.sinkhorn_backward = sinkhorn_backward;
  kernels.attention = attention, kernels.attention_backward = attention_backward;
  for (int i = 0; i < rounds; ++i) sinkhorn_case<float>(kernels), attention_case<float>(kernels, false), narrow_case();
  std::printf("cuda: %d rounds, %d failures\n", rounds, failures);
  return failures ? 1 : 0;
}
