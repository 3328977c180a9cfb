// Runs a table of kernels over ragged sizes and odd strides, so that a sanitizer sees any access outside; compares
// results with plain loops in double, and gradients in double with central differences of those loops.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../cpu/isa/table.h"
#include "tensors.h"

namespace sfk {
namespace {

template <class F>
struct Case {
  int64_t B, H, L, S, M, D, E, P, T;
  bool causal;
  Tensor<F> q, k, v, y, log_a, log_b, q_pos, k_pos, y_pos, w;
  double eps;
  KernelKind kind;

  static int layout() { return static_cast<int>(rng() % 4); }
  Case(bool causal_, int64_t B_, int64_t H_, int64_t L_, int64_t S_, int64_t M_, int64_t D_, int64_t E_, int64_t P_,
       int64_t T_)
      : B(B_),
        H(H_),
        L(L_),
        S(S_),
        M(M_),
        D(D_),
        E(E_),
        P(P_),
        T(T_),
        causal(causal_),
        q({B, H, L, D}, layout()),
        k({B, H, S, D}, layout()),
        v({B, H, S, E}, layout()),
        y({H, M, D}, layout()),
        log_a({B, H, S}, layout()),
        log_b({H, M}, layout()),
        q_pos({B, H, L, P}, layout()),
        k_pos({B, H, S, P}, layout()),
        y_pos({H, M, P}, layout()),
        w({B, H, L, E}, layout()),
        eps(pick({1, 10, 100}) * 0.005),
        kind(rng() % 4 ? KernelKind::rbf : KernelKind::dot) {
    q.random(kind == KernelKind::dot ? 0.2 : 1), k.random(kind == KernelKind::dot ? 0.2 : 1);
    v.random(), y.random(), w.random(), log_b.random(0.5), log_a.random();
    q_pos.random(), k_pos.random(), y_pos.random();
    log_a.each([&](int64_t b, int64_t h, int64_t s, int64_t, F& x) {
      if (s % 5 != 2) return;
      x = static_cast<F>(-kInf);
      for (int64_t d = 0; d < D; ++d) k(b, h, s, d) = static_cast<F>(std::nan(""));
      for (int64_t e = 0; e < E; ++e) v(b, h, s, e) = static_cast<F>(kInf);
    });
  }

  double logit(Tensor<F>& x, Tensor<F>& pos, int64_t b, int64_t h, int64_t i, int64_t j) {
    double dot = 0, xx = 0, yy = 0, away = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double a = x(b, h, i, d), c = y(h, j, d);
      dot += a * c, xx += a * a, yy += c * c;
    }
    const double kappa = kind == KernelKind::dot ? dot : std::exp(1.0 * (dot / std::sqrt(xx * yy) - 1));
    for (int64_t c = 0; c < P; ++c) away += std::pow(pos(b, h, i, c) - y_pos(h, j, c), 2);
    return (kappa - 1) / eps - 0.49 * away;
  }

  // o_i over `count` keys from `first` on; false where there is none.
  bool attend(int64_t b, int64_t h, int64_t i, int64_t count, std::vector<double>& o, int64_t first = 0) {
    std::vector<double> g(M), f(count, 0.0), c(M), scores(M);
    std::vector<std::vector<double>> l(count, std::vector<double>(M, 0.0));
    bool any = false;
    for (int64_t s = 0; s < count; ++s) {
      f[s] = log_a(b, h, first + s);
      if (f[s] == -kInf) continue;
      any = true;
      for (int64_t j = 0; j < M; ++j) l[s][j] = logit(k, k_pos, b, h, first + s, j);
    }
    o.assign(E, 0.0);
    if (!any) return false;
    for (int64_t j = 0; j < M; ++j) g[j] = log_b(h, j);
    for (int64_t t = 0; t <= T; ++t) {
      for (int64_t s = 0; t > 0 && s < count; ++s) {
        std::vector<double> row(M);
        for (int64_t j = 0; j < M; ++j) row[j] = l[s][j] + g[j];
        f[s] = static_cast<double>(log_a(b, h, first + s)) - 0.9 * lse(row);
      }
      for (int64_t j = 0; j < M; ++j) {
        std::vector<double> column(count);
        for (int64_t s = 0; s < count; ++s) column[s] = l[s][j] + f[s];
        c[j] = lse(column);
        if (t > 0) g[j] = static_cast<double>(log_b(h, j)) - 0.8 * c[j];
      }
    }
    for (int64_t j = 0; j < M; ++j) scores[j] = logit(q, q_pos, b, h, i, j) + g[j];
    const double total = lse(scores);
    for (int64_t j = 0; j < M; ++j)
      for (int64_t s = 0; s < count; ++s) {
        const double a = std::exp(scores[j] - total + l[s][j] + f[s] - c[j]);
        for (int64_t e = 0; e < E && f[s] != -kInf; ++e) o[e] += a * v(b, h, first + s, e);
      }
    return true;
  }

  double loss() {
    double sum = 0;
    std::vector<double> o;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < L; ++i) {
          attend(b, h, i, causal ? i + 1 : S, o);
          for (int64_t e = 0; e < E; ++e) sum += o[e] * w(b, h, i, e);
        }
    return sum;
  }

  AttentionParams params(int threads) {
    AttentionParams p;
    p.B = B, p.H = H, p.L = L, p.S = S, p.M = M, p.D = D, p.E = E, p.P = P, p.T = T, p.kernel = kind;
    const double scalars[] = {1.0, eps, 0.9, 0.8, 0.7};
    std::copy(scalars, scalars + kNumHyper, p.scalars);
    p.threads = threads, p.f64 = sizeof(F) == 8;
    p.query = q.view, p.key = k.view, p.value = v.view, p.references = y.view;
    p.log_a = log_a.view, p.log_b = log_b.view;
    if (P) p.query_pos = q_pos.view, p.key_pos = k_pos.view, p.ref_pos = y_pos.view;
    return p;
  }
};

// W^q W^kᵀ v = o, of a backend that writes the factors.
template <class F>
void check_factors(Case<F>& c, Tensor<F>& w_q, Tensor<F>& w_k, Tensor<F>& o, double allowed) {
  double error = 0;
  o.each([&](int64_t b, int64_t h, int64_t i, int64_t e, F& want) {
    double got = 0;
    for (int64_t s = 0; s < c.S; ++s)
      for (int64_t j = 0; j < c.M && c.log_a(b, h, s) != -kInf; ++j)
        got += static_cast<double>(w_q(b, h, i, j)) * w_k(b, h, s, j) * c.v(b, h, s, e);
    error += std::pow(got - want, 2);
  });
  expect(std::sqrt(error) <= allowed, "factors", error, allowed);
}

template <class F>
void attention_case(const KernelTable& kernels, bool causal, bool factors = false) {
  const int64_t L = pick({1, 5, 60, 100}), S = causal ? L : pick({1, 7, 97});
  Case<F> c(causal, pick({1, 2}), pick({1, 3}), L, S, pick({1, 7, 18, 33}), pick({1, 5, 18}), pick({1, 3, 17}),
            pick({0, 2}), causal ? pick({0, 1}) : pick({0, 1, 3}));
  const int threads = static_cast<int>(pick({1, 2, 5}));
  AttentionParams p = c.params(threads);
  Tensor<F> o({c.B, c.H, c.L, c.E}, Case<F>::layout()), z({c.B, c.H, c.M, c.E}, 0),
      state({c.B, c.H, c.T > 1 ? c.T : 1, c.M}, 0);
  p.o = o.view, p.z = z.view, p.c = state.view;
  Tensor<F> w_q({c.B, c.H, c.L, c.M}, Case<F>::layout()), w_k({c.B, c.H, c.S, c.M}, Case<F>::layout());
  if (factors) p.w_q = w_q.view, p.w_k = w_k.view;
  causal ? kernels.causal(CausalParams(p)) : kernels.attention(p);
  std::vector<double> want;
  double error = 0, norm = 0;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h)
      for (int64_t i = 0; i < c.L; ++i) {
        c.attend(b, h, i, causal ? i + 1 : c.S, want);
        for (int64_t e = 0; e < c.E; ++e) {
          error += std::pow(o(b, h, i, e) - want[e], 2);
          norm += std::pow(want[e], 2);
        }
      }
  const double tolerance = sizeof(F) == 8 ? 1e-10 : 2e-3;
  expect(std::sqrt(error) <= tolerance * (std::sqrt(norm) + 1e-3), causal ? "causal" : "attention", error, norm);
  if (factors) check_factors(c, w_q, w_k, o, tolerance * (std::sqrt(norm) + 1e-3));
  p.w_q = p.w_k = View{};
  p.o = View{};
  p.d_o = c.w.view;
  Tensor<F> d_q({c.B, c.H, c.L, c.D}, Case<F>::layout()), d_k({c.B, c.H, c.S, c.D}, Case<F>::layout()),
      d_v({c.B, c.H, c.S, c.E}, Case<F>::layout()), d_a({c.B, c.H, c.S}, 0), d_y({c.B, c.H, c.M, c.D}, 0),
      d_b({c.B, c.H, c.M, 1}, 0), d_hyper({c.B, c.H, int64_t(kNumHyper), 1}, 0), d_pos({c.B, c.H, c.M, c.P}, 0);
  p.d_query = d_q.view, p.d_key = d_k.view, p.d_value = d_v.view, p.d_log_a = d_a.view, p.d_references = d_y.view;
  p.d_log_b = d_b.view, p.d_hyper = d_hyper.view;
  if (c.P) p.d_ref_pos = d_pos.view;
  causal ? kernels.causal_backward(CausalParams(p)) : kernels.attention_backward(p);
  if (sizeof(F) == 4) return;
  Tensor<F> y_grad({c.H, c.M, c.D}, 0), b_grad({c.H, c.M}, 0);
  y_grad.random(0), b_grad.random(0);
  d_y.each([&](int64_t, int64_t h, int64_t j, int64_t d, F& g) { y_grad(h, j, d) += g; });
  d_b.each([&](int64_t, int64_t h, int64_t j, int64_t, F& g) { b_grad(h, j) += g; });
  check_gradient(c, c.q, d_q, "d_query"), check_gradient(c, c.k, d_k, "d_key"), check_gradient(c, c.v, d_v, "d_value");
  check_gradient(c, c.log_a, d_a, "d_log_a"), check_gradient(c, c.y, y_grad, "d_references");
  check_gradient(c, c.log_b, b_grad, "d_log_b");
}

// Attention of bfloat16 tokens, whose rounding the loops see too.
void rounded_case(const KernelTable& kernels) {
  const int64_t S = pick({1, 7, 64, 97, 200});
  Case<float> c(false, pick({1, 2}), pick({1, 3}), pick({1, 5, 64, 100}), S, pick({1, 7, 18, 33, 64}),
                pick({1, 5, 18, 64}), pick({1, 3, 17, 48}), 0, pick({0, 1, 3}));
  Tensor<Rounded> q({c.B, c.H, c.L, c.D}, Case<float>::layout()), k({c.B, c.H, c.S, c.D}, Case<float>::layout()),
      v({c.B, c.H, c.S, c.E}, Case<float>::layout()), o({c.B, c.H, c.L, c.E}, Case<float>::layout());
  const auto round = [](Tensor<float>& exact, Tensor<Rounded>& to) {
    exact.each([&](int64_t b, int64_t h, int64_t i, int64_t d, float& x) {
      to(b, h, i, d) = Rounded(x);
      x = to(b, h, i, d);
    });
  };
  round(c.q, q), round(c.k, k), round(c.v, v);
  Tensor<float> z({c.B, c.H, c.M, c.E}, 0), state({c.B, c.H, c.T > 1 ? c.T : 1, c.M}, 0);
  AttentionParams p = c.params(static_cast<int>(pick({1, 2, 5})));
  p.query = q.view, p.key = k.view, p.value = v.view, p.o = o.view, p.z = z.view, p.c = state.view;
  kernels.attention(p);
  std::vector<double> want;
  double error = 0, norm = 0;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t h = 0; h < c.H; ++h)
      for (int64_t i = 0; i < c.L; ++i) {
        c.attend(b, h, i, S, want);
        for (int64_t e = 0; e < c.E; ++e) {
          error += std::pow(static_cast<double>(o(b, h, i, e)) - want[e], 2);
          norm += std::pow(want[e], 2);
        }
      }
  expect(std::sqrt(error) <= 2e-2 * (std::sqrt(norm) + 1e-3), "attention of bfloat16", error, norm);
}

template <class F>
struct Features {
  int64_t B, H, N, D, R;
  Tensor<F> x, landmarks, whitening, w;
  Features(int64_t B_, int64_t H_, int64_t N_, int64_t D_, int64_t R_)
      : B(B_),
        H(H_),
        N(N_),
        D(D_),
        R(R_),
        x({B, H, N, D}, Case<F>::layout()),
        landmarks({H, R, D}, Case<F>::layout()),
        whitening({H, R, R}, 0),
        w({B, H, N, R}, Case<F>::layout()) {
    x.random(), landmarks.random(), whitening.random(), w.random();
  }
  double psi(int64_t b, int64_t h, int64_t i, int64_t r) {
    double sum = 0, xx = 0;
    for (int64_t d = 0; d < D; ++d) xx += std::pow(x(b, h, i, d), 2);
    for (int64_t k = 0; k < R; ++k) {
      double dot = 0, yy = 0;
      for (int64_t d = 0; d < D; ++d) dot += x(b, h, i, d) * landmarks(h, k, d), yy += std::pow(landmarks(h, k, d), 2);
      sum += std::exp(1.3 * (dot / std::sqrt(xx * yy) - 1)) * whitening(h, k, r);
    }
    return std::sqrt(xx) * sum;
  }
  double loss() {
    double sum = 0;
    w.each([&](int64_t b, int64_t h, int64_t i, int64_t r, F& weight) { sum += weight * psi(b, h, i, r); });
    return sum;
  }
};

template <class F>
void features_case(const KernelTable& kernels) {
  Features<F> c(pick({1, 2}), pick({1, 3}), pick({1, 5, 97, 200}), pick({2, 5, 18}), pick({1, 7, 33}));
  FeatureParams p;
  p.B = c.B, p.H = c.H, p.N = c.N, p.D = c.D, p.R = c.R, p.bandwidth = 1.3, p.f64 = sizeof(F) == 8;
  p.threads = static_cast<int>(pick({1, 2, 5}));
  Tensor<F> psi({c.B, c.H, c.N, c.R}, Case<F>::layout());
  p.x = c.x.view, p.landmarks = c.landmarks.view, p.whitening = c.whitening.view, p.psi = psi.view;
  kernels.features(p);
  psi.each([&](int64_t b, int64_t h, int64_t i, int64_t r, F& got) {
    const double want = c.psi(b, h, i, r);
    expect(std::fabs(got - want) <= (sizeof(F) == 8 ? 1e-10 : 1e-4) * (1 + std::fabs(want)), "features", got, want);
  });
  Tensor<F> d_x({c.B, c.H, c.N, c.D}, Case<F>::layout()), d_w({c.B, c.H, c.R, c.D}, 0), d_beta({c.B, c.H, 1, 1}, 0),
      d_whitening({c.B, c.H, c.R, c.R}, 0);
  p.psi = View{};
  p.d_psi = c.w.view, p.d_x = d_x.view, p.d_landmarks = d_w.view, p.d_bandwidth = d_beta.view;
  p.d_whitening = d_whitening.view;
  kernels.features_backward(p);
  if (sizeof(F) == 4) return;
  Tensor<F> w_grad({c.H, c.R, c.D}, 0), whitening_grad({c.H, c.R, c.R}, 0);
  w_grad.random(0), whitening_grad.random(0);
  d_w.each([&](int64_t, int64_t h, int64_t j, int64_t d, F& g) { w_grad(h, j, d) += g; });
  d_whitening.each([&](int64_t, int64_t h, int64_t j, int64_t d, F& g) { whitening_grad(h, j, d) += g; });
  check_gradient(c, c.x, d_x, "features d_x"), check_gradient(c, c.landmarks, w_grad, "d_landmarks");
  check_gradient(c, c.whitening, whitening_grad, "d_whitening");
}

template <class F>
struct Sinkhorn {
  int64_t G, N, M, T;
  Tensor<F> l, log_a, log_b, w_f, w_g, start;
  bool started = false;
  Sinkhorn(int64_t G_, int64_t N_, int64_t M_, int64_t T_)
      : G(G_),
        N(N_),
        M(M_),
        T(T_),
        l({G, N, M}, Case<F>::layout()),
        log_a({G, N}, Case<F>::layout()),
        log_b({G, M}, Case<F>::layout()),
        w_f({G, N}, 0),
        w_g({G, M}, 0),
        start({G, M}, Case<F>::layout()) {
    start.random();
    l.random(static_cast<double>(pick({1, 60}))), log_a.random(), log_b.random(), w_f.random(), w_g.random();
  }
  void solve(int64_t at, std::vector<double>& f, std::vector<double>& g) {
    f.resize(N), g.resize(M);
    for (int64_t i = 0; i < N; ++i) f[i] = log_a(at, i);
    for (int64_t j = 0; j < M; ++j) g[j] = started ? start(at, j) : log_b(at, j);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = 0; i < N; ++i) {
        std::vector<double> row(M);
        for (int64_t j = 0; j < M; ++j) row[j] = l(at, i, j) + g[j];
        f[i] = static_cast<double>(log_a(at, i)) - 0.9 * lse(row);
      }
      for (int64_t j = 0; j < M; ++j) {
        std::vector<double> column(N);
        for (int64_t i = 0; i < N; ++i) column[i] = l(at, i, j) + f[i];
        g[j] = static_cast<double>(log_b(at, j)) - 0.8 * lse(column);
      }
    }
  }
  double loss() {
    double sum = 0;
    std::vector<double> f, g;
    for (int64_t at = 0; at < G; ++at) {
      solve(at, f, g);
      for (int64_t i = 0; i < N; ++i) sum += f[i] * w_f(at, i);
      for (int64_t j = 0; j < M; ++j) sum += g[j] * w_g(at, j);
    }
    return sum;
  }
};

template <class F>
void sinkhorn_case(const KernelTable& kernels) {
  Sinkhorn<F> c(pick({1, 2, 5}), pick({1, 9, 97, 130}), pick({1, 7, 33, 100}), pick({0, 1, 4}));
  Tensor<F> f({c.G, c.N}, Case<F>::layout()), g({c.G, c.M}, Case<F>::layout()), state({c.G, c.T > 1 ? c.T : 1, c.M}, 0),
      d_l({c.G, c.N, c.M}, Case<F>::layout()), d_a({c.G, c.N}, 0), d_b({c.G, c.M}, 0), d_lam({c.G, 2}, 0);
  std::unique_ptr<int64_t[]> iters(new int64_t[c.G]);
  SinkhornParams p;
  p.G = c.G, p.N = c.N, p.M = c.M, p.T = c.T, p.scalars[0] = 0.9, p.scalars[1] = 0.8, p.f64 = sizeof(F) == 8;
  p.threads = static_cast<int>(pick({1, 2, 7}));
  p.log_kernel = c.l.view, p.log_a = c.log_a.view, p.log_b = c.log_b.view;
  p.f = f.view, p.g = g.view, p.c = state.view, p.iters = iters.get();
  c.started = kernels.started && rng() % 2;
  StartedParams from{p};
  from.start = c.start.view;
  c.started ? kernels.started(from) : kernels.sinkhorn(p);
  std::vector<double> want_f, want_g;
  const double tolerance = sizeof(F) == 8 ? 1e-10 : 1e-4;
  for (int64_t at = 0; at < c.G; ++at) {
    c.solve(at, want_f, want_g);
    for (int64_t i = 0; i < c.N; ++i)
      expect(std::fabs(f(at, i) - want_f[i]) <= tolerance * (1 + std::fabs(want_f[i])), "sinkhorn f", f(at, i),
             want_f[i]);
    for (int64_t j = 0; j < c.M; ++j)
      expect(std::fabs(g(at, j) - want_g[j]) <= tolerance * (1 + std::fabs(want_g[j])), "sinkhorn g", g(at, j),
             want_g[j]);
  }
  if (c.started) return;
  p.f = View{}, p.g = View{};
  p.d_f = c.w_f.view, p.d_g = c.w_g.view, p.d_log_kernel = d_l.view, p.d_log_a = d_a.view, p.d_log_b = d_b.view;
  p.d_lam = d_lam.view;
  kernels.sinkhorn_backward(p);
  if (sizeof(F) == 4) return;
  check_gradient(c, c.l, d_l, "d_log_kernel"), check_gradient(c, c.log_a, d_a, "sinkhorn d_log_a");
  check_gradient(c, c.log_b, d_b, "sinkhorn d_log_b");
}

}  // namespace
}  // namespace sfk
