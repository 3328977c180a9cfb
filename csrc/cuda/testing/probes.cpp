#include "probes.h"

#include "shim.h"

namespace sfk::shim {

namespace {

// The last lane to come goes on at once, to the second one.
void shuffles() { shuffle_xor(shuffle_xor(0.0f, 1), 1); }

}  // namespace

const std::vector<Probe>& probes() {
  static const std::vector<Probe> all = {
      {"block",
       [](float* mine, float*, int i, bool barrier) {
         mine[i] = static_cast<float>(i);
         if (barrier) sync_block();
         return mine[(i + 1) % 64];
       }},
      {"block behind shuffles",
       [](float* mine, float*, int i, bool barrier) {
         mine[i] = static_cast<float>(i);
         shuffles();
         if (barrier) sync_block();
         return mine[(i + 32) % 64];
       }},
      {"cluster behind barriers of the block",
       [](float* mine, float* other, int i, bool barrier) {
         mine[i] = static_cast<float>(i);
         sync_block();
         barrier ? sync_cluster() : sync_block();
         sync_block();
         const float found = other[i];
         sync_cluster();
         return found;
       }},
      {"cluster before the end",
       [](float* mine, float* other, int i, bool barrier) {
         mine[i] = static_cast<float>(i);
         sync_cluster();
         if (cluster_rank() == 0) sync_block();
         const float found = cluster_rank() == 0 ? other[i] : 0.0f;
         if (barrier) sync_cluster();
         return found;
       }},
      {"warp behind shuffles",
       [](float* mine, float*, int i, bool barrier) {
         mine[i] = static_cast<float>(i);
         shuffles();
         if (barrier) sync_warp();
         return mine[i ^ 1];
       }},
      {"copy",
       [](float* mine, float*, int i, bool barrier) {
         alignas(16) static const float from[4] = {1, 2, 3, 4};
         if (i % 4 == 0) copy16_async(mine + i, from);
         copies_commit();
         if (barrier) copies_wait(0);
         sync_block();
         return mine[i ^ 1];
       }},
  };
  return all;
}

std::vector<float> found(const Probe& probe, bool barrier) {
  constexpr int kThreads = 64, kBlocks = 2;
  std::vector<float> all(kThreads * kBlocks);
  run({kBlocks, kThreads, kBlocks, kThreads * sizeof(float)}, [&] {
    float* mine = static_cast<float*>(shared_memory());
    float* other = static_cast<float*>(map_shared(mine, 1 - cluster_rank()));
    const int i = thread_index();
    sync_cluster();  // no block ends before another has its address
    all[cluster_rank() * kThreads + i] = probe.find(mine, other, i, barrier);
  });
  return all;
}

}  // namespace sfk::shim
