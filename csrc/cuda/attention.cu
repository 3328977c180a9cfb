// How heads are laid out on a device.
#include <algorithm>

#include "attention_backward.cuh"
#include "launch.cuh"

namespace sfk::cuda {
namespace {

constexpr int kTokensABlock = 128;  // a tile of 16 for every warp: smaller shares leave warps without work

struct Layout {
  int cluster = 0, buffers = 1;
  size_t shared = 0;
};

template <class T>
size_t shared_bytes(const AttentionParams& p, const Layout& l, bool backward) {
  const int rows = padded(KeyShare::each(p.S, l.cluster)), warps = kThreads / kWarp;
  Arena arena;
  if (backward)
    BackwardShared<T>(arena, p, rows, warps, l.buffers);
  else
    AttentionShared<T>(arena, p, rows, warps);
  return static_cast<size_t>(arena.used) * sizeof(float);
}

// Whether a layout fits, with two steps of tokens in memory where there is room for them.
bool fits(const Device& device, const AttentionParams& p, bool backward, Layout& l) {
  const auto limit = static_cast<size_t>(device.shared);
  for (l.buffers = backward ? 2 : 1; l.buffers > 0; --l.buffers) {
    l.shared = p.key.dtype == Dtype::f32 ? shared_bytes<float>(p, l, backward) : shared_bytes<BF16>(p, l, backward);
    if (l.shared <= limit) return true;
  }
  return false;
}

// The smallest cluster that holds the keys, then larger ones while they leave no processor without work.
Layout layout(const Device& device, const AttentionParams& p, bool backward) {
  Layout best;
  if (std::max({p.S, p.L, p.D, p.E, p.M}) > (int64_t{1} << 24) || p.T > (1 << 16)) return best;
  for (int cluster = 1; cluster <= device.clusters; cluster *= 2) {
    Layout next{cluster};
    if (!fits(device, p, backward, next)) continue;
    const bool worth =
        std::max(p.S, p.L) >= int64_t{kTokensABlock} * cluster && p.B * p.H * cluster <= device.processors;
    if (best.cluster == 0 || worth) best = next;
  }
  return best;
}

using Kernel = void (*)(ResidentParams);

void run(const char* name, Kernel f32, Kernel bf16, Kernel f16, const AttentionParams& p, const Device& device,
         void* stream, bool backward) {
  if (p.B * p.H == 0) return;
  const Layout l = layout(device, p, backward);
  if (l.cluster == 0) throw std::invalid_argument(std::string(name) + ": the keys do not fit on the chip");
  if (p.key.dtype == Dtype::f64) throw std::invalid_argument(std::string(name) + " has no kernels for float64");
  ResidentParams all;
  static_cast<AttentionParams&>(all) = p, all.buffers = l.buffers;
  const Kernel kernel = p.key.dtype == Dtype::f32 ? f32 : p.key.dtype == Dtype::bf16 ? bf16 : f16;
  launch(kernel, name, {p.B * p.H * l.cluster, kThreads, l.cluster, l.shared}, all, stream);
}

}  // namespace

std::string attention_refusal(const Device& device, const AttentionParams& p, bool backward) {
  if (device.major < kOldest) return too_old(device);
  if (layout(device, p, backward).cluster) return "";
  return std::to_string(p.S) + " keys with M = " + std::to_string(p.M) + ", D = " + std::to_string(p.D) +
         ", E = " + std::to_string(p.E) + (backward ? " and their gradient" : "") + " do not fit into " +
         shared_memory_of(device);
}

void attention(const AttentionParams& p, const Device& device, void* stream) {
  run("attention", attention_kernel<float>, attention_kernel<BF16>, attention_kernel<F16>, p, device, stream, false);
}

void attention_backward(const AttentionParams& p, const Device& device, void* stream) {
  run("attention_backward", attention_backward_kernel<float>, attention_backward_kernel<BF16>,
      attention_backward_kernel<F16>, p, device, stream, true);
}

}  // namespace sfk::cuda
