// Packed batches, and causal scans that go on from a state: in one piece, in two, and token by token.
#pragma once
#include "cases.h"

namespace sfk {
namespace {

// Offsets of N segments of a pack, some of them empty, and slack behind the last.
struct Offsets {
  std::vector<int64_t> at{0};
  explicit Offsets(int64_t N) {
    for (int64_t n = 0; n < N; ++n) at.push_back(at.back() + pick({0, 1, 5, 13, 40}));
  }
  int64_t rows() const { return at.back() + pick({0, 3}); }
};

// What all gradients of a case go to; parameters' in `parts`.
template <class F>
struct Gradients {
  Tensor<F> q, k, v, log_a, y, log_b, hyper, pos;
  Gradients(const Case<F>& c, int64_t parts)
      : q({c.B, c.H, c.L, c.D}, Case<F>::layout()),
        k({c.B, c.H, c.S, c.D}, Case<F>::layout()),
        v({c.B, c.H, c.S, c.E}, Case<F>::layout()),
        log_a({c.B, c.H, c.S}, 0),
        y({parts, c.H, c.M, c.D}, 0),
        log_b({parts, c.H, c.M, 1}, 0),
        hyper({parts, c.H, int64_t(kNumHyper), 1}, 0),
        pos({parts, c.H, c.M, c.P}, 0) {}
  void give(AttentionParams& p) {
    p.d_query = q.view, p.d_key = k.view, p.d_value = v.view, p.d_log_a = log_a.view, p.d_references = y.view;
    p.d_log_b = log_b.view, p.d_hyper = hyper.view;
    if (p.P) p.d_ref_pos = pos.view;
  }
  template <class C>
  void check(C& c) {
    Tensor<F> of_y({c.H, c.M, c.D}, 0), of_b({c.H, c.M}, 0);
    of_y.random(0), of_b.random(0);
    y.each([&](int64_t, int64_t h, int64_t j, int64_t d, F& g) { of_y(h, j, d) += g; });
    log_b.each([&](int64_t, int64_t h, int64_t j, int64_t, F& g) { of_b(h, j) += g; });
    check_gradient(c, c.q, q, "stream d_query"), check_gradient(c, c.k, k, "stream d_key");
    check_gradient(c, c.v, v, "stream d_value"), check_gradient(c, c.log_a, log_a, "stream d_log_a");
    check_gradient(c, c.y, of_y, "stream d_references"), check_gradient(c, c.log_b, of_b, "stream d_log_b");
  }
};

template <class F>
void expect_near(Tensor<F>& got, const std::vector<double>& want, const char* what) {
  double error = 0, norm = 0;
  size_t n = 0;
  got.each([&](int64_t, int64_t, int64_t, int64_t, F& x) {
    if (std::isnan(want[n])) return void(++n);  // slack
    error += std::pow(x - want[n], 2), norm += std::pow(want[n], 2), ++n;
  });
  const double allowed = (sizeof(F) == 8 ? 1e-9 : 3e-3) * (std::sqrt(norm) + 1e-3);
  expect(std::sqrt(error) <= allowed, what, std::sqrt(error), allowed);
}

// Attention of every segment of a pack.
template <class F>
struct Pack : Case<F> {
  Offsets cu_q, cu_k;
  Pack(const Offsets& q, const Offsets& k, int64_t M, int64_t D, int64_t E)
      : Case<F>(false, 1, pick({1, 3}), q.rows(), k.rows(), M, D, E, pick({0, 2}), pick({0, 1, 3})), cu_q(q), cu_k(k) {}
  int64_t segments() const { return static_cast<int64_t>(cu_q.at.size()) - 1; }
  // In the order of o's elements; NaN in slack.
  std::vector<double> outputs() {
    std::vector<double> all, o;
    for (int64_t h = 0; h < this->H; ++h) {
      for (int64_t n = 0; n < segments(); ++n)
        for (int64_t i = cu_q.at[n]; i < cu_q.at[n + 1]; ++i) {
          this->attend(0, h, i, cu_k.at[n + 1] - cu_k.at[n], o, cu_k.at[n]);
          all.insert(all.end(), o.begin(), o.end());
        }
      all.resize(all.size() + (this->L - cu_q.at.back()) * this->E, std::nan(""));
    }
    return all;
  }
  double loss() {
    const std::vector<double> o = outputs();
    double sum = 0;
    size_t n = 0;
    this->w.each([&](int64_t, int64_t, int64_t, int64_t, F& w) { sum += std::isnan(o[n]) ? 0 : o[n] * w, ++n; });
    return sum;
  }
};

template <class F>
void pack_case(const KernelTable& kernels) {
  const int64_t N = pick({1, 3, 6});
  Pack<F> c(Offsets{N}, Offsets{N}, pick({1, 7, 18}), pick({1, 5, 18}), pick({1, 3, 17}));
  PackedStreamParams p;
  static_cast<AttentionParams&>(p) = c.params(static_cast<int>(pick({1, 2, 5})));
  p.N = N, p.cu_q = c.cu_q.at.data(), p.cu_k = c.cu_k.at.data();
  Tensor<F> o({1, c.H, c.L, c.E}, Case<F>::layout()), z({N, c.H, c.M, c.E}, 0),
      state({N, c.H, c.T > 1 ? c.T : 1, c.M}, 0);
  p.o = o.view, p.z = z.view, p.c = state.view;
  kernels.packed(p);
  expect_near(o, c.outputs(), "packed");
  Gradients<F> found(c, N);
  found.q.random(0), found.k.random(0), found.v.random(0), found.log_a.random(0);  // no kernel writes those of slack
  p.o = View{}, p.d_o = c.w.view;
  found.give(p);
  kernels.packed_backward(p);
  if (sizeof(F) == 8) found.check(c);
}

// A causal scan with gates that goes on from states: of B sequences, or of the segments of a pack.
template <class F>
struct Scanned : Case<F> {
  std::vector<int64_t> cu;  // of a pack; empty: of a batch
  Tensor<F> decay, initial, w_final;
  std::vector<double> exponents;  // of the final states, as the kernel chose them: constants

  Scanned(const std::vector<int64_t>& cu_, int64_t B, int64_t L, int64_t M, int64_t D, int64_t E)
      : Case<F>(true, B, pick({1, 3}), L, L, M, D, E, pick({0, 2}), pick({0, 1})),
        cu(cu_),
        decay({B, this->H, L}, Case<F>::layout()),
        initial({sequences(), this->H, M, 2 * E + 3}, 0),
        w_final({sequences(), this->H, M, 2 * E + 3}, 0) {
    decay.each([&](int64_t b, int64_t h, int64_t s, int64_t, F& x) {
      x = this->there(b, h, s) ? static_cast<F>(-std::fabs(normal())) : F(0);
    });
    initial.each([&](int64_t, int64_t, int64_t, int64_t at, F& x) {
      x = static_cast<F>(at == E           ? 1.2 + 0.6 * (rng() % 2)
                         : at == 2 * E + 2 ? static_cast<double>(rng() % 5) - 2
                         : at > E          ? 1e-9 * normal()
                                           : normal());
    });
    w_final.each([&](int64_t, int64_t, int64_t, int64_t at, F& x) { x = static_cast<F>(at > E ? 0 : normal()); });
  }
  int64_t sequences() const { return cu.empty() ? this->B : static_cast<int64_t>(cu.size()) - 1; }
  bool there(int64_t b, int64_t h, int64_t s) { return this->log_a(b, h, s) != -kInf; }

  // Σ e^ω v and Σ e^ω of each column, [M][E + 1], of a state.
  std::vector<double> sums(int64_t n, int64_t h) {
    const int64_t M = this->M, E = this->E;
    std::vector<double> found;
    for (int64_t j = 0; j < M; ++j)
      for (int64_t e = 0; e <= E; ++e) {
        const double lost = initial(n, h, j, E + 1 + e), unit = std::exp2(std::round(initial(n, h, j, 2 * E + 2)));
        found.push_back((initial(n, h, j, e) + lost) * unit);
      }
    return found;
  }
  void take(std::vector<double>& sums, int64_t b, int64_t h, int64_t s) {
    const int64_t M = this->M, E = this->E;
    std::vector<double> l(M), row(M);
    for (int64_t j = 0; j < M; ++j) {
      l[j] = this->logit(this->k, this->k_pos, b, h, s, j);
      row[j] = l[j] + this->log_b(h, j);
    }
    const double f = this->log_a(b, h, s) - (this->T ? 0.9 * lse(row) : 0), fade = std::exp(decay(b, h, s));
    for (int64_t j = 0; j < M; ++j)
      for (int64_t e = 0; e <= E; ++e) {
        double& sum = sums[j * (E + 1) + e];
        sum = sum * fade + std::exp(l[j] + f) * (e < E ? static_cast<double>(this->v(b, h, s, e)) : 1.0);
      }
  }
  void read(const std::vector<double>& sums, int64_t b, int64_t h, int64_t i, double* o) {
    const int64_t M = this->M, E = this->E;
    std::vector<double> scores(M);
    for (int64_t j = 0; j < M; ++j) {
      const double g = this->log_b(h, j) - (this->T ? 0.8 * std::log(sums[j * (E + 1) + E]) : 0);
      scores[j] = this->logit(this->q, this->q_pos, b, h, i, j) + g;
    }
    const double total = lse(scores);
    for (int64_t j = 0; j < M; ++j)
      for (int64_t e = 0; e < E; ++e)
        o[e] += std::exp(scores[j] - total) * sums[j * (E + 1) + e] / sums[j * (E + 1) + E];
  }
  // o [B][H][L][E], NaN in slack, and the sums [sequences][H][M][E + 1] after the last key.
  void run(std::vector<double>& o, std::vector<double>& last) {
    o.assign(this->B * this->H * this->L * this->E, std::nan("")), last.clear();
    for (int64_t n = 0; n < sequences(); ++n)
      for (int64_t h = 0; h < this->H; ++h) {
        const int64_t b = cu.empty() ? n : 0, end = cu.empty() ? this->L : cu[n + 1];
        std::vector<double> now = sums(n, h);
        for (int64_t i = cu.empty() ? 0 : cu[n]; i < end; ++i) {
          double* const at = o.data() + ((b * this->H + h) * this->L + i) * this->E;
          std::fill(at, at + this->E, 0.0);
          if (there(b, h, i)) take(now, b, h, i);
          read(now, b, h, i, at);
        }
        last.insert(last.end(), now.begin(), now.end());
      }
  }
  double loss() {
    std::vector<double> o, last;
    run(o, last);
    double sum = 0;
    size_t n = 0, m = 0;
    this->w.each([&](int64_t, int64_t, int64_t, int64_t, F& w) { sum += std::isnan(o[n]) ? 0 : o[n] * w, ++n; });
    w_final.each([&](int64_t, int64_t, int64_t, int64_t at, F& w) {
      if (at <= this->E) sum += w * last[m] * std::exp2(-exponents[m / (this->E + 1)]), ++m;
    });
    return sum;
  }
  // Keeps the exponents of final states, and compares their sums with `last`.
  void keep(Tensor<F>& state, const std::vector<double>& last, const char* what) {
    exponents.clear();
    const int64_t E = this->E;
    double error = 0, norm = 0;
    for (int64_t row = 0; row < sequences() * this->H * this->M; ++row) {
      const F* const at = state.memory.get() + row * (2 * E + 3);
      exponents.push_back(at[2 * E + 2]);
      for (int64_t e = 0; e <= E; ++e) {
        const double unit = std::exp2(-exponents.back()), want = last[row * (E + 1) + e] * unit;
        error += std::pow(static_cast<double>(at[e]) + at[E + 1 + e] - want, 2), norm += want * want;
      }
    }
    const double allowed = (sizeof(F) == 8 ? 1e-9 : 3e-3) * (std::sqrt(norm) + 1e-3);
    expect(std::sqrt(error) <= allowed, what, std::sqrt(error), allowed);
  }
};

// Rows first..last of a tensor of tokens.
inline View some_rows(View v, int64_t first, int64_t last, int64_t size) {
  if (v) v.data = static_cast<char*>(v.data) + first * v.stride[2] * size, v.size[2] = last - first;
  return v;
}
template <class F>
AttentionParams some_rows(AttentionParams p, int64_t first, int64_t last) {
  p.L = p.S = last - first;
  for (View* v : {&p.query, &p.key, &p.value, &p.log_a, &p.query_pos, &p.key_pos, &p.o})
    *v = some_rows(*v, first, last, sizeof(F));
  return p;
}

// All tokens but the last few in two pieces, those one by one, on states that stand in any order among others.
template <class F>
void streamed(const KernelTable& kernels, Scanned<F>& c, const CausalParams& whole, const std::vector<double>& want,
              const std::vector<double>& last) {
  const int64_t B = c.B, steps = std::min<int64_t>(c.L, 3), cut = (c.L - steps) / 2, width = 2 * c.E + 3;
  Tensor<F> o({B, c.H, c.L, c.E}, Case<F>::layout()), first({B, c.H, c.M, width}, 0), state({B, c.H, c.M, width}, 0);
  AttentionParams all = whole;
  all.o = o.view;
  const auto piece = [&](int64_t from, int64_t to, const View& before, const View& after) {
    CausalParams p(some_rows<F>(all, from, to));
    p.log_decay = some_rows(c.decay.view, from, to, sizeof(F)), p.initial = before, p.final_state = after;
    kernels.causal(p);
  };
  piece(0, cut, c.initial.view, first.view), piece(cut, c.L - steps, first.view, state.view);
  Tensor<F> pool({B + 2, c.H, c.M, width}, 0);
  std::vector<int32_t> rows;
  for (int64_t b = 0; b < B; ++b) rows.push_back(static_cast<int32_t>(B + 1 - b));
  state.each([&](int64_t b, int64_t h, int64_t j, int64_t e, F& x) { pool(rows[b], h, j, e) = x; });
  for (int64_t i = c.L - steps; i < c.L; ++i) {
    StepParams p(some_rows<F>(all, i, i + 1));
    p.log_decay = some_rows(c.decay.view, i, i + 1, sizeof(F)), p.states = pool.view, p.rows = rows.data();
    kernels.step(p);
  }
  expect_near(o, want, "pieces and steps");
  state.each([&](int64_t b, int64_t h, int64_t j, int64_t e, F& x) { x = pool(rows[b], h, j, e); });
  c.keep(state, last, "state after steps");
  StepParams none(some_rows<F>(all, 0, 1));
  std::fill(rows.begin(), rows.end(), -1);
  none.states = pool.view, none.rows = rows.data();
  kernels.step(none);
  for (int64_t b = 0; b < B; ++b) expect(o(b, 0, 0, 0) == F(0), "step of no state", o(b, 0, 0, 0), 0);
}

template <class F>
void stream_case(const KernelTable& kernels, bool packed) {
  const std::vector<int64_t> cu = packed ? Offsets(pick({1, 3, 6})).at : std::vector<int64_t>{};
  const int64_t L = packed ? cu.back() + pick({0, 3}) : pick({1, 5, 60, 100});
  Scanned<F> c(cu, packed ? 1 : pick({1, 2}), L, pick({1, 7, 18, 33}), pick({1, 5, 18}), pick({1, 3, 17}));
  const int64_t N = c.sequences();
  CausalParams dense(c.params(static_cast<int>(pick({1, 2, 5}))));
  Tensor<F> o({c.B, c.H, L, c.E}, Case<F>::layout()), state({N, c.H, c.M, 2 * c.E + 3}, 0),
      d_decay({c.B, c.H, L}, Case<F>::layout()), d_initial({N, c.H, c.M, 2 * c.E + 3}, 0);
  dense.o = o.view, dense.log_decay = c.decay.view, dense.initial = c.initial.view, dense.final_state = state.view;
  PackedStreamParams pack;
  const auto call = [&](bool backward) {
    if (!packed) return backward ? kernels.causal_backward(dense) : kernels.causal(dense);
    static_cast<AttentionParams&>(pack) = dense, static_cast<StreamViews&>(pack) = dense;
    pack.N = N, pack.cu_q = pack.cu_k = c.cu.data(), pack.causal = true;
    backward ? kernels.packed_backward(pack) : kernels.packed(pack);
  };
  call(false);
  std::vector<double> want, last;
  c.run(want, last);
  expect_near(o, want, packed ? "packed scan" : "scan from a state");
  c.keep(state, last, "final state");
  Gradients<F> found(c, N);
  found.q.random(0), found.k.random(0), found.v.random(0), found.log_a.random(0), d_decay.random(0);
  dense.o = dense.final_state = View{};
  dense.d_o = c.w.view, dense.d_final = c.w_final.view, dense.d_log_decay = d_decay.view;
  dense.d_initial = d_initial.view;
  found.give(dense);
  call(true);
  d_decay.each([&](int64_t b, int64_t h, int64_t s, int64_t, F& g) { g = c.there(b, h, s) ? g : F(0); });
  if (sizeof(F) == 8) {
    found.check(c);
    check_gradient(c, c.decay, d_decay, "d_log_decay"), check_gradient(c, c.initial, d_initial, "d_initial");
  }
  if (!packed) streamed(kernels, c, CausalParams(c.params(dense.threads)), want, last);
}

}  // namespace
}  // namespace sfk
