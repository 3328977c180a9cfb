// How heads are laid out on a device, and what that should take.
#pragma once
#include <algorithm>

#include "gradients.cuh"
#include "launch.cuh"

namespace sfk::cuda {

struct Layout {
  int cluster = 0, warps = kThreads / kWarp, buffers = 1;
  size_t shared = 0;
  int64_t problems = 1, groups = 0;  // see ResidentParams
  bool in_grid = false;              // the blocks of a head are no cluster: see GridPeers
};

// Runs the forward by the kernel for logits that lie close together; false where it does not take the problem.
bool attention_narrow(const AttentionParams& p, const Layout& l, const Device& device, void* stream,
                      const Allocate& allocate);

namespace {

constexpr int kReserved = 1024;  // bytes of shared memory that the runtime takes of every block
constexpr int kMostWarps = kThreads / kWarp;
static_assert(kMostRanks == kLargestCluster, "what kernels read of other blocks");

// Larger problems fit no device; below these, no sum of bytes overflows.
constexpr int64_t kLargestSize = int64_t{1} << 24;
constexpr int64_t kMostIterations = 1 << 16;

inline BlockShape block_of(const AttentionParams& p, const Layout& l) {
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
inline bool fits(const Device& device, const AttentionParams& p, bool backward, Layout& l) {
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
inline Layout with_warps(const Device& device, const AttentionParams& p, bool backward, int warps) {
  Layout best;
  for (int cluster = 1; cluster <= device.clusters; cluster *= 2) {
    Layout next;
    next.cluster = cluster, next.warps = warps;
    if (!fits(device, p, backward, next)) continue;
    const bool worth =
        std::max(p.S, p.L) >= int64_t{kTile} * warps * cluster && p.B * p.H <= device.clusters_at_once(cluster);
    if (best.cluster == 0 || worth) best = next;
  }
  return best;
}

// known_references of the kernel that takes a problem.
inline int known(const AttentionParams& p) {
  return with_dtype(p, [&](auto of) { return known_references<decltype(of)>(p.M); });
}

// call(T{}, known, plain) with the constants of the kernel that takes a problem: see Form.
template <class Call>
void with_form(const AttentionParams& p, Call call) {
  const bool plain = !p.ref_pos && p.dropout_p <= 0;
  with_dtype(p, [&](auto of) {
    const auto with_known = [&](auto known) {
      plain ? call(of, known, std::true_type{}) : call(of, known, std::false_type{});
    };
    using Compiled = std::integral_constant<int, kCompiled<decltype(of)>>;
    known(p) ? with_known(Compiled{}) : with_known(std::integral_constant<int, 0>{});
  });
}

// Blocks that run on a processor at a time.
inline int64_t blocks_at_once(const Device& device, const AttentionParams& p, const Layout& l, bool backward) {
  const int64_t by_memory = device.shared / static_cast<int64_t>(l.shared + kReserved);
  const int64_t by_threads = (backward ? 1 : blocks_a_processor(known(p))) * kMostWarps / l.warps;
  return std::max<int64_t>(1, std::min(by_memory, by_threads));
}

// As many warps as there are tiles, fewer where memory asks for it; then, where heads outnumber the blocks that run at
// a time, several batch elements for each, which then load the references once and add up their gradients.
inline Layout layout(const Device& device, const AttentionParams& p, bool backward) {
  Layout best;
  if (std::max({p.S, p.L, p.D, p.E, p.M, p.B * p.H}) > kLargestSize || p.T > kMostIterations) return best;
  int warps = kMostWarps;
  while (warps > 1 && std::max(p.S, p.L) <= int64_t{kTile} * warps / 2) warps /= 2;
  best = with_warps(device, p, backward, warps);
  for (; best.cluster == 0 && warps > 1; warps /= 2) best = with_warps(device, p, backward, warps / 2);
  if (best.cluster == 0) return best;
  const int64_t blocks = device.processors * blocks_at_once(device, p, best, backward);
  if (best.cluster == 1) best.problems = std::max<int64_t>(1, std::min(p.B, (p.B * p.H + blocks - 1) / blocks));
  best.groups = (p.B + best.problems - 1) / best.problems;
  return best;
}

// Fills the rest of a kernel's parameters by `more(shared)` and launches it.
template <class Shared, class More>
void run(void (*kernel)(Launch<Shared>), const char* name, const AttentionParams& p, const Layout& l,
         const Device& device, void* stream, More more) {
  static_assert(sizeof(Launch<Shared>) <= 4096, "more than CUDA's parameters of a kernel may be");
  Launch<Shared> all(p);
  all.problems = static_cast<int32_t>(l.problems), all.groups = static_cast<int32_t>(l.groups);
  Arena arena;
  all.shared = Shared(arena, p, block_of(p, l));
  more(all.shared);
  const Grid grid = {p.H * l.groups * l.cluster, l.warps * kWarp, l.cluster, arena.used * sizeof(float), l.in_grid};
  launch(kernel, name, grid, all, device, stream);
}

// The layout of a problem that a kernel is asked to run.
inline Layout known_layout(const Device& device, const AttentionParams& p, bool backward) {
  if (p.key.dtype == Dtype::f64) throw std::invalid_argument("attention has no kernels for float64");
  const Layout l = layout(device, p, backward);
  if (l.cluster == 0) throw std::invalid_argument("attention: the keys do not fit on the chip");
  return l;
}

// What 16 keys and 16 queries of a forward pass cost, in instructions of a warp, with M = D = E = 64 and T = 3 in 16
// bits, and how many launches there are; all other sizes are taken to cost the two alike.
struct Cost {
  double own, spread;
  int launches;
};
inline Cost cost_of(const AttentionParams& p) {
  // 1754 and 2160 are counted (benchmarks/results: cuda_instructions.csv, triton_resources.csv); the general forward's
  // 4700 is an estimate from its loops.
  const bool narrow = p.key.dtype != Dtype::f32 && padded(p.M) == kUsual && p.D <= kUsual && p.P == 0;
  return {narrow ? 1754.0 : 4700.0, 2160, 6};
}

constexpr double kLaunch = 3500;     // cycles from the end of a launch to the start of the next
constexpr double kInterval = 4;      // cycles from an instruction of a warp to its next, on average
constexpr double kMostIssued = 3;    // instructions a cycle of a processor that has warps enough
constexpr double kSpreadIssued = 2;  // the same of Triton's kernels, which leave it 8 warps

// Whether all blocks find a processor at a time that, as clusters, would have to take turns.
inline bool waits_as_clusters(const AttentionParams& p, const Layout& l, const Device& device) {
  const int64_t heads = p.H * l.groups;
  return device.together && l.cluster > 1 && heads * l.cluster <= device.processors &&
         heads > device.clusters_at_once(l.cluster);
}

// Turns that the device takes with all blocks of a forward pass.
inline int64_t turns(const Device& device, const AttentionParams& p, const Layout& l) {
  if (l.in_grid) return 1;
  const int64_t blocks = p.H * l.groups * l.cluster;
  const int64_t at_once = l.cluster > 1 ? device.clusters_at_once(l.cluster) * l.cluster
                                        : device.processors * blocks_at_once(device, p, l, false);
  return (blocks + at_once - 1) / at_once;
}

// Cycles of a forward pass laid out like this, and of one whose every head has the whole device.
inline double own_cycles(const Device& device, const AttentionParams& p, const Layout& l) {
  const int64_t running = blocks_at_once(device, p, l, false), blocks = p.H * l.groups * l.cluster;
  const int64_t here = std::max<int64_t>(1, std::min(running, blocks / device.processors));
  const double tiles = static_cast<double>(padded(p.S) + padded(p.L)) / (2 * kTile) / l.cluster * l.problems;
  const double issued = std::min(kMostIssued, here * l.warps / kInterval);
  return kLaunch + turns(device, p, l) * here * tiles * cost_of(p).own / issued;
}
inline double spread_cycles(const Device& device, const AttentionParams& p) {
  const Cost cost = cost_of(p);
  const double tiles = static_cast<double>(padded(p.S) + padded(p.L)) / (2 * kTile) * p.B * p.H;
  return cost.launches * kLaunch + tiles * cost.spread / (device.processors * kSpreadIssued);
}

}  // namespace
}  // namespace sfk::cuda
