// How heads are laid out on a device.
#include <algorithm>

#include "attention.cuh"
#include "launch.cuh"

namespace sfk::cuda {
namespace {

constexpr int kTokensABlock = 128;  // a tile of 16 for every warp: smaller shares leave warps without work

struct Layout {
  int cluster = 0;
  size_t shared = 0;
};

template <class T>
size_t shared_bytes(const AttentionParams& p, int cluster) {
  Arena arena;
  AttentionShared<T>(arena, p, padded(KeyShare::each(p.S, cluster)));
  return static_cast<size_t>(arena.used) * sizeof(float);
}

// The smallest cluster that holds the keys, then larger ones while they leave no processor without work.
Layout layout(const Device& device, const AttentionParams& p) {
  Layout best;
  if (std::max({p.S, p.L, p.D, p.E, p.M}) > (int64_t{1} << 24)) return best;
  for (int cluster = 1; cluster <= device.clusters; cluster *= 2) {
    const size_t bytes = p.key.dtype == Dtype::f32 ? shared_bytes<float>(p, cluster) : shared_bytes<BF16>(p, cluster);
    if (bytes > static_cast<size_t>(device.shared)) continue;
    const bool worth =
        std::max(p.S, p.L) >= int64_t{kTokensABlock} * cluster && p.B * p.H * cluster <= device.processors;
    if (best.cluster == 0 || worth) best = {cluster, bytes};
  }
  return best;
}

}  // namespace

std::string attention_refusal(const Device& device, const AttentionParams& p) {
  if (device.major < kOldest) return too_old(device);
  if (layout(device, p).cluster) return "";
  return std::to_string(p.S) + " keys with M = " + std::to_string(p.M) + ", D = " + std::to_string(p.D) +
         ", E = " + std::to_string(p.E) + " do not fit into " + shared_memory_of(device);
}

void attention(const AttentionParams& p, const Device& device, void* stream) {
  if (p.B * p.H == 0) return;
  const Layout l = layout(device, p);
  if (l.cluster == 0) throw std::invalid_argument("attention: the keys do not fit on the chip");
  const Grid grid = {p.B * p.H * l.cluster, kThreads, l.cluster, l.shared};
  switch (p.key.dtype) {
    case Dtype::f32:
      return launch(attention_kernel<float>, "attention", grid, p, stream);
    case Dtype::bf16:
      return launch(attention_kernel<BF16>, "attention", grid, p, stream);
    case Dtype::f16:
      return launch(attention_kernel<F16>, "attention", grid, p, stream);
    case Dtype::f64:
      throw std::invalid_argument("attention has no kernels for float64");
  }
}

}  // namespace sfk::cuda
