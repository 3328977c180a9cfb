// Transport of rows (keys) onto columns (references): log-domain Sinkhorn, one pass over the rows per iteration.
//
// Scaled mode keeps K = e^{ℓ − m}, m the row maximum, so that an iteration is a row dot, a logarithm and an exponential
// per row, and a column sum: no exponentials of tiles.  It holds while K and e^g stay in the normal range.  Otherwise
// the head is done again in log mode: row-wise and column-wise logsumexp of ℓ − m, at two exponentials per element.
// Without values to pool, two such iterations are enough: potentials ĝ of the first go into K = e^{ℓ + ĝ − m}, and
// iterations are rescalings by e^{g − ĝ} until that has drifted too far, when ĝ becomes g.  What underflows in K then
// is too little of its row to count, as its columns' sums are in the normal range.
#pragma once
#include "base/team.h"
#include "transport_rows.h"

namespace sfk {
namespace {

template <class F>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kRange = 80, kColumn = 1e-27f;  // e^-80 = 2e-35 leaves the row dots normal numbers
  static constexpr float kDrift = 40;  // e^{40 - 87} is what an entry that underflows may be of its row
  static constexpr float kLevel = 32;  // c up to it is rounded to 2e-6
};
template <>
struct Limits<double> {
  static constexpr double kRange = 600, kColumn = 1e-240, kDrift = 300, kLevel = 1e10;
};

template <class F>
struct Marginals {
  int64_t M, Mp, T;
  F lam_a, lam_b;
  const F* log_b;            // [Mp]
  const F* start = nullptr;  // [Mp] g⁰, log b if null
};

// Whether all c lie close enough to 0 for scaled mode where values are pooled.  Far positions under relaxed marginals
// make f and c hundreds, which the modes round at different places: forward and backward are both in log mode there, or
// the backward's weights would not have z as their mean.
template <class F>
bool near_zero(int64_t M, const F* c) {
  return std::all_of(c, c + M, [](F x) { return x == -kInf<F> || std::fabs(x) <= Limits<F>::kLevel; });
}

// f + m of a row, from lse = LSE_j(ℓ − m + g).  Where f itself is a result, g must follow from f as it is rounded.
template <class F>
F shifted_potential(bool is_result, F mass, F m, F lam, F lse) {
  return is_result ? (mass - lam * (m + lse)) + m : mass + m * (1 - lam) - lam * lse;
}

// Whether one row of a head that is not shared by threads takes part.  Every weight of pooling is then 1 and constant;
// computed as such, its output and gradients are exact instead of near.
template <class F>
bool is_lone(const F* la, int64_t rows, const Team& team) {
  int64_t present = 0;
  for (int64_t i = 0; i < rows; ++i) present += la[i] != -kInf<F>;
  return team.size == 1 && present == 1;
}

// What one thread knows of the columns: Σ_s exp(ℓ_sj + f_s) = sum_j exp(ref_j), and the same sum over the values.
template <class F>
struct ColumnState {
  Buffer<F> ref, sum, z;  // [Mp] [Mp] [Mp][Ep]
  F lowest;               // smallest ℓ − m seen
  bool lone;              // one row takes part in the head, and it is here: it is pooled with weight 1 exactly
};

// Source: logits(row0, n, tile); where near(), weights(row0, n, tile, G, dots): K = e^{ℓ − middle()} >= e^least_power()
// and K G;
// values(row0, n, room), where they lie or in the room; values_ahead(row0, n); wants_f(), store_f(row0, n, f).  Rows
// count from this thread's first one.
template <class F, class Source>
class Transport {
 public:
  // keep: what `pooled` will ask for is cached, as what a second iteration asks for.
  Transport(int64_t max_rows, int64_t cache_rows, int64_t block_rows, int64_t Mp, int64_t Ep, int64_t T,
            bool keep = false)
      : la(max_rows + kLanes<F>),
        g(Mp),
        c(std::max<int64_t>(T, 1) * Mp),
        z(Mp * Ep),
        keep_(keep),
        block_(block_rows),
        cache_rows_(std::min(cache_rows, max_rows + block_rows)),
        Mp_(Mp),
        Ep_(Ep),
        m_(max_rows + kLanes<F>),
        cache_(cache_rows_ * Mp),
        tile_(block_ * Mp),
        values_(block_ * std::max<int64_t>(Ep, 1) + kLanes<F>),
        u_(block_ + kLanes<F>),
        G_(Mp),
        ref_(Mp),
        inv_(Mp),
        hat_(Mp),
        drift_(Mp) {
    state.ref.reset(Mp);
    state.sum.reset(Mp);
    state.z.reset(Mp * Ep);
  }

  // la must hold the log masses of this thread's `rows` rows.  On return g, c (all T rows) and z are complete on every
  // member of the team.  Returns the number of iterations that ran.
  int64_t run(Source& src, const Marginals<F>& marg, int64_t rows, double tol, const Team& team) {
    rows_ = rows;
    for (int64_t i = rows; i < rows + kLanes<F>; ++i) la[i] = -kInf<F>, m_[i] = 0;
    state.lone = is_lone<F>(la, rows, team);
    passes_ = std::max<int64_t>(marg.T, 1);
    begin(marg);
    const Progress scaled = iterate<false>(src, marg, tol, team, 0, passes_);
    log_ = !scaled.ok;
    if (!log_) return scaled.done;
    begin(marg);
    return Ep_ > 0 || marg.T < kWorthwhile ? iterate<true>(src, marg, tol, team, 0, passes_).done
                                           : absorb(src, marg, tol, team);
  }

  // After `run` of all T iterations: rows row0.. of W^k = e^{ℓ + f − c} [n][Mp], by the numbers that z was pooled with.
  F* pooled(Source& src, const Marginals<F>& marg, int64_t row0, int64_t n);

  Buffer<F> la;  // [rows] log masses
  Buffer<F> g;   // [Mp]
  Buffer<F> c;   // [max(T,1)][Mp]
  Buffer<F> z;   // [Mp][Ep]
  ColumnState<F> state;

 private:
  static constexpr int64_t kWorthwhile = 4;  // iterations of which some are worth making K twice
  // How many iterations have run, whether the mode holds what they need, whether they have converged.
  struct Progress {
    int64_t done;
    bool ok, stopped;
  };

  void begin(const Marginals<F>& marg) {
    std::copy_n(marg.start ? marg.start : marg.log_b, Mp_, g.data());
    state.lowest = 0, absorbed_ = false;
  }
  template <bool kLog>
  Progress iterate(Source& src, const Marginals<F>& marg, double tol, const Team& team, int64_t from, int64_t to);
  int64_t absorb(Source& src, const Marginals<F>& marg, double tol, const Team& team);
  F scaling(const Marginals<F>& marg, F& spread);
  template <bool kLog>
  F* rows_tile(Source& src, int64_t row0, int64_t n, bool first, int64_t M);
  void scaled_rows(Source& src, int64_t row0, int64_t n, const F* K, F lam, F shift);
  void log_rows(Source& src, int64_t row0, int64_t n, const F* logits, const F* potential, F lam);
  void scaled_block(Source& src, int64_t row0, int64_t n, F* K, F lam, F shift, bool pool);
  void log_block(Source& src, int64_t row0, int64_t n, const F* logits, F lam, bool pool);
  void weigh_rows(int64_t n, const F* K);
  void pool_lone(Source& src, int64_t row0, int64_t n, const F* present);
  // The first rows that are pooled need no zeros to be added to: of few rows these cost as much as the product.
  void zero_z() {
    if (!pooled_any_) fill(state.z.data(), Mp_ * Ep_, F(0));
    pooled_any_ = true;
  }
  bool merge(const Marginals<F>& marg, F shift, bool pool, bool check, F* c_t, const Team& team);

  bool keep_, log_ = false, absorbed_ = false;
  bool dots_known_ = false;  // whether u_ holds K G of the block at hand already
  bool pooled_any_ = true;   // whether state.z holds numbers of this pass
  int64_t block_, cache_rows_, Mp_, Ep_, rows_ = 0, passes_ = 1;
  Buffer<F> m_;       // [rows] row maxima
  Buffer<F> cache_;   // [cache rows][Mp] K of the first rows (log mode: ℓ − m)
  Buffer<F> tile_;    // [block][Mp] the same of a block that is not cached; weights in log mode
  Buffer<F> values_;  // [block][Ep] values; f
  Buffer<F> u_;       // [block] weights of rows, and their logarithms
  Buffer<F> G_;       // [Mp] e^{g − max g}
  Buffer<F> ref_;     // [Mp] what the sums of the whole team were taken relative to
  Buffer<F> inv_;     // [Mp] and their inverses
  Buffer<F> hat_;     // [Mp] ĝ, if absorbed
  Buffer<F> drift_;   // [Mp] g − ĝ
};

// All iterations with the potentials that went before in K, but for the first and the last: these are in the log
// domain, where g follows from f as it is rounded.
template <class F, class Source>
int64_t Transport<F, Source>::absorb(Source& src, const Marginals<F>& marg, double tol, const Team& team) {
  Progress at = iterate<true>(src, marg, tol, team, 0, 1);
  for (int64_t before = 0; at.done < passes_ - 1 && !at.stopped;) {
    absorbed_ = at.ok && at.done > before && std::all_of(g.data(), g + marg.M, [](F x) { return x != -kInf<F>; });
    if (!absorbed_) return iterate<true>(src, marg, tol, team, at.done, passes_).done;
    std::copy_n(g.data(), Mp_, hat_.data());
    before = at.done;
    at = iterate<false>(src, marg, tol, team, before, passes_ - 1);
  }
  absorbed_ = false;
  if (at.stopped && at.done == 1) return 1;
  if (at.stopped) {  // once more from where the last one set out
    const F* c_t = c + (--at.done - 1) * Mp_;
    for (int64_t j = 0; j < marg.M; ++j) g[j] = marg.log_b[j] - marg.lam_b * c_t[j];
  }
  return iterate<true>(src, marg, tol, team, at.done, at.done + 1).done;
}

// G and what it was shifted by.
template <class F, class Source>
F Transport<F, Source>::scaling(const Marginals<F>& marg, F& spread) {
  if (!absorbed_) return exp_shifted<F>(marg.M, Mp_, g, G_, spread);
  for (int64_t j = 0; j < Mp_; ++j) drift_[j] = j < marg.M ? g[j] - hat_[j] : -kInf<F>;
  return exp_shifted<F>(marg.M, Mp_, drift_, G_, spread);
}

// Iterations from + 1 to `to`; fewer where the mode does not hold the next one, or ĝ has to become g.
template <class F, class Source>
template <bool kLog>
typename Transport<F, Source>::Progress Transport<F, Source>::iterate(Source& src, const Marginals<F>& marg, double tol,
                                                                      const Team& team, int64_t from, int64_t to) {
  const F lam = marg.T ? marg.lam_a : F(0), range = absorbed_ ? kInf<F> : Limits<F>::kRange;
  for (int64_t t = from + 1; t <= to; ++t) {
    const bool pool = Ep_ > 0 && t == passes_;
    F shift = 0, spread = 0;
    if (!kLog) shift = -lam * scaling(marg, spread);
    if (!kLog && absorbed_ && spread > Limits<F>::kDrift) return {t - 1, true, false};
    fill(state.ref.data(), Mp_, -kInf<F>);
    fill(state.sum.data(), Mp_, F(0));
    pooled_any_ = !pool;
    if (kLog) zero_z();
    for (int64_t row0 = 0; row0 < rows_; row0 += block_) {
      const int64_t n = std::min(block_, rows_ - row0);
      F* tile = rows_tile<kLog>(src, row0, n, t == from + 1, marg.M);
      if (!kLog && spread - state.lowest > range) break;
      if (kLog)
        log_block(src, row0, n, tile, lam, pool);
      else
        scaled_block(src, row0, n, tile, lam, shift, pool);
    }
    F* c_t = c + (t - 1) * Mp_;
    zero_z();
    team.sync();
    bool ok = merge(marg, shift, pool, !kLog, c_t, team);
    for (int i = 0; !kLog && i < team.size; ++i)
      ok = ok && spread - team.template member<ColumnState<F>>(i).lowest <= range;
    if (!kLog && Ep_ > 0) ok = ok && near_zero<F>(marg.M, c_t);
    team.sync();
    if (!ok) return {t - 1, false, false};
    if (marg.T == 0) return {0, true, true};
    F change = 0;
    for (int64_t j = 0; j < marg.M; ++j) {
      const F next = c_t[j] == -kInf<F> ? -kInf<F> : marg.log_b[j] - marg.lam_b * c_t[j];
      if (next != -kInf<F> || g[j] != -kInf<F>) change = std::max(change, std::fabs(next - g[j]));
      g[j] = next;
    }
    if (tol >= 0 && change <= tol) return {t, true, true};
  }
  return {to, true, to == passes_};
}

// The block's K (or ℓ − m in log mode): from the cache, or made anew.
template <class F, class Source>
template <bool kLog>
F* Transport<F, Source>::rows_tile(Source& src, int64_t row0, int64_t n, bool first, int64_t M) {
  const bool cached = (passes_ > 1 || keep_) && row0 + n <= cache_rows_;
  F* tile = cached ? cache_ + row0 * Mp_ : tile_.data();
  if (cached && !first) return tile;
  if (!kLog && !absorbed_ && src.near()) {
    src.weights(row0, n, tile, G_, u_);
    fill(m_ + row0, n, src.middle());
    state.lowest = src.least_power(), dots_known_ = true;
    return tile;
  }
  src.logits(row0, n, tile);
  for (int64_t i = 0; absorbed_ && !kLog && i < n; ++i)
    for (int64_t j = 0; j < M; ++j) tile[i * Mp_ + j] += hat_[j];
  if (kLog)
    shift_rows<F>(n, M, Mp_, tile, la + row0, m_ + row0);
  else
    scale_rows<F>(n, M, Mp_, tile, la + row0, m_ + row0, state.lowest);
  return tile;
}

// u = f_s + m_s − shift = log a_s + (1 − λ_a) m_s − λ_a log (K G)_s; −inf beyond the rows.
template <class F, class Source>
void Transport<F, Source>::scaled_rows(Source& src, int64_t row0, int64_t n, const F* K, F lam, F shift) {
  const F *la_s = la + row0, *m = m_ + row0;
  if (!dots_known_) row_dots<F>(n, Mp_, K, G_, u_);
  dots_known_ = false;
  for (int64_t i = n; i < pad<F>(n); ++i) u_[i] = 1;
  for (int64_t i = 0; i < n; i += kLanes<F>) {
    const Vec<F> mass = load(la_s + i), top_i = load(m + i), log_dot = vlog<F>(load(u_ + i));
    store(u_ + i, mass + top_i * (1 - lam) - lam * log_dot);
    if (src.wants_f()) store(values_ + i, mass - lam * (top_i + log_dot) + shift);
  }
  for (int64_t i = n; i < pad<F>(n); ++i) u_[i] = -kInf<F>;
  if (src.wants_f()) src.store_f(row0, n, values_);
}

// The column sums with e^{u − ref}.
template <class F, class Source>
void Transport<F, Source>::scaled_block(Source& src, int64_t row0, int64_t n, F* K, F lam, F shift, bool pool) {
  scaled_rows(src, row0, n, K, lam, shift);
  Vec<F> top = splat(-kInf<F>);
  for (int64_t i = 0; i < n; i += kLanes<F>) top = vmax(top, load(u_ + i));
  const F ref = std::max(state.ref[0], reduce_max<F>(top));
  if (ref == -kInf<F>) return;
  if (ref > state.ref[0]) {
    const F scale = std::exp(state.ref[0] - ref);
    for (int64_t j = 0; j < Mp_; ++j) state.sum[j] *= scale;
    for (int64_t j = 0; pool && pooled_any_ && j < Mp_ * Ep_; ++j) state.z[j] *= scale;
    fill(state.ref.data(), Mp_, ref);
  }
  for (int64_t i = 0; i < n; i += kLanes<F>) store(u_ + i, vexp<F>(load(u_ + i) - ref));
  if (!pool || state.lone) gemm<F>(1, Mp_, n, u_, 0, 1, K, Mp_, state.sum, Mp_, true);
  if (!pool) return;
  if (state.lone) {
    zero_z();
    return pool_lone(src, row0, n, u_);
  }
  weigh_rows(n, K);
  const Rows<F> v = src.values(row0, n, values_);
  Ahead ahead = src.values_ahead(row0, n);
  gemm<F>(Mp_, Ep_, n, tile_, 1, Mp_, v.at, v.ld, state.z, Ep_, pooled_any_, &ahead);
  pooled_any_ = true;
}

// u = f_s + m_s from the potential of the columns.
template <class F, class Source>
void Transport<F, Source>::log_rows(Source& src, int64_t row0, int64_t n, const F* logits, const F* potential, F lam) {
  for (int64_t i = 0; i < n; ++i) {
    const F mass = la[row0 + i], m = m_[row0 + i];
    const F lse = lam == 0 || mass == -kInf<F> ? F(0) : row_lse<F>(Mp_, logits + i * Mp_, potential);
    values_[i] = lse == -kInf<F> ? lse : mass - lam * (m + lse);  // f
    u_[i] = lse == -kInf<F> ? lse : shifted_potential<F>(src.wants_f(), mass, m, lam, lse);
  }
  if (src.wants_f()) src.store_f(row0, n, values_);
}

template <class F, class Source>
void Transport<F, Source>::log_block(Source& src, int64_t row0, int64_t n, const F* logits, F lam, bool pool) {
  log_rows(src, row0, n, logits, g, lam);
  for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
    const Vec<F> old = load(state.ref + j);
    Vec<F> top = old, sum{};
    for (int64_t i = 0; i < n; ++i) top = vmax(top, load(logits + i * Mp_ + j) + u_[i]);
    store(state.ref + j, top);
    top = top == -kInf<F> ? Vec<F>{} : top;
    const Vec<F> scale = vexp<F>(old - top);
    for (int64_t i = 0; i < n; ++i) {
      const Vec<F> w = vexp<F>(load(logits + i * Mp_ + j) + u_[i] - top);
      sum += w;
      store(tile_ + i * Mp_ + j, w);
    }
    store(state.sum + j, load(state.sum + j) * scale + sum);
    store(G_ + j, scale);
  }
  if (!pool) return;
  for (int64_t i = 0; state.lone && i < n; ++i) u_[i] = u_[i] != -kInf<F>;
  if (state.lone) return pool_lone(src, row0, n, u_);
  const Rows<F> v = src.values(row0, n, values_);
  for (int64_t j = 0; j < Mp_; ++j)
    for (int64_t e = 0; e < Ep_; e += kLanes<F>) store(state.z + j * Ep_ + e, load(state.z + j * Ep_ + e) * G_[j]);
  gemm<F>(Mp_, Ep_, n, tile_, 1, Mp_, v.at, v.ld, state.z, Ep_, true);
}

// c_j = shift + log Σ over the team; z_j = Σ/Σ.  False where a column's sum underflowed (only asked in scaled mode).
template <class F, class Source>
bool Transport<F, Source>::merge(const Marginals<F>& marg, F shift, bool pool, bool check, F* c_t, const Team& team) {
  const bool alone = team.size == 1;
  bool ok = true;
  if (pool && !alone) fill(z.data(), Mp_ * Ep_, F(0));
  const F* const pooled = alone ? state.z : z;
  for (int64_t j = 0; j < Mp_; ++j) {
    F ref = state.ref[j], sum = alone && ref != -kInf<F> ? state.sum[j] : F(0);
    for (int i = 0; i < team.size; ++i) ref = std::max(ref, team.template member<ColumnState<F>>(i).ref[j]);
    for (int i = 0; !alone && i < team.size && ref != -kInf<F>; ++i) {
      const auto& s = team.template member<ColumnState<F>>(i);
      const F scale = std::exp(s.ref[j] - ref);
      sum += s.sum[j] * scale;
      if (!pool) continue;
      for (int64_t e = 0; e < Ep_; e += kLanes<F>)
        store(z + j * Ep_ + e, load(z + j * Ep_ + e) + load(s.z + j * Ep_ + e) * scale);
    }
    if (check && j < marg.M && !(sum > Limits<F>::kColumn)) ok = false;
    c_t[j] = sum > 0 && j < marg.M ? static_cast<F>(std::log(static_cast<double>(sum)) + ref + shift) : -kInf<F>;
    if (absorbed_ && j < marg.M) c_t[j] -= hat_[j];
    const F inv = state.lone ? F(sum > 0) : sum > 0 ? 1 / sum : F(0);
    ref_[j] = ref == -kInf<F> ? F(0) : ref, inv_[j] = inv;
    for (int64_t e = 0; pool && e < Ep_; e += kLanes<F>) store(z + j * Ep_ + e, load(pooled + j * Ep_ + e) * inv);
  }
  return ok;
}

}  // namespace
}  // namespace sfk

#include "transport_pooling.h"
