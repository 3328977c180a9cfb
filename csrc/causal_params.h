// What the causal scan and its single steps take beside what attention takes.
#pragma once
#include "params.h"

namespace sfk {

// States are laid out as reference/state.py says.
struct StreamViews {
  View log_decay;             // [B,H,S] F, <= 0; 0 where a key takes no part
  View initial, final_state;  // [B,H,M,2E+3] F
  View d_final;               // incoming, as final_state
  View d_log_decay, d_initial;
};

struct CausalParams : AttentionParams, StreamViews {
  CausalParams() = default;
  explicit CausalParams(const AttentionParams& p) : AttentionParams(p) {}
};

// A packed batch; where it is causal, gates and a state a segment: B = N in those.
struct PackedStreamParams : PackedParams, StreamViews {};

// One token of each batch element: S = 1, and the L query heads that share its key.  log_a may be bool (true takes
// part).
struct StepParams : CausalParams {
  View states;                    // [N,H,M,2E+3] F, rows without gaps; in place
  const int32_t* rows = nullptr;  // [B] which state is whose, -1: none; null: each its own

  explicit StepParams(const AttentionParams& p) : CausalParams(p) {}
};

}  // namespace sfk
