// Backward of the transport, exact for the T iterations that ran: from dz, dg^T and dc to the gradients of every row.
//
// Per iteration t = T..1, one pass over the rows: f^t from g^{t−1}, df^t, and the column sums that give dg^{t−1}.  All
// the products with exponential tiles are summed in the last pass, which is the pass of t = 1.  In scaled mode (see
// transport.h) they are K times a matrix of rank 2T: R^t_sj = K_sj rowR_s G_j and Q^t_sj = K_sj rowQ_s e^{−c_j}.
#pragma once
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

// Source: logits, values, values_ahead (as in Transport); d_f(row0, n, out) adds the gradient of f^T; store_dv(row0, n,
// dv); accept(row0, n, dl, totals) takes the finished dℓ of a block and the sums of its rows; restart() forgets what it
// accepted; is_result: whether f is one.
template <class F, class Source>
class TransportBackward {
 public:
  TransportBackward(int64_t max_rows, int64_t block_rows, int64_t Mp, int64_t E, int64_t T)
      : block_(block_rows), Mp_(Mp), E_(E), steps_(std::max<int64_t>(T, 1)), stride_(max_rows + kLanes<F>) {}

  struct Shared {
    const F* partial;
    F lowest;
  };

  void run(Source& src, const Marginals<F>& marg, int64_t rows, const Team& team, Shared& shared,
           const Shared* const* members) {
    rows_ = rows;
    steps_ = std::max<int64_t>(marg.T, 1);
    lone_ = is_lone<F>(given.la, rows, team);
    for (int64_t i = rows; i < rows + kLanes<F>; ++i) given.la[i] = -kInf<F>, m_[i] = 0;
    shared.partial = partial_;
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
  void row_factors(const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n);
  template <bool kLog>
  void row_gradients(Source& src, const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n);
  template <bool kLog>
  void settle_rows(const Marginals<F>& marg, int64_t row0, int64_t n);
  template <bool kLog>
  void finish_block(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void deliver(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void finish_one_column(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);
  void exp_tile(int64_t n, const F* row, const F* col, F* out);

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
  Buffer<F> g_{steps_ * Mp_};          // [steps][Mp] g before the step
  Buffer<F> shift_{steps_};            // [steps] max g
  Buffer<F> cref_{steps_};             // [steps] max c
  Buffer<F> zdz_{Mp_}, zdv_{Mp_};      // [Mp] ⟨z_j, dz_j⟩, rounded as a product's element and as a row's dot
  Buffer<F> dcol_{Mp_};                // [Mp] dc of the step at hand, ⟨z, dz⟩ taken away in the last
  Buffer<F> dzq_{Mp_ * Ep_};           // [Mp][Ep] dz, times e^{cref − c} of the last step in scaled mode
  Buffer<F> dzt_{E_ * Mp_};            // [E][Mp] dz transposed
  // Of a block of rows.
  Buffer<F> tile_{block_ * Mp_};                  // [block][Mp] K (log mode: ℓ − m)
  Buffer<F> q_{block_ * Mp_};                     // [block][Mp] Q in log mode
  Buffer<F> r_{block_ * Mp_};                     // [block][Mp] what K is multiplied by in scaled mode
  Buffer<F> acc_{block_ * Mp_};                   // [block][Mp] ⟨v, dz⟩; dℓ
  Buffer<F> v_{block_ * Ep_}, dv_{block_ * Ep_};  // [block][Ep] values and their gradients
  Buffer<F> u_{block_ + kLanes<F>};               // [block] a number a row
};

// out_ij = exp((tile_ij + first) + second): the larger term is cancelled first, as it was when the sums were formed.
template <class F, class Source>
void TransportBackward<F, Source>::exp_tile(int64_t n, const F* row, const F* col, F* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < Mp_; j += kLanes<F>)
      store(out + i * Mp_ + j, vexp<F>((load(tile_ + i * Mp_ + j) + row[i]) + load(col + j)));
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
    ok = ok && top - low <= kBackwardRange<F> && spread <= kBackwardRange<F>;
  }
  for (int64_t j = 0; j < Mp_; ++j) {
    const F factor = kLog ? F(1) : cq_[(steps_ - 1) * Mp_ + j];
    for (int64_t e = 0; e < Ep_; ++e) dzq_[j * Ep_ + e] = factor * given.dz[j * Ep_ + e];
    for (int64_t e = 0; e < E_; ++e) dzt_[e * Mp_ + j] = given.dz[j * Ep_ + e];
  }
  // ⟨z_j, dz_j⟩ rounded as ⟨v_s, dz_j⟩ will be, and as ⟨v_s, dv_s⟩: where a column has one key, z_j is its value and
  // dv_s is dz_j, and what must cancel cancels exactly.
  for (int64_t j = 0; j < Mp_; ++j) {
    zdz_[j] = gemm_element<F>(E_, given.z + j * Ep_, dzt_, Mp_, j);
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
  Buffer<F> dg_first(Mp_);
  std::copy(given.dg.data(), given.dg + Mp_, dg_first.data());
  for (int64_t t = steps_ - 1; t >= 0; --t) {
    set_columns<kLog>(marg, t);
    fill(partial_.data(), Mp_, F(0));
    for (int64_t row0 = 0; row0 < rows_; row0 += block_) {
      const int64_t n = std::min(block_, rows_ - row0);
      src.logits(row0, n, tile_);
      if (kLog) shift_rows<F>(n, marg.M, Mp_, tile_, given.la + row0, m_ + row0);
      if (!kLog) scale_rows<F>(n, marg.M, Mp_, tile_, given.la + row0, m_ + row0, shared.lowest);
      if (!kLog && spread - shared.lowest > kBackwardRange<F>) break;
      row_factors<kLog>(marg, t, row0, n);
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

// f^t of the block, as the row factors of R and Q.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::row_factors(const Marginals<F>& marg, int64_t t, int64_t row0, int64_t n) {
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
  row_dots<F>(n, Mp_, tile_, basis_r(t), u_);
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
    exp_tile(n, q, cq_ + t * Mp_, q_);
    Q = q_;
  }
  row_dots<F>(n, Mp_, Q, dcol_, u_);
  if (last && Ep_) {
    src.values(row0, n, v_);
    Ahead ahead = src.values_ahead(row0, n);
    gemm<F>(n, Ep_, marg.M, Q, Mp_, 1, dzq_, Ep_, dv_, Ep_, false, &ahead);
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> dot{};
      for (int64_t e = 0; e < Ep_; e += kLanes<F>) dot += load(v_ + i * Ep_ + e) * load(dv_ + i * Ep_ + e);
      if (!lone_) u_[i] += reduce_add<F>(dot);
      for (int64_t e = 0; !kLog && e < Ep_; ++e) dv_[i * Ep_ + e] *= q[i];
    }
    src.store_dv(row0, n, dv_);
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

// Σ_j of the pooling's dℓ as it stands in acc_, in place of the df^T that ⟨v, dv⟩ gave: equal but for rounding, and
// what the R term must take away exactly where the two nearly cancel.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::settle_rows(const Marginals<F>& marg, int64_t row0, int64_t n) {
  const int64_t t = steps_ - 1;
  const F *q = row_q(t) + row0, *cq = cq_ + t * Mp_, *qd = basis_q(t), *lse = lse_ + t * stride_ + row0;
  F *df = df_ + t * stride_ + row0, *r = row_r(t) + row0, *inv = top_ + t * stride_ + row0;
  if (kLog) exp_tile(n, q, cq, q_);
  for (int64_t i = 0; i < n; ++i) {
    if (given.la[row0 + i] == -kInf<F> || lse[i] == -kInf<F>) continue;
    Vec<F> sum{};
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> vdz = load(acc_ + i * Mp_ + j);
      sum += kLog ? load(q_ + i * Mp_ + j) * (vdz + load(qd + j))
                  : load(tile_ + i * Mp_ + j) * (vdz * load(cq + j) + load(qd + j));
    }
    const F settled = kLog ? reduce_add<F>(sum) : reduce_add<F>(sum) * q[i];
    gradients.d_la[row0 + i] += settled - df[i];
    if (marg.T) gradients.d_lam_a -= static_cast<double>(settled - df[i]) * (lse[i] - given.center);
    df[i] = settled;
    if (!kLog) r[i] = -marg.lam_a * settled * inv[i];
  }
}

// dℓ of the block as it stands in acc_, to the source.  Its rows sum to those of Q, less λ_a of them as Σ_j R = 1.
template <class F, class Source>
void TransportBackward<F, Source>::deliver(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  for (int64_t i = 0; i < n; ++i) u_[i] = (marg.T ? 1 - marg.lam_a : F(1)) * gradients.d_la[row0 + i];
  src.accept(row0, n, acc_, u_);
}

// dℓ_s = (1 − λ_a) Σ_t df^t_s: with one column R = 1 and every Q term is its own row sum.  Exactly 0 where λ_a = 1.
template <class F, class Source>
void TransportBackward<F, Source>::finish_one_column(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  fill(acc_.data(), n * Mp_, F(0));
  for (int64_t i = 0; i < n; ++i) acc_[i * Mp_] = (1 - marg.lam_a) * gradients.d_la[row0 + i];
  deliver(src, marg, row0, n);
}

// The whole dℓ of the block, handed to the source.
template <class F, class Source>
template <bool kLog>
void TransportBackward<F, Source>::finish_block(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n) {
  const int64_t last = steps_ - 1;
  if (Ep_ && marg.T && marg.M == 1) return finish_one_column(src, marg, row0, n);
  if (lone_) {
    fill(acc_.data(), n * Mp_, F(0));
  } else if (Ep_) {
    if (last != 0) src.values(row0, n, v_);
    Ahead ahead = src.values_ahead(row0, n);
    gemm<F>(n, Mp_, E_, v_, Ep_, 1, dzt_, Mp_, acc_, Mp_, false, &ahead);
    settle_rows<kLog>(marg, row0, n);
  }
  if (!kLog) {
    const int64_t rank = marg.T ? 2 * steps_ : 1;
    gemm<F>(n, Mp_, rank, coefs_ + row0, 1, stride_, basis_, Mp_, r_, Mp_, false);
    const F *q = row_q(last) + row0, *cq = cq_ + last * Mp_;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        Vec<F> a = load(r_ + i * Mp_ + j);
        if (Ep_) a += q[i] * load(cq + j) * load(acc_ + i * Mp_ + j);
        store(acc_ + i * Mp_ + j, a * load(tile_ + i * Mp_ + j));
      }
    deliver(src, marg, row0, n);
    return;
  }
  if (!Ep_) fill(acc_.data(), n * Mp_, F(0));
  for (int64_t t = last; t >= 0; --t) {
    exp_tile(n, row_q(t) + row0, cq_ + t * Mp_, q_);
    const F *r = row_r(t) + row0, *df = df_ + t * stride_ + row0, *g = g_ + t * Mp_, *top = top_ + t * stride_ + row0;
    for (int64_t i = 0; i < n; ++i) {
      const F coef = marg.T ? -marg.lam_a * df[i] * r[i] : F(0);
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        const Vec<F> before = load(acc_ + i * Mp_ + j), Q = load(q_ + i * Mp_ + j);
        Vec<F> d = t == last ? Q * (before + load(basis_q(t) + j)) : before + Q * load(basis_q(t) + j);
        if (coef != 0) d += coef * vexp<F>((load(tile_ + i * Mp_ + j) + load(g + j)) - top[i]);
        store(acc_ + i * Mp_ + j, d);
      }
    }
  }
  deliver(src, marg, row0, n);
}

}  // namespace
}  // namespace sfk
