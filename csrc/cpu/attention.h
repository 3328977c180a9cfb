// set_attention and set_pool, forward: transport of the keys, then the read of every query.
#pragma once
#include "logits.h"
#include "transport.h"

namespace sfk {
namespace {

// Per-thread scratch beyond the tiles may take this share of the bytes of q, k, v, o, or this much where they are few.
constexpr double kScratchShare = 0.2;
constexpr int64_t kScratchFloor = 1 << 18;

// Rows of [Mp] numbers a thread may keep.
template <class F>
int64_t cache_rows(const AttentionParams& p, int threads) {
  const double tensors = static_cast<double>(p.B * p.H) * (p.S * (p.D + p.E) + p.L * (p.D + p.E));
  const double share = kScratchShare * tensors * element_size(p.key.dtype) / threads;
  return static_cast<int64_t>(std::max<double>(share, kScratchFloor) / (sizeof(F) * pad<F>(p.M)));
}

inline double attention_flops(const AttentionParams& p) {
  return 2.0 * p.B * p.H * p.M * (p.D + p.E + 40.0) * static_cast<double>(p.S + p.L);
}

// This head's log masses of keys lo..hi (−log S each when none are given); false where no key of the head takes part.
template <class F>
bool load_log_mass(const AttentionParams& p, int64_t b, int64_t h, int64_t lo, int64_t hi, F* la) {
  if (!p.log_a) {
    fill(la, hi - lo, -std::log(static_cast<F>(p.S)));
    return p.S > 0;
  }
  const int64_t base = b * p.log_a.stride[0] + h * p.log_a.stride[1], stride = p.log_a.stride[2];
  load_row<F>(p.log_a, base + lo * stride, stride, hi - lo, la);
  bool any = false;
  for (int64_t s = lo; s < hi; ++s) any |= la[s - lo] != -kInf<F>;
  F other = -kInf<F>;
  for (int64_t s = 0; !any && s < p.S; ++s) {
    load_row<F>(p.log_a, base + s * stride, 1, 1, &other);
    any = other != -kInf<F>;
  }
  return any;
}

// Element j of one head's vector of a tensor [B,H,M].
inline int64_t vector_offset(const View& v, int64_t b, int64_t h, int64_t j) {
  return b * v.stride[0] + h * v.stride[1] + j * v.stride[2];
}

// The given z [Mp][Ep] and g [Mp] of one head; false where g says that no key takes part.
template <class F>
bool load_memory(const AttentionParams& p, int64_t b, int64_t h, F* z, F* g) {
  const int64_t Ep = pad<F>(p.E), Mp = pad<F>(p.M);
  fill(z, Mp * Ep, F(0));
  fill(g, Mp, -kInf<F>);
  const Block<F> given(p.z, b, h);
  for (int64_t j = 0; j < p.M; ++j)
    for (int64_t e = 0; e < p.E; ++e) z[j * Ep + e] = given(j, e);
  load_row<F>(p.g, vector_offset(p.g, b, h, 0), p.g.stride[2], p.M, g);
  return std::any_of(g, g + p.M, [](F x) { return x != -kInf<F>; });
}

// Keys lo.. of one head as rows of logits, and their values.
template <class F>
struct KeySource {
  const AttentionParams& p;
  Refs<F>& refs;
  const F* la = nullptr;
  int64_t b = 0, h = 0, lo = 0;
  int64_t Ep;
  Rows<F> x;  // [n][Dp] of the tokens that were loaded last
  Buffer<F> inv, pos, room;

  KeySource(const AttentionParams& p_, Refs<F>& refs_)
      : p(p_),
        refs(refs_),
        Ep(pad<F>(p_.E)),
        inv(tile_rows(refs_.Mp)),
        pos(tile_rows(refs_.Mp) * refs_.P),
        room(tile_rows(refs_.Mp) * refs_.Dp) {}
  void load_keys(int64_t row0, int64_t n) { load_tokens(p.key, p.key_pos, lo + row0, n, la + row0); }
  void load_queries(int64_t row0, int64_t n) { load_tokens(p.query, p.query_pos, row0, n, nullptr); }
  void load_tokens(const View& tokens, const View& places, int64_t row0, int64_t n, const F* skip) {
    x = rows_of<F>(tokens, b, h, row0, n, skip, room, refs.Dp);
    if (refs.rbf) inverse_norms<F>(x, n, refs.Dp, inv);
    if (refs.P) load_rows<F>(places, b, h, row0, n, skip, pos, refs.P);
  }
  void logits(int64_t row0, int64_t n, F* tile) {
    load_keys(row0, n);
    Ahead ahead = ahead_of(p.key, b, h, lo + row0, n);
    logits_of<F>(refs, n, x, inv, pos, tile, &ahead);
  }
  bool near() const { return refs.near(); }
  F middle() const { return refs.middle_logit(); }
  F least_power() const { return refs.least_power(); }
  void weights(int64_t row0, int64_t n, F* tile, const F* G, F* dots) {
    load_keys(row0, n);
    Ahead ahead = ahead_of(p.key, b, h, lo + row0, n);
    weights_of<false, F>(refs, n, x, inv, tile, G, dots, &ahead);
  }
  Rows<F> values(int64_t row0, int64_t n, F* tile) {
    return rows_of<F>(p.value, b, h, lo + row0, n, la + row0, tile, Ep);
  }
  void load_values(int64_t row0, int64_t n, F* tile) { load_rows<F>(p.value, b, h, lo + row0, n, la + row0, tile, Ep); }
  Ahead values_ahead(int64_t row0, int64_t n) const { return ahead_of(p.value, b, h, lo + row0, n); }
  static constexpr bool wants_f() { return false; }
  void store_f(int64_t, int64_t, const F*) {}
};

// Row softmax of ℓ + g in place, up to the factor scale[i] = 1/Σ_j that the caller applies; a row that sees nothing
// becomes 0.
template <class F>
void exp_rows(int64_t n, int64_t Mp, F* tile, const F* g, F* scale) {
  for (int64_t i = 0; i < n; ++i, tile += Mp) {
    Vec<F> top = splat(-kInf<F>), sum{};
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> x = load(tile + j) + load(g + j);
      store(tile + j, x);
      top = vmax(top, x);
    }
    const F m = reduce_max<F>(top);
    scale[i] = 0;
    if (m == -kInf<F>) {
      fill(tile, Mp, F(0));
      continue;
    }
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> w = vexp<F>(load(tile + j) - m);
      store(tile + j, w);
      sum += w;
    }
    scale[i] = 1 / reduce_add<F>(sum);
  }
}

// Whether queries may be weighed by e^{g − max g} [Mp], and these.  Not where logits are not near, nor where they are
// of one reference: its weight is 1, and exactly so by `exp_rows`.
template <class F>
bool read_powers(const Refs<F>& r, const F* g, F* powers) {
  if (!r.near() || std::count(g, g + r.M, -kInf<F>) >= r.M - 1) return false;
  F spread;
  exp_shifted<F>(r.M, r.Mp, g, powers, spread);
  return true;
}

// Multiplies rows row0.. of W^q (or of its gradient) by the dropout mask.
template <class F>
void drop(const AttentionParams& p, int64_t b, int64_t h, int64_t row0, int64_t n, int64_t Mp, F* tile) {
  if (p.dropout_p <= 0) return;
  const uint64_t threshold = static_cast<uint64_t>(p.dropout_p * 4294967296.0);
  const F scale = p.dropout_p < 1 ? static_cast<F>(1 / (1 - p.dropout_p)) : F(0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < p.M; ++j) {
      const uint64_t at = static_cast<uint64_t>(((b * p.H + h) * p.L + row0 + i) * p.M + j);
      tile[i * Mp + j] *= philox(p.seed, at) >= threshold ? scale : F(0);
    }
}

template <class F>
class ForwardWorker {
 public:
  ForwardWorker(const AttentionParams& p, int threads)
      : p_(p),
        refs_(p),
        source_(p, refs_),
        transport_(p.S, cache_rows<F>(p, threads), tile_rows(refs_.Mp), refs_.Mp, pad<F>(p.E), p.T, bool(p.w_k)),
        weights_(tile_rows(refs_.Mp) * refs_.Mp),
        out_(tile_rows(refs_.Mp) * pad<F>(p.E)),
        scale_(tile_rows(refs_.Mp)),
        powers_(refs_.Mp) {}
  ColumnState<F>& shared() { return transport_.state; }

  void run(int64_t item, const Team& team) {
    const int64_t h = item / p_.B, b = item % p_.B;
    refs_.pack(p_, h);
    if (p_.reading) return read(b, h, team, load_memory<F>(p_, b, h, transport_.z, transport_.g));
    const auto [lo, hi] = team.share(p_.S, tile_rows(refs_.Mp));
    source_.b = b, source_.h = h, source_.lo = lo, source_.la = transport_.la;
    const Marginals<F> marg{p_.M, refs_.Mp, p_.T, refs_.lam_a, refs_.lam_b, refs_.log_b};
    const bool any = load_log_mass<F>(p_, b, h, lo, hi, transport_.la);
    if (any) {
      transport_.run(source_, marg, hi - lo, -1, team);
    } else {
      fill(transport_.c.data(), std::max<int64_t>(p_.T, 1) * refs_.Mp, -kInf<F>);
      fill(transport_.z.data(), refs_.Mp * pad<F>(p_.E), F(0));
    }
    if (p_.w_k) store_pooling(b, h, lo, hi, marg, any);
    if (team.rank == 0 && p_.c) store_state(b, h);
    if (p_.o) read(b, h, team, any);
  }

 private:
  void store_state(int64_t b, int64_t h) {
    for (int64_t t = 0; t < std::max<int64_t>(p_.T, 1); ++t)
      store_row_of<F>(p_.c, b, h, t, transport_.c + t * refs_.Mp);
    for (int64_t j = 0; p_.E > 0 && j < p_.M; ++j) store_row_of<F>(p_.z, b, h, j, transport_.z + j * pad<F>(p_.E));
    if (!p_.g) return;
    const F* last = transport_.c + (std::max<int64_t>(p_.T, 1) - 1) * refs_.Mp;
    for (int64_t j = 0; j < p_.M; ++j) {
      const F g = last[j] == -kInf<F> ? -kInf<F> : transport_.g[j];
      store_row<F>(p_.g, vector_offset(p_.g, b, h, j), 1, 1, &g);
    }
  }

  // Rows lo..hi of W^k.
  void store_pooling(int64_t b, int64_t h, int64_t lo, int64_t hi, const Marginals<F>& marg, bool any) {
    const int64_t rows = tile_rows(refs_.Mp), Mp = refs_.Mp;
    for (int64_t row0 = lo; row0 < hi; row0 += rows) {
      const int64_t n = std::min(rows, hi - row0);
      if (!any) fill(weights_.data(), n * Mp, F(0));
      F* const w = any ? transport_.pooled(source_, marg, row0 - lo, n) : weights_.data();
      store_rows<F>(p_.w_k, b, h, row0, n, w, Mp, nullptr);
    }
  }

  void read(int64_t b, int64_t h, const Team& team, bool any) {
    const int64_t rows = tile_rows(refs_.Mp), Mp = refs_.Mp, Ep = pad<F>(p_.E);
    const auto [lo, hi] = team.share(p_.L, rows);
    source_.b = b, source_.h = h;
    near_ = any && read_powers<F>(refs_, transport_.g, powers_);
    for (int64_t row0 = lo; row0 < hi; row0 += rows) {
      const int64_t n = std::min(rows, hi - row0);
      if (!any) {
        store_nothing(b, h, row0, n);
        continue;
      }
      source_.load_queries(row0, n);
      query_weights(b, h, row0, n);
      drop<F>(p_, b, h, row0, n, Mp, weights_);
      Ahead ahead = ahead_of(p_.o, b, h, row0, n);
      const Place<F> o = place_of<F>(p_.o, b, h, row0, out_, Ep);
      gemm<F>(n, Ep, p_.M, weights_, Mp, 1, transport_.z, Ep, o.at, o.ld, Finish<F>{false, scale_}, &ahead);
      store_placed<F>(p_.o, b, h, row0, n, o, out_);
      if (p_.w_q) store_rows<F>(p_.w_q, b, h, row0, n, weights_.data(), Mp, scale_);
    }
  }

  // The zeros that queries read where no key takes part, whatever z holds.
  void store_nothing(int64_t b, int64_t h, int64_t row0, int64_t n) {
    fill(out_.data(), n * pad<F>(p_.E), F(0));
    fill(weights_.data(), n * refs_.Mp, F(0));
    store_rows<F>(p_.o, b, h, row0, n, out_.data(), pad<F>(p_.E), nullptr);
    if (p_.w_q) store_rows<F>(p_.w_q, b, h, row0, n, weights_.data(), refs_.Mp, nullptr);
  }

  // W^q of the queries that are loaded but for the factor scale of each row.
  void query_weights(int64_t b, int64_t h, int64_t row0, int64_t n) {
    Ahead ahead = ahead_of(p_.query, b, h, row0, n);
    if (!near_) {
      logits_of<F>(refs_, n, source_.x, source_.inv, source_.pos, weights_, &ahead);
      return exp_rows<F>(n, refs_.Mp, weights_, transport_.g, scale_);
    }
    weights_of<true, F>(refs_, n, source_.x, source_.inv, weights_, powers_, scale_, &ahead);
    for (int64_t i = 0; i < n; ++i) scale_[i] = 1 / scale_[i];
  }

  const AttentionParams& p_;
  Refs<F> refs_;
  KeySource<F> source_;
  Transport<F, KeySource<F>> transport_;
  Buffer<F> weights_, out_, scale_;
  Buffer<F> powers_;   // [Mp] e^{g − max g}
  bool near_ = false;  // whether queries are weighed by them
};

template <class F>
void attention_forward(const AttentionParams& p) {
  if (p.B * p.H == 0) return;
  const int threads = useful_threads(p.threads, attention_flops(p));
  std::vector<std::unique_ptr<ForwardWorker<F>>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<ForwardWorker<F>>(p, threads));
  run_team(workers, p.B * p.H);
}

}  // namespace
}  // namespace sfk
