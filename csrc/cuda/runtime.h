// What the host asks of CUDA's runtime: device.cu asks it, and testing/runtime.cpp answers in its place where there is
// no GPU.
#pragma once
#include "cuda.h"

namespace sfk::cuda::runtime {

int device_count();
Device limits(int index);  // without `at_once`
int current();
void make_current(int index);
bool has_context(int index);  // whether the device's primary context is there: asking makes none
// Clusters whose blocks each take all the shared memory of a processor, of a device that has a context; 0: none fits.
int clusters_at_once(const Device& device, int cluster);
void allow_shared(const void* kernel, int64_t bytes);  // on the current device
#ifdef SFK_SHIM
void launched(const char* name);
#endif

}  // namespace sfk::cuda::runtime
