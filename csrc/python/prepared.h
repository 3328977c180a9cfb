// Calls whose sizes, strides and dtypes were checked once, for those that come after them: what is new of each is where
// its tensors lie.
#pragma once
#include <algorithm>
#include <vector>

#include "../cpu/isa/table.h"
#include "arguments.h"

namespace sfk {

inline void place(View& v, uintptr_t address) {
  if (v) v.data = reinterpret_cast<void*>(address);
}

// Whether there is nothing but tokens and references.
inline bool is_plain(const AttentionParams& p) {
  return !(p.log_b || p.P || std::any_of(p.hyper, p.hyper + kNumHyper, [](const View& v) { return bool(v); }));
}

// Attention without masks, positions and dropout, of which o alone is wanted.
class PreparedAttention {
 public:
  PreparedAttention(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
                    int threads, const py::object& o)
      : p_(attention_params(x, scalars, dot, T, dropout_p, seed, threads)) {
    need(p_.query, "query");
    p_.o = view(o, "o", {p_.B, p_.H, p_.L, p_.E}, p_.key.dtype);
    need(p_.o, "o");
    if (!is_plain(p_) || p_.log_a || dropout_p > 0)
      throw std::invalid_argument("prepared attention takes nothing but tokens and references");
  }

  void run(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t references, uintptr_t o, int threads) const {
    AttentionParams p = p_;
    place(p.query, query), place(p.key, key), place(p.value, value), place(p.references, references), place(p.o, o);
    p.threads = threads < 1 ? 1 : threads;
    py::gil_scoped_release nogil;
    kernels().attention(p);
  }

 private:
  AttentionParams p_;
};

// A step of one token of each sequence on the same states.
class PreparedStep {
 public:
  // log_mass: [B,H,1] F, or bool where a key takes part.
  PreparedStep(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
               int threads, const py::object& log_mass, const py::object& log_decay, const py::tuple& states,
               bool indexed, const py::object& o)
      : p_(step_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), log_decay, states, o)),
        indexed_(indexed) {
    if (!indexed) own_states(p_);
    p_.log_a = view(log_mass, "log_mass", {p_.B, p_.H, 1});
    if (p_.log_a.dtype != kBool) same_dtype(p_.log_a, compute_dtype(p_.f64), "log_mass");
    if (!is_plain(p_)) throw std::invalid_argument("a prepared step takes nothing but tokens and references");
  }

  // The step of one token, each tensor at the address that is given.  False, and nothing is done, where the values of
  // gates or of `rows` are not what a step takes as they are.
  bool run(uintptr_t states, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t references, uintptr_t rows,
           uintptr_t log_decay, uintptr_t log_mass, uintptr_t o, int threads) const {
    StepParams p = p_;
    place(p.states, states), place(p.query, query), place(p.key, key), place(p.value, value), place(p.o, o);
    place(p.references, references), place(p.log_decay, log_decay), place(p.log_a, log_mass);
    p.rows = indexed_ ? reinterpret_cast<const int32_t*>(rows) : nullptr;
    p.threads = threads < 1 ? 1 : threads;
    if (!(p.f64 ? fading<double>(p) : fading<float>(p)) || !apart(p)) return false;
    py::gil_scoped_release nogil;
    kernels().step(p);
    return true;
  }

 private:
  // Whether all gates are in the range that they are else brought to.
  template <class F>
  static bool fading(const StepParams& p) {
    const View& v = p.log_decay;
    for (int64_t b = 0; v && b < p.B; ++b)
      for (int64_t h = 0; h < p.H; ++h) {
        const F gate = static_cast<const F*>(v.data)[b * v.stride[0] + h * v.stride[1]];
        if (!(gate <= F(0) && gate >= F(kForgotten))) return false;
      }
    return true;
  }
  // Whether each token has a state of its own, or none (−1).
  static bool apart(const StepParams& p) {
    if (!p.rows) return true;
    std::vector<int32_t> taken;
    for (int64_t b = 0; b < p.B; ++b) {
      if (p.rows[b] == -1) continue;
      if (p.rows[b] < 0 || p.rows[b] >= p.states.size[0]) return false;
      taken.push_back(p.rows[b]);
    }
    std::sort(taken.begin(), taken.end());
    return std::adjacent_find(taken.begin(), taken.end()) == taken.end();
  }

  static constexpr double kForgotten = -1000;  // states.FORGOTTEN
  StepParams p_;
  bool indexed_;
};

}  // namespace sfk
