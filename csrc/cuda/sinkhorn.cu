// How Sinkhorn's problems are laid out on a device.
#include <algorithm>

#include "launch.cuh"
#include "sinkhorn.cuh"

namespace sfk::cuda {
namespace {

constexpr int kRowsAWarp = 4;    // warps beyond that wait for the block's barriers more than they work
constexpr int kStripsAWarp = 4;  // the same for strips of 32 columns
constexpr int kRowsABlock = 16;  // a cluster's barrier costs as much as a dozen rows: blocks get at least these

struct Layout {
  int cluster = 0, threads = 0;
  size_t shared = 0;
};

Layout with_cluster(int cluster, int64_t N, int64_t M, bool backward) {
  const int64_t rows = (N + cluster - 1) / cluster, most = kSinkhornThreads / kWarp;
  const int64_t warps = std::max((rows - 1) / kRowsAWarp, (M - 1) / (kStripsAWarp * kWarp)) + 1;
  const int count = static_cast<int>(std::min(warps, most));
  Arena arena;
  if (backward)
    SinkhornBackwardShared(arena, static_cast<int>(rows), static_cast<int>(M), count);
  else
    SinkhornShared(arena, static_cast<int>(rows), static_cast<int>(M), count);
  return {cluster, count * kWarp, static_cast<size_t>(arena.used) * sizeof(float)};
}

// The smallest cluster that holds the problem, then larger ones while they leave no processor without work.
Layout layout(const Device& device, int64_t G, int64_t N, int64_t M, bool backward) {
  if (N < 1 || M < 1 || N * M > (int64_t{1} << 24)) return {};
  Layout best;
  for (int cluster = 1; cluster <= device.clusters; cluster *= 2) {
    const Layout next = with_cluster(cluster, N, M, backward);
    if (next.shared > static_cast<size_t>(device.shared)) continue;
    const bool worth = N >= int64_t{kRowsABlock} * cluster && G <= device.clusters_at_once(cluster);
    if (best.cluster == 0 || worth) best = next;
  }
  return best;
}

void run(void (*kernel)(SinkhornParams), const char* name, const SinkhornParams& p, const Device& device, void* stream,
         bool backward) {
  if (p.G == 0) return;
  const Layout l = layout(device, p.G, p.N, p.M, backward);
  if (l.cluster == 0) throw std::invalid_argument(std::string(name) + ": the problem does not fit on the chip");
  launch(kernel, name, {p.G * l.cluster, l.threads, l.cluster, l.shared}, p, device, stream);
}

}  // namespace

std::string sinkhorn_refusal(const Device& device, int64_t N, int64_t M, bool backward) {
  if (device.major < kOldest) return too_old(device);
  if (layout(device, 1, N, M, backward).cluster) return "";
  return "a problem of " + std::to_string(N) + " x " + std::to_string(M) + (backward ? " and its gradient" : "") +
         " does not fit into " + shared_memory_of(device);
}

void sinkhorn(const SinkhornParams& p, const Device& device, void* stream) {
  run(sinkhorn_kernel, "sinkhorn", p, device, stream, false);
}

void sinkhorn_backward(const SinkhornParams& p, const Device& device, void* stream) {
  run(sinkhorn_backward_kernel, "sinkhorn_backward", p, device, stream, true);
}

}  // namespace sfk::cuda
