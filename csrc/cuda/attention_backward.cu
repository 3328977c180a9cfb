// The backward of attention and pooling.
#include "attention_backward.cuh"
#include "layout.cuh"

namespace sfk::cuda {

int64_t gradient_parts(const Device& device, const AttentionParams& p) { return layout(device, p, true).groups; }

void attention_backward(const AttentionParams& p, const Device& device, void* stream) {
  if (p.B * p.H == 0) return;
  const Layout l = known_layout(device, p, true);
  with_form(p, [&](auto of, auto known, auto plain) {
    using T = decltype(of);
    run(attention_backward_kernel<T, known, plain>, "attention_backward", p, l, device, stream, [](auto&) {});
  });
}

}  // namespace sfk::cuda
