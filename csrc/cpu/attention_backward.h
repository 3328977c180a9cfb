// set_attention and set_pool, backward: the queries give dz and dg^T, then the transport's backward runs over the keys.
#pragma once
#include "attention.h"
#include "gradients.h"
#include "transport_backward.h"

namespace sfk {
namespace {

// Keys of one head for TransportBackward: keeps κ of as many rows as the budget allows.
template <class F>
struct KeyGradSource {
  KeySource<F> keys;
  int64_t cached;
  Buffer<F> cache, tile, d_x;
  RefGrads<F>& grads;
  const F* kappa = nullptr;  // of the block whose logits were asked for last
  bool loaded = false;

  KeyGradSource(const AttentionParams& p, Refs<F>& refs, RefGrads<F>& grads_, int64_t rows)
      : keys(p, refs),
        cached(std::min(rows, p.S + tile_rows(refs.Mp))),
        cache(cached * refs.Mp),
        tile(tile_rows(refs.Mp) * refs.Mp),
        d_x(tile_rows(refs.Mp) * refs.Dp),
        grads(grads_) {}
  void begin(int64_t b, int64_t h, int64_t lo, const F* la) {
    keys.b = b, keys.h = h, keys.lo = lo, keys.la = la;
    known_ = 0;
  }
  static constexpr bool is_result = false;
  void restart() { grads.clear(keys.refs); }
  bool near() const { return keys.near(); }
  F middle() const { return keys.middle(); }
  F least_power() const { return keys.least_power(); }
  void logits(int64_t row0, int64_t n, F* out) {
    load_kappa(row0, n);
    logit_tile<F>(keys.refs, n, kappa, keys.pos, out);
  }
  void weights(int64_t row0, int64_t n, F* out, const F* G, F* dots) {
    load_kappa(row0, n);
    powers_of<false, F>(keys.refs, n, kappa, out, G, dots);
  }
  void load_kappa(int64_t row0, int64_t n) {
    const bool fits = row0 + n <= cached;
    F* k = fits ? cache + row0 * keys.refs.Mp : tile.data();
    loaded = !fits || row0 >= known_;
    if (loaded) {
      keys.load_keys(row0, n);
      Ahead ahead = ahead_of(keys.p.key, keys.b, keys.h, keys.lo + row0, n);
      kernel_tile<F>(keys.refs, n, keys.x, keys.inv, k, &ahead);
      if (fits) known_ = row0 + n;
    } else if (keys.refs.P) {
      load_rows<F>(keys.p.key_pos, keys.b, keys.h, keys.lo + row0, n, keys.la + row0, keys.pos, keys.refs.P);
    }
    kappa = k;
  }
  Rows<F> values(int64_t row0, int64_t n, F* room) { return keys.values(row0, n, room); }
  Ahead values_ahead(int64_t row0, int64_t n) const { return keys.values_ahead(row0, n); }
  void d_f(int64_t, int64_t, F*) {}
  Place<F> place_dv(int64_t row0, F* room) {
    return place_of<F>(keys.p.d_value, keys.b, keys.h, keys.lo + row0, room, keys.Ep);
  }
  void store_dv(int64_t row0, int64_t n, Place<F> dv, const F* room) {
    store_placed<F>(keys.p.d_value, keys.b, keys.h, keys.lo + row0, n, dv, room);
  }
  void accept(int64_t row0, int64_t n, F* dl, const F* totals) {
    const Refs<F>& refs = keys.refs;
    if (!loaded) keys.load_keys(row0, n);
    logit_grads<F>(refs, n, kappa, keys.pos, dl, totals, grads);
    token_grads<F>(refs, keys.b, keys.h, keys.lo + row0, n, keys.x, keys.inv, kappa, dl, keys.p.d_key, d_x, grads);
  }

 private:
  int64_t known_ = 0;
};

template <class F>
class BackwardWorker {
 public:
  struct Shared {
    Buffer<F> dz;       // this thread's share of the queries
    Buffer<double> dg;  // a long sum, whose error would be common to a whole column of dℓ
    typename TransportBackward<F, KeyGradSource<F>>::Shared transport;
    RefGrads<F>*query_grads, *key_grads;
  };

  BackwardWorker(const AttentionParams& p, int threads)
      : p_(p),
        refs_(p),
        query_grads_(refs_, p.d_references.data, p.d_hyper.data),
        key_grads_(refs_, p.d_references.data, p.d_hyper.data),
        source_(p, refs_, key_grads_, cache_rows<F>(p, threads)),
        transport_(p.S, tile_rows(refs_.Mp), refs_.Mp, p.E, p.T),
        Ep_(pad<F>(p.E)),
        zt_(p.E * refs_.Mp),
        g_(refs_.Mp),
        powers_(refs_.Mp),
        kappa_(tile_rows(refs_.Mp) * refs_.Mp),
        w_(tile_rows(refs_.Mp) * refs_.Mp),
        dp_(tile_rows(refs_.Mp) * refs_.Mp),
        d_o_(tile_rows(refs_.Mp) * Ep_),
        d_x_(tile_rows(refs_.Mp) * refs_.Dp),
        scale_(tile_rows(refs_.Mp)),
        dg_block_(refs_.Mp) {
    shared_.dz.reset(refs_.Mp * Ep_);
    shared_.dg.reset(refs_.Mp);
    shared_.query_grads = &query_grads_;
    shared_.key_grads = &key_grads_;
    query_grads_.balanced = true;
    key_grads_.balanced = transport_.given.balanced = !p.d_c;
  }
  Shared& shared() { return shared_; }

  void run(int64_t item, const Team& team) {
    const int64_t h = item / p_.B, b = item % p_.B, Mp = refs_.Mp;
    refs_.pack(p_, h);
    const auto [lo, hi] = team.share(p_.S, tile_rows(Mp));
    query_grads_.clear(refs_), key_grads_.clear(refs_);
    if (p_.reading) return read(b, h, team);
    if (!load_log_mass<F>(p_, b, h, lo, hi, transport_.given.la)) return store_zeros(b, h, lo, hi, team);
    load_state(b, h);
    fill(shared_.dz.data(), Mp * Ep_, F(0));
    fill(shared_.dg.data(), Mp, 0.0);
    if (p_.d_o) queries(b, h, team);
    team.sync();
    merge_queries(b, h, team, bool(p_.d_z));
    team.sync();
    source_.begin(b, h, lo, transport_.given.la);
    transport_.given.center = transport_.given.balanced ? refs_.middle_logit() : F(0);
    const Marginals<F> marg{p_.M, Mp, p_.T, refs_.lam_a, refs_.lam_b, refs_.log_b};
    std::vector<const typename TransportBackward<F, KeyGradSource<F>>::Shared*> members;
    for (int i = 0; i < team.size; ++i) members.push_back(&team.template member<Shared>(i).transport);
    transport_.run(source_, marg, hi - lo, team, shared_.transport, members.data());
    key_grads_.hyper[kLambdaA] += transport_.gradients.d_lam_a;
    if (team.rank == 0) key_grads_.hyper[kLambdaB] += transport_.gradients.d_lam_b;
    if (p_.d_log_a) {
      F* out = static_cast<F*>(p_.d_log_a.data) + b * p_.d_log_a.stride[0] + h * p_.d_log_a.stride[1];
      for (int64_t s = lo; s < hi; ++s) out[s * p_.d_log_a.stride[2]] = transport_.gradients.d_la[s - lo];
    }
    team.sync();
    if (team.rank == 0) store_parameters(b, h, team);
    team.sync();
  }

 private:
  // The read alone: dz and dg are results.
  void read(int64_t b, int64_t h, const Team& team) {
    const int64_t Mp = refs_.Mp;
    const bool any = load_memory<F>(p_, b, h, transport_.given.z, g_);
    transpose<F>(Mp, p_.E, transport_.given.z, Ep_, zt_, Mp);
    fill(shared_.dz.data(), Mp * Ep_, F(0));
    fill(shared_.dg.data(), Mp, 0.0);
    if (any) queries(b, h, team);
    team.sync();
    if (team.rank == 0) {
      merge_queries(b, h, team, false);
      store_memory(b, h);
      any ? store_parameters(b, h, team) : store_zero_parameters(b, h);
    }
    if (!any) clear_queries(b, h, team);
    team.sync();
  }

  void store_memory(int64_t b, int64_t h) {
    const Block<F> d_z(p_.d_z, b, h);
    for (int64_t j = 0; d_z && j < p_.M; ++j)
      for (int64_t e = 0; e < p_.E; ++e) d_z(j, e) = transport_.given.dz[j * Ep_ + e];
    for (int64_t j = 0; p_.d_g && j < p_.M; ++j)
      store_row<F>(p_.d_g, vector_offset(p_.d_g, b, h, j), 1, 1, transport_.given.dg + j);
  }

  void load_state(int64_t b, int64_t h) {
    const int64_t Mp = refs_.Mp, steps = std::max<int64_t>(p_.T, 1);
    const Block<F> c(p_.c, b, h), d_c(p_.d_c, b, h);
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t j = 0; j < Mp; ++j) {
        transport_.given.c[t * Mp + j] = j < p_.M ? c(t, j) : -kInf<F>;
        transport_.given.d_c[t * Mp + j] = d_c && j < p_.M ? d_c(t, j) : F(0);
      }
    fill(transport_.given.z.data(), Mp * Ep_, F(0));
    for (int64_t j = 0; p_.E > 0 && j < p_.M; ++j) load_row_of<F>(p_.z, b, h, j, transport_.given.z + j * Ep_);
    transpose<F>(Mp, p_.E, transport_.given.z, Ep_, zt_, Mp);
    const F* last = transport_.given.c + (steps - 1) * Mp;
    for (int64_t j = 0; j < Mp; ++j)
      g_[j] = p_.T == 0 ? refs_.log_b[j] : last[j] == -kInf<F> ? last[j] : refs_.log_b[j] - refs_.lam_b * last[j];
  }

  void queries(int64_t b, int64_t h, const Team& team) {
    const int64_t rows = tile_rows(refs_.Mp);
    const auto [lo, hi] = team.share(p_.L, rows);
    near_ = read_powers<F>(refs_, g_, powers_);
    for (int64_t row0 = lo; row0 < hi; row0 += rows) query_block(b, h, row0, std::min(rows, hi - row0));
  }

  // W^q and dS of one block; dz += W^qᵀ dO, dg += Σ_i dS, dq.
  void query_block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    const int64_t Mp = refs_.Mp;
    source_.keys.b = b, source_.keys.h = h;
    source_.keys.load_queries(row0, n);
    const Rows<F> x = source_.keys.x;
    const F *inv = source_.keys.inv, *pos = source_.keys.pos;
    Ahead ahead = ahead_of(p_.query, b, h, row0, n), ahead_o = ahead_of(p_.d_o, b, h, row0, n);
    kernel_tile<F>(refs_, n, x, inv, kappa_, &ahead);
    if (near_) {
      powers_of<true, F>(refs_, n, kappa_, w_, powers_, scale_);
      for (int64_t i = 0; i < n; ++i) scale_[i] = 1 / scale_[i];
    } else {
      logit_tile<F>(refs_, n, kappa_, pos, w_);
      exp_rows<F>(n, Mp, w_, g_, scale_);
    }
    const Rows<F> d_o = rows_of<F>(p_.d_o, b, h, row0, n, nullptr, d_o_, Ep_);
    gemm<F>(n, Mp, p_.E, d_o.at, d_o.ld, 1, zt_, Mp, dp_, Mp, false, &ahead_o);
    drop<F>(p_, b, h, row0, n, Mp, dp_);
    fill(dg_block_.data(), Mp, F(0));
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> dot{};
      for (int64_t j = 0; j < Mp; j += kLanes<F>) dot += load(w_ + i * Mp + j) * load(dp_ + i * Mp + j);
      // The same factor normalises W and the mean, so that a row of dS sums to 0 to rounding of its own terms.
      const F mean = reduce_add<F>(dot) * scale_[i];
      for (int64_t j = 0; j < Mp; j += kLanes<F>) {
        const Vec<F> w = load(w_ + i * Mp + j) * scale_[i], ds = w * (load(dp_ + i * Mp + j) - mean);
        store(w_ + i * Mp + j, w);
        store(dp_ + i * Mp + j, ds);
        store(dg_block_ + j, load(dg_block_ + j) + ds);
      }
    }
    for (int64_t j = 0; j < Mp; ++j) shared_.dg[j] += dg_block_[j];
    drop<F>(p_, b, h, row0, n, Mp, w_);
    gemm<F>(p_.M, Ep_, n, w_, 1, Mp, d_o.at, d_o.ld, shared_.dz, Ep_, true);
    logit_grads<F>(refs_, n, kappa_, pos, dp_, static_cast<const F*>(nullptr), query_grads_);
    token_grads<F>(refs_, b, h, row0, n, x, inv, kappa_, dp_, p_.d_query, d_x_, query_grads_);
  }

  // dz and dg^T from all of the team, and what arrives at z besides.
  void merge_queries(int64_t b, int64_t h, const Team& team, bool arriving) {
    const int64_t Mp = refs_.Mp;
    const Block<F> d_z(p_.d_z, b, h);
    fill(transport_.given.dz.data(), Mp * Ep_, F(0));
    for (int64_t j = 0; arriving && j < p_.M; ++j)
      for (int64_t e = 0; e < p_.E; ++e) transport_.given.dz[j * Ep_ + e] = d_z(j, e);
    for (int i = 0; i < team.size; ++i) {
      const Shared& s = team.template member<Shared>(i);
      for (int64_t k = 0; k < Mp * Ep_; ++k) transport_.given.dz[k] += s.dz[k];
    }
    for (int64_t j = 0; j < Mp; ++j) {
      double sum = 0;
      for (int i = 0; i < team.size; ++i) sum += team.template member<Shared>(i).dg[j];
      transport_.given.dg[j] = static_cast<F>(sum);
    }
  }

  void store_parameters(int64_t b, int64_t h, const Team& team) {
    for (int i = 0; i < team.size; ++i) {
      const Shared& s = team.template member<Shared>(i);
      if (i > 0) query_grads_.add(refs_, *s.query_grads);
      query_grads_.add(refs_, *s.key_grads);
    }
    store_ref_grads<F>(refs_, b, h, query_grads_, p_.d_references, p_.d_ref_pos);
    const Block<F> d_log_b(p_.d_log_b, b, h), d_hyper(p_.d_hyper, b, h);
    for (int64_t j = 0; d_log_b && j < p_.M; ++j) d_log_b(j, 0) = transport_.gradients.d_log_b[j];
    for (int i = 0; d_hyper && i < kNumHyper; ++i) d_hyper(i, 0) = static_cast<F>(query_grads_.hyper[i]);
  }

  void clear(const View& v, int64_t b, int64_t h, int64_t from, int64_t to) {
    const std::vector<F> zeros(std::max({p_.D, p_.E, p_.P, int64_t(1)}), F(0));
    for (int64_t i = from; v && i < to; ++i)
      store_row<F>(v, b * v.stride[0] + h * v.stride[1] + i * v.stride[2], v.stride[3], v.size[3], zeros.data());
  }

  // No key of this head takes part: every gradient is 0.
  void store_zeros(int64_t b, int64_t h, int64_t lo, int64_t hi, const Team& team) {
    clear_queries(b, h, team);
    clear(p_.d_key, b, h, lo, hi), clear(p_.d_value, b, h, lo, hi);
    for (int64_t s = lo; p_.d_log_a && s < hi; ++s)
      static_cast<F*>(p_.d_log_a.data)[vector_offset(p_.d_log_a, b, h, s)] = 0;
    if (team.rank == 0) store_zero_parameters(b, h);
  }
  void clear_queries(int64_t b, int64_t h, const Team& team) {
    const auto [lo, hi] = team.share(p_.L, tile_rows(refs_.Mp));
    clear(p_.d_query, b, h, lo, hi);
  }
  void store_zero_parameters(int64_t b, int64_t h) {
    clear(p_.d_references, b, h, 0, p_.M), clear(p_.d_log_b, b, h, 0, p_.M), clear(p_.d_hyper, b, h, 0, kNumHyper);
    clear(p_.d_ref_pos, b, h, 0, p_.M);
  }

  const AttentionParams& p_;
  Refs<F> refs_;
  RefGrads<F> query_grads_, key_grads_;
  KeyGradSource<F> source_;
  TransportBackward<F, KeyGradSource<F>> transport_;
  Shared shared_;
  int64_t Ep_;
  bool near_ = false;  // whether queries are weighed by powers_
  Buffer<F> zt_, g_, powers_, kappa_, w_, dp_, d_o_, d_x_, scale_, dg_block_;
};

template <class F>
void attention_backward(const AttentionParams& p) {
  if (p.B * p.H == 0) return;
  const int threads = useful_threads(p.threads, 2.5 * attention_flops(p));
  std::vector<std::unique_ptr<BackwardWorker<F>>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<BackwardWorker<F>>(p, threads));
  run_team(workers, p.B * p.H);
}

}  // namespace
}  // namespace sfk
