// One pass over the rows from potentials g, for Newton's step and the gradient of the fixed point:
//
//   s_i = LSE_j(ℓ_ij + g_j)   f_i = log a_i − λ_a s_i   R_ij = e^{ℓ_ij + g_j − s_i}   P = diag(e^{f + s}) R
//   c_j = LSE_i(ℓ_ij + f_i)   D_j = Σ_i P_ij            A = PᵀR = XᵀX, X = diag(e^{(f + s)/2}) R
//
// A block of rows is read once: its R and its part of D and A follow from it.  c is log D − g, but where D is no
// ordinary number: there a second pass takes log sums of the columns.
#pragma once
#include "../linearised_params.h"
#include "base/denormals.h"
#include "transport.h"

namespace sfk {
namespace {

// Rows of a tile: a product of fewer would spend its time on loading and storing A.
inline int64_t linearised_rows(int64_t Mp) { return Mp <= 256 ? 96 : 64; }

template <class F>
class LinearisedWorker {
 public:
  struct Shared {
    Buffer<F> mass, gram, top, sum;  // [Mp] [M][Mp]; of log sums, [Mp] each
  };

  LinearisedWorker(const LinearisedParams& p, int)
      : p_(p),
        Mp_(pad<F>(p.M)),
        rows_(linearised_rows(Mp_)),
        tile_(rows_ * Mp_),
        g_(Mp_),
        u_(rows_),
        mass_(rows_),
        top_(rows_),
        sum_(rows_) {
    shared_.mass.reset(Mp_), shared_.top.reset(Mp_), shared_.sum.reset(Mp_);
    if (p.gram) shared_.gram.reset(p.M * Mp_);
  }
  Shared& shared() { return shared_; }

  void run(int64_t at, const Team& team) {
    const NoDenormals guard;
    const auto [lo, hi] = team.share(p_.N, rows_);
    fill(g_.data(), Mp_, -kInf<F>);
    for (int64_t j = 0; j < p_.M; ++j) g_[j] = element<F>(p_.g, at, j);
    fill(shared_.mass.data(), Mp_, F(0));
    if (p_.gram) fill(shared_.gram.data(), p_.M * Mp_, F(0));
    for (int64_t row0 = lo; row0 < hi; row0 += rows_) block(at, row0, std::min(rows_, hi - row0));
    team.sync();
    const bool starved = merge(at, team);
    if (starved) {
      fill(shared_.top.data(), Mp_, -kInf<F>), fill(shared_.sum.data(), Mp_, F(0));
      for (int64_t row0 = lo; row0 < hi; row0 += rows_) log_block(at, row0, std::min(rows_, hi - row0));
      team.sync();
      if (team.rank == 0) log_sums(at, team);
    }
    team.sync();
  }

 private:
  F* out(const View& v, int64_t at, int64_t i) const {
    return static_cast<F*>(v.data) + at * v.stride[0] + i * v.stride[1];
  }
  void row_of(int64_t at, int64_t i, F* row) const {
    const View& v = p_.log_kernel;
    load_row<F>(v, at * v.stride[0] + i * v.stride[1], v.stride[2], p_.M, row);
    fill(row + p_.M, Mp_ - p_.M, -kInf<F>);
  }
  F exponentials(F* row, F& top);
  void block(int64_t at, int64_t row0, int64_t n);
  void add(int64_t n);
  bool merge(int64_t at, const Team& team);
  void log_block(int64_t at, int64_t row0, int64_t n);
  void log_sums(int64_t at, const Team& team);

  const LinearisedParams& p_;
  int64_t Mp_, rows_;
  Buffer<F> tile_, g_;              // [rows][Mp] [Mp]
  Buffer<F> u_, mass_, top_, sum_;  // [rows]
  Shared shared_;
};

// A row of ℓ becomes e^{ℓ + g − top}; returns its sum, and 1 and a top of −∞ for a row that reaches nothing.
template <class F>
F LinearisedWorker<F>::exponentials(F* row, F& top_out) {
  Vec<F> top = splat(-kInf<F>), sum{};
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    const Vec<F> x = load(row + j) + load(g_ + j);
    top = vmax(x, top);
    store(row + j, x);
  }
  const F m = top_out = reduce_max<F>(top);
  if (m == -kInf<F>) return fill(row, Mp_, F(0)), F(1);
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    const Vec<F> e = vexp<F>(load(row + j) - m);
    sum += e;
    store(row + j, e);
  }
  return reduce_add<F>(sum);
}

// X of the block from its rows of ℓ; √(e^{f + s}) to u_, s and f to where they are wanted.
template <class F>
void LinearisedWorker<F>::block(int64_t at, int64_t row0, int64_t n) {
  const F lam = element<F>(p_.lam_a, at, 0);
  for (int64_t i = 0; i < pad<F>(n); ++i) {
    mass_[i] = i < n ? element<F>(p_.log_a, at, row0 + i) : -kInf<F>;
    top_[i] = -kInf<F>, sum_[i] = 1;
    if (i >= n) continue;
    F* row = tile_ + i * Mp_;
    if (mass_[i] == -kInf<F>) {  // its content is never read
      fill(row, Mp_, F(0));
      continue;
    }
    row_of(at, row0 + i, row);
    sum_[i] = exponentials(row, top_[i]);
  }
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> top = load(top_ + i), mass = load(mass_ + i), none = splat(-kInf<F>), sum = load(sum_ + i);
    const Vec<F> s = top + vlog<F>(sum);
    store(top_ + i, s);
    store(mass_ + i, top == none ? none : mass - lam * s);
    const Vec<F> root = top == none ? Vec<F>{} : vexp<F>((mass + (1 - lam) * s) * F(0.5));
    store(u_ + i, root);
    store(sum_ + i, root / sum);
  }
  for (int64_t i = 0; i < n; ++i) {
    F* row = tile_ + i * Mp_;
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) store(row + j, load(row + j) * sum_[i]);
    *out(p_.s, at, row0 + i) = top_[i];
    *out(p_.f, at, row0 + i) = mass_[i];
    if (p_.rows) store_row<F>(p_.rows, at * p_.rows.stride[0] + (row0 + i) * p_.rows.stride[1], 1, p_.M, row);
  }
  add(n);
}

// The block's part of D and A.
template <class F>
void LinearisedWorker<F>::add(int64_t n) {
  gemm<F>(1, Mp_, n, u_, 0, 1, tile_, Mp_, shared_.mass, Mp_, true);
  if (!p_.gram) return;
  constexpr int64_t kPanel = kTileVecs * kLanes<F>;
  for (int64_t j = 0; j < Mp_; j += kPanel) {  // the upper half, in panels of columns
    const int64_t width = std::min(kPanel, Mp_ - j), rows = std::min(p_.M, j + width);
    gemm<F>(rows, width, n, tile_, 1, Mp_, tile_ + j, Mp_, shared_.gram + j, Mp_, true);
  }
}

// The sums of the team; whether c has to be found by log sums.
template <class F>
bool LinearisedWorker<F>::merge(int64_t at, const Team& team) {
  bool starved = false;
  for (int64_t j = 0; j < p_.M; ++j) {
    F mass = 0;
    for (int i = 0; i < team.size; ++i) mass += team.template member<Shared>(i).mass[j];
    starved = starved || !(mass > Limits<F>::kColumn && mass < 1 / Limits<F>::kColumn);
    if (team.rank != 0) continue;
    *out(p_.mass, at, j) = mass;
    *out(p_.c, at, j) = static_cast<F>(std::log(static_cast<double>(mass)) - g_[j]);
  }
  if (!p_.gram) return starved;
  F* A = static_cast<F*>(p_.gram.data) + at * p_.gram.stride[0];
  const auto [lo, hi] = team.share(p_.M, 1);
  for (int64_t i = lo; i < hi; ++i)
    for (int64_t j = i; j < p_.M; ++j) {
      F sum = 0;
      for (int k = 0; k < team.size; ++k) sum += team.template member<Shared>(k).gram[i * Mp_ + j];
      A[i * p_.M + j] = A[j * p_.M + i] = sum;
    }
  return starved;
}

template <class F>
void LinearisedWorker<F>::log_block(int64_t at, int64_t row0, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    u_[i] = *out(p_.f, at, row0 + i);
    if (u_[i] != -kInf<F>) row_of(at, row0 + i, tile_ + i * Mp_);
  }
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    const Vec<F> old = load(shared_.top + j);
    Vec<F> top = old, sum{};
    for (int64_t i = 0; i < n; ++i)
      if (u_[i] != -kInf<F>) top = vmax(load(tile_ + i * Mp_ + j) + u_[i], top);
    const Vec<F> ref = top == -kInf<F> ? Vec<F>{} : top;
    for (int64_t i = 0; i < n; ++i)
      if (u_[i] != -kInf<F>) sum += vexp<F>(load(tile_ + i * Mp_ + j) + u_[i] - ref);
    store(shared_.sum + j, load(shared_.sum + j) * vexp<F>(old - ref) + sum);
    store(shared_.top + j, top);
  }
}

template <class F>
void LinearisedWorker<F>::log_sums(int64_t at, const Team& team) {
  for (int64_t j = 0; j < p_.M; ++j) {
    F top = -kInf<F>;
    for (int i = 0; i < team.size; ++i) top = std::max(top, team.template member<Shared>(i).top[j]);
    double sum = 0;
    for (int i = 0; i < team.size && top != -kInf<F>; ++i) {
      const Shared& s = team.template member<Shared>(i);
      sum += s.sum[j] * std::exp(static_cast<double>(s.top[j] - top));
    }
    *out(p_.c, at, j) = sum > 0 ? static_cast<F>(std::log(sum) + top) : -kInf<F>;
  }
}

template <class F>
void linearised_pass(const LinearisedParams& p) {
  if (p.G == 0) return;
  const double flops = 2.0 * p.G * static_cast<double>(p.N) * p.M * ((p.gram ? p.M : 0) + 20);
  std::vector<std::unique_ptr<LinearisedWorker<F>>> workers;
  const int threads = useful_threads(p.threads, flops);
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<LinearisedWorker<F>>(p, threads));
  run_team(workers, p.G);
}

}  // namespace
}  // namespace sfk
