// The blocks that share a head's keys: how they meet, and read each other's sums.
#pragma once
#include "transport.cuh"

namespace sfk {
namespace {

// What a block leaves for the others, in numbers from the start of its place in device memory: its largest mass; sums
// of the columns, twice; its parts of z.
constexpr int kLargestAt = 0, kTotalAt = 4, kPartsAt = kTotalAt + 2 * kUsual;

// Blocks of a cluster: it lies in their shared memory.
struct ClusterPeers {
  static constexpr bool kProblems = true;  // they may have several, one after another
  template <class Shared>
  SFK_DEVICE explicit ClusterPeers(const Shared&) {}
  SFK_DEVICE int head() const { return static_cast<int>(block_index()) / cluster_size(); }
  SFK_DEVICE int size() const { return cluster_size(); }
  SFK_DEVICE int rank() const { return cluster_rank(); }
  SFK_DEVICE void sync() const { sync_cluster(); }
  // Where this block leaves what others find `of` it.
  SFK_DEVICE float* own(const Place<float>& place, int) const { return place; }
  SFK_DEVICE const float* of(int r, const Place<float>& place, int) const { return map_shared(place, r); }
};

// A row of a grid whose blocks run together, which meet in device memory: more of them than the clusters of a device
// have room for, as the blocks of a cluster need neighbouring processors.
struct GridPeers {
  static constexpr bool kProblems = false;
  float* exchange;
  int left;
  template <class Shared>
  SFK_DEVICE explicit GridPeers(const Shared& shared) : exchange(shared.exchange), left(shared.left) {}
  SFK_DEVICE int head() const { return grid_row(); }
  SFK_DEVICE int size() const { return grid_width(); }
  SFK_DEVICE int rank() const { return grid_column(); }
  SFK_DEVICE void sync() const { sync_grid(); }
  SFK_DEVICE float* own(const Place<float>&, int at) const { return of(rank(), at); }
  SFK_DEVICE const float* of(int r, const Place<float>&, int at) const { return of(r, at); }

 private:
  SFK_DEVICE float* of(int r, int at) const { return exchange + int64_t{left} * (head() * size() + r) + at; }
};

}  // namespace
}  // namespace sfk
