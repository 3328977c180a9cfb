// The forward of attention and pooling where all logits lie close together, which is known from β and ε.
#include <cmath>

#include "layout.cuh"
#include "narrow.cuh"

namespace sfk::cuda {
namespace {

// Whether a tensor's rows can be read, or written, 16 bytes at a time, and are no further apart than 32 bits tell.
bool by_16_bytes(const View& v) {
  const int64_t numbers = v.dtype == Dtype::f32 ? 4 : 8;
  const int last = v.ndim - 1;
  bool all = v.stride[last] == 1 && v.size[last] % 8 == 0 && v.stride[last - 1] < (int64_t{1} << 30);
  for (int i = 0; i < last; ++i) all = all && v.stride[i] % numbers == 0;
  return all && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

// The layout of this kernel: where a block has a processor to itself, and tokens enough, twice the warps; no clusters
// where these would have to wait for one another.
template <class T>
Layout narrow_layout(const AttentionParams& p, const Layout& usual, const Device& device) {
  Layout l = usual;
  l.in_grid = waits_as_clusters(p, l, device);
  Layout wide = l;
  wide.warps = kNarrowThreads / kWarp, wide.shared = shared_bytes<NarrowShared<T>>(p, wide);
  const int64_t tokens = std::max<int64_t>(KeyShare::each(p.S, l.cluster), KeyShare::each(p.L, l.cluster));
  const bool alone = p.H * l.groups * l.cluster <= device.processors ||
                     2 * static_cast<int64_t>(wide.shared) + kReserved > device.shared;
  const bool fits = wide.shared <= static_cast<size_t>(device.shared) && tokens >= int64_t{kTile} * wide.warps;
  return l.warps == kMostWarps && alone && fits ? wide : l;
}

template <class T>
bool run_narrow(const AttentionParams& p, const Layout& usual, const Device& device, void* stream,
                const Allocate& allocate) {
  const double beta = p.scalars[kBandwidth], epsilon = p.scalars[kEpsilon];
  const Layout l = narrow_layout<T>(p, usual, device);
  if ((1 - std::exp(-2 * beta)) / epsilon > kNarrowRange<T>) return false;
  if (shared_bytes<NarrowShared<T>>(p, l) > static_cast<size_t>(device.shared)) return false;
  const auto kernel = l.in_grid ? attention_narrow_kernel<T, GridPeers> : attention_narrow_kernel<T, ClusterPeers>;
  const char* name = l.in_grid ? "attention_narrow_in_grid" : "attention_narrow";
  run(kernel, name, p, l, device, stream, [&](NarrowShared<T>& shared) {
    shared.rate = static_cast<float>(1 / (epsilon * std::log(2.0)));
    shared.beta = static_cast<float>(beta / std::log(2.0));
    if (l.in_grid) shared.exchange = allocate(p.H * l.groups * l.cluster * shared.left);
  });
  return true;
}

}  // namespace

bool attention_narrow(const AttentionParams& p, const Layout& l, const Device& device, void* stream,
                      const Allocate& allocate) {
  const bool plain =
      p.kernel == KernelKind::rbf && !p.ref_pos && p.dropout_p <= 0 && !p.hyper[kBandwidth] && !p.hyper[kEpsilon];
  const bool usual = known(p) == kUsual && p.D <= kDepth;
  bool aligned = true;
  for (const View* v : {&p.key, &p.value, &p.references, &p.z}) aligned = aligned && by_16_bytes(*v);
  if (p.o) aligned = aligned && by_16_bytes(p.query) && by_16_bytes(p.o);
  if (!plain || !usual || !aligned) return false;
  return p.key.dtype == Dtype::bf16 ? run_narrow<BF16>(p, l, device, stream, allocate)
                                    : run_narrow<F16>(p, l, device, stream, allocate);
}

}  // namespace sfk::cuda
