// What crosses from Python to the kernels of transport to convergence.
#pragma once
#include "params.h"

namespace sfk {

struct StartedParams : SinkhornParams {
  View start;  // [G,M] F: g⁰ where it is finite and there is mass; forward only
};

// One pass over the rows of G problems from potentials g: what the system of the fixed point is made of.
struct LinearisedParams {
  int64_t G = 0, N = 0, M = 0;
  int32_t threads = 1;
  bool f64 = false;
  View log_kernel, log_a, lam_a, g;  // [G,N,M] [G,N] [G] [G,M] F
  View s, f, c, mass;                // [G,N] [G,N] [G,M] [G,M] F: LSE_j(ℓ + g), f, LSE_i(ℓ + f), column sums of P
  View gram, rows;                   // A [G,M,M] or X [G,N,M] F, A = XᵀX: one of them
};

}  // namespace sfk
