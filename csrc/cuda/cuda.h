// What the CUDA kernels offer to the bindings: neither torch nor CUDA in sight.
#pragma once
#include <functional>
#include <string>

#include "../params.h"

namespace sfk::cuda {

constexpr int kLargestCluster = 8;  // the largest that every device with clusters runs

// What a device can hold, as far as kernels ask.
struct Device {
  int major = 0, minor = 0;  // compute capability
  int processors = 0;        // streaming multiprocessors
  int64_t shared = 0;        // bytes of shared memory that one block may have
  int clusters = 1;          // blocks of a cluster, 1 where there are none
  int index = 0;
  // Clusters of 2, 4 and 8 blocks that run at a time, each block with a processor of its own: fewer than the processors
  // would make, as the blocks of a cluster share a part of the chip.  0 where the driver was not asked, for want of a
  // context.
  int at_once[3] = {0, 0, 0};
  bool together = true;  // can run a grid whose blocks all run at a time

  // What the driver told is what runs in one turn (measured: on an H200 66 clusters of 2, 30 of 4, 15 of 8).  Where it
  // was not asked: what the processors would make, 66, 33 and 16 there, less a tenth of the larger ones, whose parts of
  // the chip have processors left over.
  int64_t clusters_at_once(int cluster) const {
    const int told = cluster > 1 ? at_once[cluster / 4] : 0, most = processors / cluster;
    if (told) return told;
    return cluster > 2 ? most - most / 10 : most;
  }
};

int device_count();
Device device(int index);

// Makes a device the current one for as long as it lives, and no context on any other.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;  // -1: it was the current one already
};

// Why a device cannot take a problem of N rows and M columns; empty when it can.
std::string sinkhorn_refusal(const Device& device, int64_t N, int64_t M, bool backward);
void sinkhorn(const SinkhornParams& p, const Device& device, void* stream);
void sinkhorn_backward(const SinkhornParams& p, const Device& device, void* stream);

// The same for attention or pooling: p's sizes and the dtype of its keys.
std::string attention_refusal(const Device& device, const AttentionParams& p, bool backward);
// Whether a backend that spreads every head over the whole device should be faster forward, as this one leaves some of
// it idle.
bool attention_leaves_idle(const Device& device, const AttentionParams& p);
// Memory for so many floats on the device of the call, which the work of its stream may use from then on.
using Allocate = std::function<float*(int64_t)>;
void attention(const AttentionParams& p, const Device& device, void* stream, const Allocate& allocate);
// How many parts the gradients of the parameters come in: groups of batch elements.
int64_t gradient_parts(const Device& device, const AttentionParams& p);
void attention_backward(const AttentionParams& p, const Device& device, void* stream);

}  // namespace sfk::cuda
