// What crosses from Python to the kernels: plain structs of pointers, sizes and strides (in elements).
// Letters as in the definition: B batch, H heads, L queries, S keys, M references, D head dim, E value head dim,
// R landmarks, P position coordinates, T iterations.
#pragma once
#include <cstdint>

namespace sfk {

enum class Dtype : int32_t { f32, f64, bf16, f16 };
// Dtypes that no kernel computes in: of counts, and of masks.
constexpr Dtype kInt64 = static_cast<Dtype>(4), kBool = static_cast<Dtype>(5);
enum class KernelKind : int32_t { rbf, dot };
// The order of problem.HYPER.
enum Hyper { kBandwidth, kEpsilon, kLambdaA, kLambdaB, kPositionScale, kNumHyper };

// A strided tensor; absent when data is null.
struct View {
  void* data = nullptr;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};
  int32_t ndim = 0;
  Dtype dtype = Dtype::f32;
  explicit operator bool() const { return data != nullptr; }
};

// attention, pool and causal, forward and backward.  F below is the compute dtype: double for f64, else float.
struct AttentionParams {
  int64_t B = 0, H = 0, L = 0, S = 0, M = 0, D = 0, E = 0, P = 0, T = 0;
  KernelKind kernel = KernelKind::rbf;
  double scalars[kNumHyper] = {1, 0.05, 1, 1, 1};
  double dropout_p = 0;
  uint64_t seed = 0;
  const int64_t* seed_at = nullptr;  // the seed in the device's memory, where it is not to be waited for
  int32_t threads = 1;
  bool f64 = false;

  View query, key, value;            // [B,H,L,D] [B,H,S,D] [B,H,S,E] in one dtype
  View references;                   // [H,M,D] F
  View log_a, log_b;                 // [B,H,S] [H,M] F
  View hyper[kNumHyper];             // [H] F
  View query_pos, key_pos, ref_pos;  // [B,H,L,P] [B,H,S,P] [H,M,P] F
  View o;                            // [B,H,L,E] in the dtype of the query
  View z, c;                         // [B,H,M,E] [B,H,max(T,1),M] F
  View g;                            // [B,H,M] F: g^T, −inf where no key takes part
  View w_q, w_k;                     // [B,H,L,M] [B,H,S,M] F
  bool reading = false;              // z and g are given, there are no keys: the read alone

  View d_o, d_z, d_c;            // incoming gradients, shaped as o, z, c; reading, dz is outgoing, as is
  View d_g;                      // [B,H,M] F
  View d_query, d_key, d_value;  // outgoing, in the dtype of q, k, v
  View d_log_a;                  // [B,H,S] F
  // [B,H,M,D] [B,H,M] [B,H,5] [B,H,M,P] F: not yet summed over B (cuda: over its groups of batch elements)
  View d_references, d_log_b, d_hyper, d_ref_pos;
};

// attention under a mask that depends on the query.
struct MaskedParams : AttentionParams {
  View mask;            // [B,H,L,S] F or bool (true takes part): added to every query's log masses; strides may be 0
  bool causal = false;  // query i sees the keys s <= i + S − L
  View d_mask;          // as mask, added to
};

// attention, pool and causal of N segments, whose rows lie one after another; B = 1, L and S are rows of all.  z, c,
// their gradients and the parameters' have an element a segment where B is written above.
struct PackedParams : AttentionParams {
  int64_t N = 0;
  const int64_t *cu_q = nullptr,
                *cu_k = nullptr;  // [N + 1] from 0 on, not decreasing, at most L and S; cu_q null: pool
  bool causal = false;

  int64_t first_query(int64_t n) const { return cu_q ? cu_q[n] : 0; }
  int64_t queries(int64_t n) const { return first_query(n + 1) - first_query(n); }
  int64_t keys(int64_t n) const { return cu_k[n + 1] - cu_k[n]; }
};

// The numbers of κ̃ = s (e^{β(ĉ − c₀)} − 1), as reference/centring.py has them.
enum CentringNumber { kOffset, kGain, kMean, kGrowth, kNumCentring };

// ψ(x) = ‖x‖ W κ(w, x̂) with a given whitening W = (K_ww + δI)^{-1/2}; κ̃ in place of κ where `centring` is given.
struct FeatureParams {
  int64_t B = 0, H = 0, N = 0, D = 0, R = 0;
  double bandwidth = 1;
  int32_t threads = 1;
  bool f64 = false;
  View x, landmarks, bandwidths, whitening;    // [B,H,N,D] [H,R,D] F [H] F [H,R,R] F
  View centring;                               // [H,1,kNumCentring] F
  View psi;                                    // [B,H,N,R] in the dtype of x
  View d_psi, d_x;                             // as psi, as x
  View d_landmarks, d_bandwidth, d_whitening;  // [B,H,R,D] [B,H,1] [B,H,R,R] F: not yet summed over B
};

struct SinkhornParams {
  int64_t G = 0, N = 0, M = 0, T = 0;
  double scalars[2] = {1, 1};  // λ_a, λ_b
  double tol = -1;             // negative: run all T iterations
  int32_t threads = 1;
  bool f64 = false;
  View log_kernel, log_a, log_b;        // [G,N,M] [G,N] [G,M] F
  View lam_a, lam_b;                    // [G] F
  View f, g, c;                         // [G,N] [G,M] [G,max(T,1),M] F
  int64_t* iters = nullptr;             // [G]
  View d_f, d_g;                        // [G,N] [G,M]
  View d_log_kernel, d_log_a, d_log_b;  // [G,N,M] [G,N] [G,M]
  View d_lam;                           // [G,2]
};

}  // namespace sfk
