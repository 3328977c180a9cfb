// The forward of attention and pooling.
#include "attention.cuh"
#include "layout.cuh"

namespace sfk::cuda {

std::string attention_refusal(const Device& device, const AttentionParams& p, bool backward) {
  if (device.major < kOldest) return too_old(device);
  if (layout(device, p, backward).cluster) return "";
  return std::to_string(p.S) + " keys with M = " + std::to_string(p.M) + ", D = " + std::to_string(p.D) +
         ", E = " + std::to_string(p.E) + (backward ? " and their gradient" : "") + " do not fit into " +
         shared_memory_of(device);
}

bool attention_leaves_idle(const Device& device, const AttentionParams& p) {
  const Layout l = layout(device, p, false);
  // Where every warp has two tiles of keys and of queries or less, the launches are what counts.
  if (std::max(p.S, p.L) <= int64_t{2 * kTile} * l.warps * l.cluster) return false;
  return l.cluster && own_cycles(device, p, l) > spread_cycles(device, p);
}

void attention(const AttentionParams& p, const Device& device, void* stream, const Allocate& allocate) {
  if (p.B * p.H == 0) return;
  const Layout l = known_layout(device, p, false);
  if (attention_narrow(p, l, device, stream, allocate)) return;
  with_form(p, [&](auto of, auto known, auto plain) {
    using T = decltype(of);
    run(attention_kernel<T, known, plain>, "attention", p, l, device, stream, [](auto&) {});
  });
}

}  // namespace sfk::cuda
