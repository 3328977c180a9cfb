// The kernels of each instruction set, as plain functions in a namespace of its name, and the choice among those the
// machine has.
#pragma once
#include "../../causal_params.h"
#include "../../linearised_params.h"

// Every kernel: X(name, what it takes).
#define SFK_EACH_KERNEL(X)               \
  X(attention, AttentionParams)          \
  X(attention_backward, AttentionParams) \
  X(causal, CausalParams)                \
  X(causal_backward, CausalParams)       \
  X(step, StepParams)                    \
  X(masked, MaskedParams)                \
  X(masked_backward, MaskedParams)       \
  X(packed, PackedStreamParams)          \
  X(packed_backward, PackedStreamParams) \
  X(features, FeatureParams)             \
  X(features_backward, FeatureParams)    \
  X(sinkhorn, SinkhornParams)            \
  X(sinkhorn_backward, SinkhornParams)   \
  X(started, StartedParams)              \
  X(linearised, LinearisedParams)

namespace sfk {

struct KernelTable {
  const char* isa;
#define SFK_MEMBER(name, Params) void (*name)(const Params&);
  SFK_EACH_KERNEL(SFK_MEMBER)
#undef SFK_MEMBER
  double (*fma_rate)(double seconds);  // FLOP/s of one thread
  double (*exp_rate)(double seconds);  // exponentials/s of one thread
};

namespace generic {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512bf16 {
extern const KernelTable table;
}
namespace amx {
extern const KernelTable table;
}

// The widest instruction set this machine and this build have, or the one named by SETFORMER_KERNELS_CPU_ISA, or the
// one set by set_isa.
const KernelTable& kernels();
// False where the machine or the build lacks it; "" returns to the default.
bool set_isa(const char* isa);
bool has_isa(const char* isa);

}  // namespace sfk
