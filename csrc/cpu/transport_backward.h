// Backward of the transport, exact for the T iterations that ran: from dz, dg^T and dc to the gradients of every row.
//
// Per iteration t = T..1, one pass over the rows: f^t from g^{t−1}, df^t, and the column sums that give dg^{t−1}.  All
// the products with exponential tiles are summed in the last pass, which is the pass of t = 1.  In scaled mode (see
// transport.h) they are K times a matrix of rank 2T: R^t_sj = K_sj rowR_s G_j and Q^t_sj = K_sj rowQ_s e^{−c_j}.
#pragma once
#include "base/transpose.h"
#include "transport.h"

namespace sfk {
namespace {

// Scaled mode multiplies gradients by factors up to e^range; half of the exponent range is left to the gradients.
template <class F>
constexpr F kBackwardRange = sizeof(F) == 4 ? F(40) : F(300);

// What the backward is given.  A step t = 0 .. max(T,1) − 1 is iteration t + 1 of the definition.
template <class F>
struct TransportGiven {
  Buffer<F> la;           // [rows] log masses
  Buffer<F> c, d_c;       // [steps][Mp]
  Buffer<F> z, dz;        // [Mp][Ep]
  Buffer<F> dg;           // [Mp] dg^T; then that of the step at hand
  bool balanced = false;  // Σ_s df^t_s = Σ_j dg^t_j = 0, as rows of dS sum to 0: only the spread of c counts for dλ_b,
  F center = 0;           // and of LSE_j(ℓ + g) about this value for dλ_a

  TransportGiven(int64_t rows, int64_t steps, int64_t Mp, int64_t Ep)
      : la(rows), c(steps * Mp), d_c(steps * Mp), z(Mp * Ep), dz(Mp * Ep), dg(Mp) {}
};

// What it leaves, beside what it hands to its source.
template <class F>
struct TransportGradients {
  Buffer<F> d_la;     // [rows]
  Buffer<F> d_log_b;  // [Mp]
  double d_lam_a = 0, d_lam_b = 0;

  TransportGradients(int64_t rows, int64_t Mp) : d_la(rows), d_log_b(Mp) {}
};

// Source: logits, weights, values, values_ahead (as in Transport); d_f(row0, n, out) adds the gradient of f^T;
// place_dv(row0, room) says where the rows of dv go, store_dv(row0, n, place, room) is told that they are there;
// accept(row0, n, dl, totals) takes the finished dℓ of a block and the sums of its rows; restart() forgets what it
// accepted; is_result: whether f is one.
template <class F, class Source>
class TransportBackward {
 public:
  TransportBackward(int64_t max_rows, int64_t block_rows, int64_t Mp, int64_t E, int64_t T)
      : block_(block_rows), Mp_(Mp), E_(E), steps_(std::max<int64_t>(T, 1)), stride_(max_rows + kLanes<F>) {}

  struct Shared {
    const F* partial;
    const double* sums;
    F lowest;
  };

  void run(Source& src, const Marginals<F>& marg, int64_t rows, const Team& team, Shared& shared,
           const Shared* const* members) {
    rows_ = rows;
    steps_ = std::max<int64_t>(marg.T, 1);
    lone_ = is_lone<F>(given.la, rows, team);
    for (int64_t i = rows; i < rows + kLanes<F>; ++i) given.la[i] = -kInf<F>, m_[i] = 0;
    shared.partial = partial_, shared.sums = sums_;
    if (!solve<false>(src, marg, team, shared, members)) solve<true>(src, marg, team, shared, members);
  }

 private:
  template <bool kLog>
  bool solve(Source& src, const Marginals<F>& marg, const Team& team, Shared& shared, const Shared* const* members);
  template <bool kLog>
  bool prepare(const Marginals<F>& marg, F& spread);
  template <bool kLog>
  void set_columns(const Marginals<F>& marg, int64_t t);
  template <bool kLog>
  bool block_tile(Source& src, int64_t M, int64_t t, int64_t row0, int64_t n, F& lowest);
  template <bool kLog>
  void row_factors(const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n, bool dots_known = false);
  template <bool kLog>
  void row_gradients(Source& src, const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n);
  template <bool kLog>
  void settle_rows(const Marginals<F>& marg, int64_t row0, int64_t n);
  template <bool kLog>
  void finish_block(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void deliver(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void finish_one_column(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void q_tile(int64_t t, int64_t row0, int64_t n, F* out);
  void normalise(Source& src, const Marginals<F>& marg, const Team& team, const Shared* const* members);

  F* row_q(int64_t t) { return coefs_ + t * stride_; }
  F* row_r(int64_t t) { return coefs_ + (steps_ + t) * stride_; }
  F* basis_q(int64_t t) { return basis_ + t * Mp_; }
  F* basis_r(int64_t t) { return basis_ + (steps_ + t) * Mp_; }

  int64_t block_, Mp_, E_, Ep_ = E_ ? pad<F>(E_) : 0, steps_, stride_, rows_ = 0;
  bool lone_ = false;  // see is_lone: the pooling's weights are constant

 public:
  TransportGiven<F> given{stride_, steps_, Mp_, Ep_};
  TransportGradients<F> gradients{stride_, Mp_};

 private:
  // Of all rows.
  Buffer<F> m_{stride_};                   // [stride] the row maxima of ℓ
  Buffer<F> coefs_{2 * steps_ * stride_};  // [2·steps][stride] rowQ of every step, then rowR
  Buffer<F> lse_{steps_ * stride_};        // [steps][stride] LSE_j(ℓ + g)
  Buffer<F> top_{steps_ * stride_};        // [steps][stride] the row maxima of ℓ − m + g (log mode) or 1/(K G)
  Buffer<F> df_{steps_ * stride_};         // [steps][stride]
  // Of the columns.
  Buffer<F> partial_{Mp_};             // [Mp] this thread's column sums of R, what dg comes from
  Buffer<F> basis_{2 * steps_ * Mp_};  // [2·steps][Mp] the column factors of Q's gradient, then G (log mode: g)
  Buffer<F> cq_{steps_ * Mp_};         // [steps][Mp] e^{cref − c} (log mode: −c)
  Buffer<F> scale_{steps_ * Mp_};      // [steps][Mp] what makes the columns of Q sum to 1 (log mode)
  Buffer<double> sums_{steps_ * Mp_};  // [steps][Mp] this thread's column sums of Q (log mode)
  Buffer<F> g_{steps_ * Mp_};          // [steps][Mp] g before the step
  Buffer<F> shift_{steps_};            // [steps] max g
  Buffer<F> cref_{steps_};             // [steps] max c
  Buffer<F> zdz_{Mp_}, zdv_{Mp_};      // [Mp] ⟨z_j, dz_j⟩, rounded as a product's element and as a row's dot
  Buffer<F> dcol_{Mp_};                // [Mp] dc of the step at hand, ⟨z, dz⟩ taken away in the last
  Buffer<F> dzq_{Mp_ * Ep_};           // [Mp][Ep] dz, times e^{cref − c} of the last step in scaled mode
  Buffer<F> dzt_{E_ * Mp_};            // [E][Mp] dz transposed
  Buffer<F> zt_{E_ * Mp_};             // [E][Mp] z transposed
  // Of a block of rows.
  Buffer<F> tile_{block_ * Mp_};                  // [block][Mp] K (log mode: ℓ − m)
  Buffer<F> q_{block_ * Mp_};                     // [block][Mp] Q in log mode
  Buffer<F> r_{block_ * Mp_};                     // [block][Mp] what K is multiplied by in scaled mode
  Buffer<F> acc_{block_ * Mp_};                   // [block][Mp] ⟨v, dz⟩; dℓ
  Buffer<F> v_{block_ * Ep_}, dv_{block_ * Ep_};  // [block][Ep] values and their gradients
  Buffer<F> u_{block_ + kLanes<F>};               // [block] a number a row
  Rows<F> values_;                                // [block][Ep] values, where they lie or in v_
};

// Log mode: Q^t = exp((ℓ − m + q) − c) times what makes its columns sum to 1.  The larger term is cancelled first, as
// it was when the sums were formed.
template <class F, class Source>
void TransportBackward<F, Source>::q_tile(int64_t t, int64_t row0, int64_t n, F* out) {
  const F *row = row_q(t) + row0, *col = cq_ + t * Mp_, *scale = scale_ + t * Mp_;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < Mp_; j += kLanes<F>)
      store(out + i * Mp_ + j, vexp<F>((load(tile_ + i * Mp_ + j) + row[i]) + load(col + j)) * load(scale + j));
}

// Column factors of every step; false where scaled mode cannot hold them.
template <class F, class Source>
template <bool kLog>
bool TransportBackward<F, Source>::prepare(const Marginals<F>& marg, F& spread) {
  bool ok = true;
  spread = 0;
  for (int64_t t = 0; t < steps_; ++t) {
    F *g = g_ + t * Mp_, *cq = cq_ + t * Mp_, top = -kInf<F>, low = kInf<F>, spread_t = 0;
    const F* c_t = given.c + t * Mp_;
    for (int64_t j = 0; j < Mp_; ++j) {
      const F before = t == 0 ? F(0) : given.c[(t - 1) * Mp_ + j];
      g[j] = t == 0 ? marg.log_b[j] : before == -kInf<F> ? before : marg.log_b[j] - marg.lam_b * before;
      if (c_t[j] == -kInf<F>) continue;
      top = std::max(top, c_t[j]), low = std::min(low, c_t[j]);
    }
    cref_[t] = top == -kInf<F> ? F(0) : top;
    if (kLog) {
      for (int64_t j = 0; j < Mp_; ++j) cq[j] = c_t[j] == -kInf<F> ? c_t[j] : -c_t[j];
      std::copy(g, g + Mp_, basis_r(t));
      continue;
    }
    for (int64_t j = 0; j < Mp_; ++j) cq[j] = c_t[j] == -kInf<F> ? F(0) : std::exp(cref_[t] - c_t[j]);
    shift_[t] = exp_shifted<F>(marg.M, Mp_, g, basis_r(t), spread_t);
    spread = std::max(spread, spread_t);
    ok = ok && top - low <= kBackwardRange<F> && spread <= kBackwardRange<F> && near_zero<F>(marg.M, c_t);
  }
  for (int64_t j = 0; j < Mp_; ++j) {
    const F factor = kLog ? F(1) : cq_[(steps_ - 1) * Mp_ + j];
    for (int64_t e = 0; e < Ep_; e += kLanes<F>) store(dzq_ + j * Ep_ + e, factor * load(given.dz + j * Ep_ + e));
  }
  transpose<F>(Mp_, E_, given.dz, Ep_, dzt_, Mp_);
  transpose<F>(Mp_, E_, given.z, Ep_, zt_, Mp_);
  // ⟨z_j, dz_j⟩ rounded as ⟨v_s, dz_j⟩ will be, and as ⟨v_s, dv_s⟩: where a column has one key, z_j is its value and
  // dv_s is dz_j, and what must cancel cancels exactly.
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    Vec<F> dots{};
    for (int64_t k = j; k < E_ * Mp_; k += Mp_) dots += load(zt_ + k) * load(dzt_ + k);
    store(zdz_ + j, dots);
  }
  for (int64_t j = 0; j < Mp_; ++j) {
    Vec<F> dot{};
    for (int64_t e = 0; e < Ep_; e += kLanes<F>) dot += load(given.z + j * Ep_ + e) * load(given.dz + j * Ep_ + e);
    zdv_[j] = reduce_add<F>(dot);
  }
  return ok;
}

// From dg of this step: its part of d log b and dλ_b, and the column factors of Q's gradient.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::set_columns(const Marginals<F>& marg, int64_t t) {
  const F* c_t = given.c + t * Mp_;
  for (int64_t j = 0; j < Mp_; ++j) {
    const bool reached = marg.T == 0 || c_t[j] != -kInf<F>;
    F d = given.d_c[t * Mp_ + j];
    if (reached) gradients.d_log_b[j] += given.dg[j];
    if (marg.T && reached) {
      d -= marg.lam_b * given.dg[j];
      gradients.d_lam_b -= static_cast<double>(given.dg[j]) * (given.balanced ? c_t[j] - cref_[t] : c_t[j]);
    }
    const bool pooled = t == steps_ - 1 && !lone_;
    const F factor = kLog ? F(1) : cq_[t * Mp_ + j];
    basis_q(t)[j] = (pooled ? d - zdz_[j] : d) * factor;
    dcol_[j] = (pooled ? d - zdv_[j] : d) * factor;
  }
}

template <class F, class Source>
template <bool kLog>
bool TransportBackward<F, Source>::solve(Source& src, const Marginals<F>& marg, const Team& team, Shared& shared,
                                         const Shared* const* members) {
  F spread;
  shared.lowest = 0;
  if (!prepare<kLog>(marg, spread)) return false;
  src.restart();
  gradients.d_lam_a = gradients.d_lam_b = 0;
  fill(gradients.d_la.data(), rows_, F(0));
  fill(gradients.d_log_b.data(), Mp_, F(0));
  if (kLog) normalise(src, marg, team, members);
  Buffer<F> dg_first(Mp_);
  std::copy(given.dg.data(), given.dg + Mp_, dg_first.data());
  for (int64_t t = steps_ - 1; t >= 0; --t) {
    set_columns<kLog>(marg, t);
    fill(partial_.data(), Mp_, F(0));
    for (int64_t row0 = 0; row0 < rows_; row0 += block_) {
      const int64_t n = std::min(block_, rows_ - row0);
      const bool dots_known = block_tile<kLog>(src, marg.M, t, row0, n, shared.lowest);
      if (!kLog && spread - shared.lowest > kBackwardRange<F>) break;
      if (!kLog) row_factors<kLog>(marg, t, row0, n, dots_known);
      row_gradients<kLog>(src, marg, t, row0, n);
      if (t == 0) finish_block<kLog>(src, marg, row0, n);
    }
    team.sync();
    bool ok = true;
    fill(given.dg.data(), Mp_, F(0));
    for (int i = 0; i < team.size; ++i) {
      ok = ok && (kLog || spread - members[i]->lowest <= kBackwardRange<F>);
      for (int64_t j = 0; j < Mp_; ++j) given.dg[j] += members[i]->partial[j];
    }
    team.sync();
    if (!ok) {
      std::copy(dg_first.data(), dg_first + Mp_, given.dg.data());
      return false;
    }
    for (int64_t j = 0; !kLog && j < Mp_; ++j) given.dg[j] *= basis_r(t)[j];
    if (marg.T == 0) return true;
  }
  for (int64_t j = 0; j < Mp_; ++j) gradients.d_log_b[j] += given.dg[j];
  return true;
}

// The block's K as the forward had it, or ℓ − m in log mode.  True where it left K G of step t in u_.
template <class F, class Source>
template <bool kLog>
bool TransportBackward<F, Source>::block_tile(Source& src, int64_t M, int64_t t, int64_t row0, int64_t n, F& lowest) {
  if (!kLog && src.near()) {
    src.weights(row0, n, tile_, basis_r(t), u_);
    fill(m_ + row0, n, src.middle());
    lowest = src.least_power();
    return true;
  }
  src.logits(row0, n, tile_);
  if (kLog)
    shift_rows<F>(n, M, Mp_, tile_, given.la + row0, m_ + row0);
  else
    scale_rows<F>(n, M, Mp_, tile_, given.la + row0, m_ + row0, lowest);
  return false;
}

// Log mode: the row factors of every step, and the sums of Q's columns.  c is rounded, and where it is hundreds the
// sums miss 1 by more than all other errors, alike for a whole column.
template <class F, class Source>
void TransportBackward<F, Source>::normalise(Source& src, const Marginals<F>& marg, const Team& team,
                                             const Shared* const* members) {
  const int64_t size = steps_ * Mp_;
  fill(sums_ + 0, size, 0.0);
  fill(scale_ + 0, size, F(1));
  for (int64_t row0 = 0; row0 < rows_; row0 += block_) {
    const int64_t n = std::min(block_, rows_ - row0);
    src.logits(row0, n, tile_);
    shift_rows<F>(n, marg.M, Mp_, tile_, given.la + row0, m_ + row0);
    for (int64_t t = 0; t < steps_; ++t) {
      row_factors<true>(marg, t, row0, n);
      q_tile(t, row0, n, q_);
      fill(u_ + 0, n, F(1));
      gemm<F>(1, Mp_, n, u_, 0, 1, q_, Mp_, dcol_, Mp_, false);
      for (int64_t j = 0; j < Mp_; ++j) sums_[t * Mp_ + j] += dcol_[j];
    }
  }
  team.sync();
  for (int64_t k = 0; k < size; ++k) {
    double sum = 0;
    for (int i = 0; i < team.size; ++i) sum += members[i]->sums[k];
    scale_[k] = sum > 0 ? static_cast<F>(1 / sum) : F(1);
  }
  team.sync();
}

// f^t of the block, as the row factors of R and Q.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::row_factors(const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n,
                                               bool dots_known) {
  const F lam = marg.T ? marg.lam_a : F(0);
  const F* mass = given.la + row0;
  F *lse = lse_ + t * stride_ + row0, *q = row_q(t) + row0, *r = row_r(t) + row0;
  if (kLog) {
    for (int64_t i = 0; i < n; ++i) {
      F sum = 1, *top = top_ + t * stride_ + row0 + i, m = m_[row0 + i];
      *top = 0;
      const F below = marg.T == 0 ? F(0) : row_lse<F>(Mp_, tile_ + i * Mp_, g_ + t * Mp_, top, &sum);
      lse[i] = m + below;
      r[i] = 1 / sum;  // R = e^{ℓ − m + g − top}/sum: exact to rounding however large ℓ is
      const bool absent = below == -kInf<F> || mass[i] == -kInf<F>;
      q[i] = absent ? -kInf<F> : shifted_potential<F>(Source::is_result, mass[i], m, lam, below);
    }
    return;
  }
  if (!dots_known) row_dots<F>(n, Mp_, tile_, basis_r(t), u_);
  for (int64_t i = n; i < pad<F>(n); ++i) u_[i] = 1;
  const F *m = m_ + row0, offset = static_cast<F>(-static_cast<double>(lam) * shift_[t] - cref_[t]);
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    // The rows past the end of the block are written again by the next one; the arrays end in a vector of slack.
    const Vec<F> dot = load(u_ + i), log_dot = vlog<F>(dot), mi = load(m + i);
    store(lse + i, mi + shift_[t] + log_dot);
    store(r + i, F(1) / dot);
    store(top_ + t * stride_ + row0 + i, F(1) / dot);
    store(q + i, vexp<F>((load(mass + i) + offset) + mi * (1 - lam) - lam * log_dot));
  }
}

// df^t of the block, and its part of dg^{t−1}, d log a and dλ_a; at the last step also dv.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::row_gradients(Source& src, const Marginals<F>& marg, int64_t t, int64_t row0,
                                                 int64_t n) {
  const bool last = t == steps_ - 1;
  F *q = row_q(t) + row0, *r = row_r(t) + row0, *lse = lse_ + t * stride_ + row0, *df = df_ + t * stride_ + row0;
  const F* Q = tile_;
  if (kLog) {
    q_tile(t, row0, n, q_);
    Q = q_;
  }
  row_dots<F>(n, Mp_, Q, dcol_, u_);
  if (last && Ep_) {
    values_ = src.values(row0, n, v_);
    const Place<F> dv = src.place_dv(row0, dv_);
    Ahead ahead = src.values_ahead(row0, n);
    gemm<F>(n, Ep_, marg.M, Q, Mp_, 1, dzq_, Ep_, dv.at, dv.ld, false, &ahead);
    for (int64_t i = 0; i < n; ++i) {
      const F* const v = values_[i];
      F *const row = dv.at + i * dv.ld, scale = kLog ? F(1) : q[i];
      Vec<F> dot{};
      for (int64_t e = 0; e < Ep_; e += kLanes<F>) {
        const Vec<F> d = load(row + e);
        dot += load(v + e) * d;
        store(row + e, d * scale);
      }
      if (!lone_) u_[i] += reduce_add<F>(dot);
    }
    src.store_dv(row0, n, dv, dv_);
  }
  for (int64_t i = 0; i < n; ++i) df[i] = kLog ? u_[i] : u_[i] * q[i];
  if (last) src.d_f(row0, n, df);
  for (int64_t i = 0; i < n; ++i) {
    const bool absent = given.la[row0 + i] == -kInf<F> || lse[i] == -kInf<F>;
    if (absent) df[i] = 0;
    gradients.d_la[row0 + i] += df[i];
    if (marg.T && !absent) gradients.d_lam_a -= static_cast<double>(df[i]) * (lse[i] - given.center);
    u_[i] = marg.T ? -marg.lam_a * df[i] : F(0);
  }
  if (marg.T == 0) return;
  if (kLog) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        const Vec<F> w = vexp<F>((load(tile_ + i * Mp_ + j) + load(g_ + t * Mp_ + j)) - top_[t * stride_ + row0 + i]);
        store(partial_ + j, load(partial_ + j) + w * (u_[i] * r[i]));
      }
    return;
  }
  for (int64_t i = 0; i < n; ++i) r[i] *= u_[i];
  gemm<F>(1, Mp_, n, r, 0, 1, tile_, Mp_, partial_, Mp_, true);
}

}  // namespace
}  // namespace sfk

#include "transport_finish.h"
