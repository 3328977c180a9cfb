// The kernels of one instruction set, as plain functions, and the choice among those the machine has.
#pragma once
#include "../params.h"

namespace sfk {

struct KernelTable {
  const char* isa;
  void (*attention)(const AttentionParams&);
  void (*attention_backward)(const AttentionParams&);
  void (*causal)(const AttentionParams&);
  void (*causal_backward)(const AttentionParams&);
  void (*features)(const FeatureParams&);
  void (*features_backward)(const FeatureParams&);
  void (*sinkhorn)(const SinkhornParams&);
  void (*sinkhorn_backward)(const SinkhornParams&);
  double (*fma_rate)(double seconds);  // FLOP/s of one thread
  double (*exp_rate)(double seconds);  // exponentials/s of one thread
};

extern const KernelTable kGenericTable, kAvx2Table, kAvx512Table;

// The widest instruction set this machine and this build have, or the one named by SETFORMER_KERNELS_CPU_ISA, or the
// one set by set_isa.
const KernelTable& kernels();
// False where the machine or the build lacks it; "" returns to the default.
bool set_isa(const char* isa);
bool has_isa(const char* isa);

}  // namespace sfk
