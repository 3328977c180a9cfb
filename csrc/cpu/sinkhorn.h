// Sinkhorn on any log-kernel [G,N,M], forward and backward: the transport of transport.h with given rows and no values.
#pragma once
#include "../linearised_params.h"
#include "base/denormals.h"
#include "transport_backward.h"

namespace sfk {
namespace {

// Rows of a tile: 64 KB of numbers, so that it stays in the second-level cache however many columns there are.
inline int64_t sinkhorn_rows(int64_t Mp) { return std::min<int64_t>(96, std::max<int64_t>(16, 16384 / Mp / 16 * 16)); }

// Rows lo.. of problem g.
template <class F>
struct MatrixSource {
  const SinkhornParams& p;
  int64_t Mp, g = 0, lo = 0;
  F* la = nullptr;

  explicit MatrixSource(const SinkhornParams& p_) : p(p_), Mp(pad<F>(p_.M)) {}
  // A row that is −inf throughout takes no part: its mass goes, and its content is not looked at again.
  void logits(int64_t row0, int64_t n, F* tile) {
    const View& v = p.log_kernel;
    for (int64_t i = 0; i < n; ++i, tile += Mp) {
      load_row<F>(v, g * v.stride[0] + (lo + row0 + i) * v.stride[1], v.stride[2], p.M, tile);
      fill(tile + p.M, Mp - p.M, F(0));
      if (tile[0] != -kInf<F>) continue;
      int64_t j = 1;
      while (j < p.M && tile[j] == -kInf<F>) ++j;
      if (j < p.M) continue;
      la[row0 + i] = -kInf<F>;
      fill(tile, Mp, F(0));
    }
  }
  static constexpr bool near() { return false; }
  static constexpr F middle() { return 0; }
  static constexpr F least_power() { return 0; }
  void weights(int64_t, int64_t, F*, const F*, F*) {}
  Rows<F> values(int64_t, int64_t, F*) { return {}; }
  Ahead values_ahead(int64_t, int64_t) const { return {}; }
  bool wants_f() const { return bool(p.f); }
  void store_f(int64_t row0, int64_t n, const F* f) {
    F* out = static_cast<F*>(p.f.data) + g * p.f.stride[0];
    for (int64_t i = 0; i < n; ++i) out[(lo + row0 + i) * p.f.stride[1]] = f[i];
  }
  static constexpr bool is_result = true;
  void restart() {}
  void d_f(int64_t row0, int64_t n, F* df) {
    for (int64_t i = 0; i < n; ++i) df[i] += element<F>(p.d_f, g, lo + row0 + i);
  }
  Place<F> place_dv(int64_t, F*) { return {nullptr, 0}; }
  void store_dv(int64_t, int64_t, Place<F>, const F*) {}
  void accept(int64_t row0, int64_t n, const F* dl, const F*) {
    const View& v = p.d_log_kernel;
    for (int64_t i = 0; v && i < n; ++i)
      store_row<F>(v, g * v.stride[0] + (lo + row0 + i) * v.stride[1], v.stride[2], p.M, dl + i * Mp);
  }
};

// Masses and relaxations of problem g.
template <class F>
struct Masses {
  Buffer<F> log_b;
  Marginals<F> marg;
  explicit Masses(const SinkhornParams& p) : log_b(pad<F>(p.M)) {}
  void load(const SinkhornParams& p, int64_t g, int64_t T, int64_t lo, int64_t hi, F* la) {
    const F row = -std::log(static_cast<F>(p.N)), col = -std::log(static_cast<F>(p.M));
    for (int64_t i = lo; i < hi; ++i) la[i - lo] = p.log_a ? element<F>(p.log_a, g, i) : row;
    fill(log_b.data(), pad<F>(p.M), -kInf<F>);
    for (int64_t j = 0; j < p.M; ++j) log_b[j] = p.log_b ? element<F>(p.log_b, g, j) : col;
    const F a = p.lam_a ? element<F>(p.lam_a, g, 0) : static_cast<F>(p.scalars[0]);
    const F b = p.lam_b ? element<F>(p.lam_b, g, 0) : static_cast<F>(p.scalars[1]);
    marg = {p.M, pad<F>(p.M), T, a, b, log_b};
  }
};

template <class F>
class SinkhornWorker {
 public:
  SinkhornWorker(const StartedParams& p, int threads)
      : p_(p),
        source_(p),
        masses_(p),
        start_(pad<F>(p.M)),
        rows_(sinkhorn_rows(pad<F>(p.M))),
        transport_(p.N, p.G < threads ? p.N / threads + 2 * rows_ : p.N + rows_, rows_, pad<F>(p.M), 0, p.T) {}
  ColumnState<F>& shared() { return transport_.state; }

  void run(int64_t g, const Team& team) {
    const NoDenormals guard;
    const int64_t Mp = pad<F>(p_.M);
    const auto [lo, hi] = team.share(p_.N, rows_);
    source_.g = g, source_.lo = lo, source_.la = transport_.la;
    masses_.load(p_, g, p_.T, lo, hi, transport_.la);
    if (p_.start) start_from(g);
    const int64_t iters = transport_.run(source_, masses_.marg, hi - lo, p_.tol, team);
    if (team.rank != 0) return;
    p_.iters[g] = iters;
    F* out_g = static_cast<F*>(p_.g.data) + g * p_.g.stride[0];
    for (int64_t j = 0; j < p_.M; ++j) out_g[j * p_.g.stride[1]] = transport_.g[j];
    F* out_c = static_cast<F*>(p_.c.data) + g * p_.c.stride[0];
    const int64_t last = std::max<int64_t>(iters, 1) - 1;
    const bool all = p_.c.stride[1] != 0;  // else the last alone is wanted
    for (int64_t t = all ? 0 : last; t < (all ? p_.c.size[1] : last + 1); ++t) {
      const F* c = transport_.c + std::min(t, last) * Mp;  // rows past the last iteration repeat it
      for (int64_t j = 0; j < p_.M; ++j) out_c[t * p_.c.stride[1] + j * p_.c.stride[2]] = c[j];
    }
  }

 private:
  void start_from(int64_t g) {
    for (int64_t j = 0; j < pad<F>(p_.M); ++j) {
      const F b = masses_.log_b[j], given = j < p_.M ? element<F>(p_.start, g, j) : b;
      start_[j] = std::isfinite(given) && b != -kInf<F> ? given : b;
    }
    masses_.marg.start = start_;
  }

  const StartedParams& p_;
  MatrixSource<F> source_;
  Masses<F> masses_;
  Buffer<F> start_;  // [Mp]
  int64_t rows_;
  Transport<F, MatrixSource<F>> transport_;
};

template <class F>
class SinkhornBackwardWorker {
 public:
  struct Shared {
    typename TransportBackward<F, MatrixSource<F>>::Shared transport;
    double d_lam_a;
  };

  SinkhornBackwardWorker(const SinkhornParams& p, int)
      : p_(p),
        source_(p),
        masses_(p),
        rows_(sinkhorn_rows(pad<F>(p.M))),
        transport_(p.N, rows_, pad<F>(p.M), 0, p.c.size[1]) {}
  Shared& shared() { return shared_; }

  void run(int64_t g, const Team& team) {
    const NoDenormals guard;
    const int64_t Mp = pad<F>(p_.M), T = std::min(p_.iters[g], p_.T);
    const auto [lo, hi] = team.share(p_.N, rows_);
    source_.g = g, source_.lo = lo, source_.la = transport_.given.la;
    masses_.load(p_, g, T, lo, hi, transport_.given.la);
    for (int64_t t = 0; t < std::max<int64_t>(T, 1); ++t)
      for (int64_t j = 0; j < Mp; ++j) {
        const int64_t at = g * p_.c.stride[0] + t * p_.c.stride[1] + j * p_.c.stride[2];
        transport_.given.c[t * Mp + j] = j < p_.M ? static_cast<const F*>(p_.c.data)[at] : -kInf<F>;
        transport_.given.d_c[t * Mp + j] = 0;
      }
    for (int64_t j = 0; j < Mp; ++j) transport_.given.dg[j] = j < p_.M ? element<F>(p_.d_g, g, j) : F(0);
    std::vector<const typename TransportBackward<F, MatrixSource<F>>::Shared*> members;
    for (int i = 0; i < team.size; ++i) members.push_back(&team.template member<Shared>(i).transport);
    transport_.run(source_, masses_.marg, hi - lo, team, shared_.transport, members.data());
    shared_.d_lam_a = transport_.gradients.d_lam_a;
    store(g, lo, hi, team);
  }

 private:
  void store(int64_t g, int64_t lo, int64_t hi, const Team& team) {
    F* d_log_a = static_cast<F*>(p_.d_log_a.data) + g * p_.d_log_a.stride[0];
    for (int64_t i = lo; p_.d_log_a && i < hi; ++i)
      d_log_a[i * p_.d_log_a.stride[1]] = transport_.gradients.d_la[i - lo];
    F* d_log_b = static_cast<F*>(p_.d_log_b.data) + g * p_.d_log_b.stride[0];
    for (int64_t j = 0; p_.d_log_b && team.rank == 0 && j < p_.M; ++j)
      d_log_b[j * p_.d_log_b.stride[1]] = transport_.gradients.d_log_b[j];
    team.sync();
    if (team.rank == 0 && p_.d_lam) {
      double d_lam_a = 0;
      for (int i = 0; i < team.size; ++i) d_lam_a += team.template member<Shared>(i).d_lam_a;
      F* d_lam = static_cast<F*>(p_.d_lam.data) + g * p_.d_lam.stride[0];
      d_lam[0] = static_cast<F>(d_lam_a);
      d_lam[p_.d_lam.stride[1]] = static_cast<F>(transport_.gradients.d_lam_b);
    }
    team.sync();
  }

  const SinkhornParams& p_;
  MatrixSource<F> source_;
  Masses<F> masses_;
  int64_t rows_;
  TransportBackward<F, MatrixSource<F>> transport_;
  Shared shared_;
};

template <class Worker, class Params>
void run_sinkhorn(const Params& p) {
  if (p.G == 0) return;
  const double flops = 8.0 * p.G * static_cast<double>(p.N) * p.M * (p.T + 4);
  std::vector<std::unique_ptr<Worker>> workers;
  const int threads = useful_threads(p.threads, flops);
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<Worker>(p, threads));
  run_team(workers, p.G);
}

template <class F>
void started_forward(const StartedParams& p) {
  run_sinkhorn<SinkhornWorker<F>>(p);
}
template <class F>
void sinkhorn_forward(const SinkhornParams& p) {
  started_forward<F>({p, {}});
}
template <class F>
void sinkhorn_backward(const SinkhornParams& p) {
  run_sinkhorn<SinkhornBackwardWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
