// How heads are laid out on a device.
#include <algorithm>

#include "attention_backward.cuh"
#include "launch.cuh"

namespace sfk::cuda {
namespace {

constexpr int kReserved = 1024;  // bytes of shared memory that the runtime takes of every block

constexpr int kMostWarps = kThreads / kWarp;
constexpr int kLeastWarps = 4;  // one for each scheduler: with fewer a long problem is another backend's

struct Layout {
  int cluster = 0, warps = kMostWarps, buffers = 1;
  size_t shared = 0;
  int64_t problems = 1, groups = 0;  // see ResidentParams
};

// Larger problems fit no device; below these, no sum of bytes overflows.
constexpr int64_t kLargestSize = int64_t{1} << 24;
constexpr int64_t kMostIterations = 1 << 16;

BlockShape block_of(const AttentionParams& p, const Layout& l) {
  return {padded(KeyShare::each(p.S, l.cluster)), l.warps, l.buffers};
}

template <class Shared>
size_t shared_bytes(const AttentionParams& p, const Layout& l) {
  Arena arena;
  Shared(arena, p, block_of(p, l));
  return arena.used * sizeof(float);
}

// call(T{}) for the type T of the tokens; float16 stands for what no kernel takes, and for its size.
template <class Call>
auto with_dtype(const AttentionParams& p, Call call) {
  if (p.key.dtype == Dtype::f32) return call(float{});
  if (p.key.dtype == Dtype::bf16) return call(BF16{});
  return call(F16{});
}

// Whether a layout fits, with two steps of tokens in memory where there is room for them.
bool fits(const Device& device, const AttentionParams& p, bool backward, Layout& l) {
  const auto limit = static_cast<size_t>(device.shared);
  for (l.buffers = backward ? 2 : 1; l.buffers > 0; --l.buffers) {
    l.shared = with_dtype(p, [&](auto of) {
      using T = decltype(of);
      return backward ? shared_bytes<BackwardShared<T>>(p, l) : shared_bytes<AttentionShared<T>>(p, l);
    });
    if (l.shared <= limit) return true;
  }
  return false;
}

// The smallest cluster that holds the keys, then larger ones while they leave no processor without work and every warp
// with a tile of its own.
Layout with_warps(const Device& device, const AttentionParams& p, bool backward, int warps) {
  Layout best;
  for (int cluster = 1; cluster <= device.clusters; cluster *= 2) {
    Layout next;
    next.cluster = cluster, next.warps = warps;
    if (!fits(device, p, backward, next)) continue;
    const bool worth =
        std::max(p.S, p.L) >= int64_t{kTile} * warps * cluster && p.B * p.H * cluster <= device.processors;
    if (best.cluster == 0 || worth) best = next;
  }
  return best;
}

// The number of references, padded, that a kernel is compiled for; 0 where there is only the one that takes any.
template <class T>
constexpr int kCompiled = std::is_same<T, float>::value ? 0 : kUsual;
// The same for the kernel that takes a problem.
int known(const AttentionParams& p) { return p.key.dtype != Dtype::f32 && padded(p.M) == kUsual ? kUsual : 0; }

// As many warps as there are tiles, fewer where memory asks for it; then, where heads outnumber the blocks that run at
// a time, several batch elements for each, which then load the references once and add up their gradients.
Layout layout(const Device& device, const AttentionParams& p, bool backward) {
  Layout best;
  if (std::max({p.S, p.L, p.D, p.E, p.M, p.B * p.H}) > kLargestSize || p.T > kMostIterations) return best;
  int warps = kMostWarps;
  while (warps > 1 && std::max(p.S, p.L) <= int64_t{kTile} * warps / 2) warps /= 2;
  best = with_warps(device, p, backward, warps);
  for (; best.cluster == 0 && warps > kLeastWarps; warps /= 2) best = with_warps(device, p, backward, warps / 2);
  if (best.cluster == 0) return best;
  const int64_t by_memory = device.shared / static_cast<int64_t>(best.shared + kReserved);
  const int64_t by_threads = (backward ? 1 : blocks_a_processor(known(p))) * kMostWarps / best.warps;
  const int64_t blocks = device.processors * std::max<int64_t>(1, std::min(by_memory, by_threads));
  if (best.cluster == 1) best.problems = std::max<int64_t>(1, std::min(p.B, (p.B * p.H + blocks - 1) / blocks));
  best.groups = (p.B + best.problems - 1) / best.problems;
  return best;
}

template <class Shared>
void run(void (*kernel)(Launch<Shared>), const char* name, const AttentionParams& p, const Layout& l, void* stream) {
  static_assert(sizeof(Launch<Shared>) <= 4096, "more than CUDA's parameters of a kernel may be");
  Launch<Shared> all(p);
  all.problems = static_cast<int32_t>(l.problems), all.groups = static_cast<int32_t>(l.groups);
  Arena arena;
  all.shared = Shared(arena, p, block_of(p, l));
  launch(kernel, name, {p.H * l.groups * l.cluster, l.warps * kWarp, l.cluster, l.shared}, all, stream);
}

// The layout of a problem that a kernel is asked to run.
Layout known_layout(const Device& device, const AttentionParams& p, bool backward) {
  if (p.key.dtype == Dtype::f64) throw std::invalid_argument("attention has no kernels for float64");
  const Layout l = layout(device, p, backward);
  if (l.cluster == 0) throw std::invalid_argument("attention: the keys do not fit on the chip");
  return l;
}

}  // namespace

std::string attention_refusal(const Device& device, const AttentionParams& p, bool backward) {
  if (device.major < kOldest) return too_old(device);
  if (layout(device, p, backward).cluster) return "";
  return std::to_string(p.S) + " keys with M = " + std::to_string(p.M) + ", D = " + std::to_string(p.D) +
         ", E = " + std::to_string(p.E) + (backward ? " and their gradient" : "") + " do not fit into " +
         shared_memory_of(device);
}

int64_t gradient_parts(const Device& device, const AttentionParams& p) { return layout(device, p, true).groups; }

void attention(const AttentionParams& p, const Device& device, void* stream) {
  if (p.B * p.H == 0) return;
  const Layout l = known_layout(device, p, false);
  with_dtype(p, [&](auto of) {
    using T = decltype(of);
    run(known(p) ? attention_kernel<T, kCompiled<T>> : attention_kernel<T, 0>, "attention", p, l, stream);
  });
}

void attention_backward(const AttentionParams& p, const Device& device, void* stream) {
  if (p.B * p.H == 0) return;
  const Layout l = known_layout(device, p, true);
  with_dtype(p, [&](auto of) {
    using T = decltype(of);
    const auto kernel = known(p) ? attention_backward_kernel<T, kCompiled<T>> : attention_backward_kernel<T, 0>;
    run(kernel, "attention_backward", p, l, stream);
  });
}

}  // namespace sfk::cuda
