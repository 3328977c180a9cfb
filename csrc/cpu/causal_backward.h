// Backward of the causal scan, T <= 1: the scan again gives dS and dq; then a scan from the end gives dk and dv.
//
// With G_j = Σ_{i>=s} (W^q_ij/C_ij) dO_i and h_j = Σ_{i>=s} (d log C_ij)/C_ij, both kept scaled by C_sj:
// t_sj = dω_sj = p_sj (⟨G_j, v_s⟩ + h_j), p_sj = e^{ω_sj}/C_sj;  dv_s = Σ_j p_sj G_j.
// The gradient of the final state is where G and h begin, and they end at that of the initial one.  A gate scales what
// came before: d log γ_s = Σ_j ρ_sj (⟨G_j, z_{s-1,j}⟩ + h_j), ρ_sj the part of C_sj that it leaves of C_{s-1,j}.  It is
// also a sum of dω over later keys, but one that nearly cancels.
#pragma once
#include "anchors.h"
#include "causal.h"
#include "chunk_backward.h"
#include "gradients.h"

namespace sfk {
namespace {

template <class F>
class CausalBackwardWorker {
 public:
  explicit CausalBackwardWorker(const CausalParams& p)
      : p_(p),
        refs_(p),
        grads_(refs_, p.d_references.data, p.d_hyper.data),
        source_(p, refs_),
        rows_(chunk_rows(refs_.Mp)),
        Mp_(refs_.Mp),
        Ep_(pad<F>(p.E)),
        scan_(p.M, Mp_, Ep_),
        chunk_(p.M, Mp_, rows_, Ep_),
        chunk_grads_(p.M, Mp_, rows_, p.E, Ep_),
        near_((p.S + rows_ - 1) / rows_),
        carried_(p.M, Mp_, p.E, Ep_),
        gates_(p, rows_),
        la_(p.S),
        anchors_(p.M, p.S, Ep_),
        log_decay_(p.S),
        top_(p.S * Mp_),
        sum_(p.S * Mp_),
        weight_(p.S * Mp_),
        log_c_(Mp_),
        d_log_c_(p.S * Mp_),
        kappa_(rows_ * Mp_),
        tile_(rows_ * Mp_),
        ds_(rows_ * Mp_),
        v_(rows_ * Ep_),
        d_o_(rows_ * Ep_),
        dv_(rows_ * Ep_),
        d_x_(rows_ * refs_.Dp),
        lse_(rows_),
        scale_(rows_),
        row_top_(rows_),
        row_sum_(rows_),
        totals_(rows_),
        g_(Mp_),
        dp_(Mp_),
        from_anchor_(Mp_),
        d_log_b_(Mp_),
        G_(Mp_ * Ep_),
        mask_(Mp_),
        h_(Mp_),
        factors_(Mp_),
        top0_(Mp_),
        sum0_(Mp_) {
    // A state that came in, or a gradient of the one that went out, takes a share of what the dω sum to.
    grads_.balanced = !p.initial && !p.d_final;
    if (!p.d_log_decay) return;
    starts_.reset((p.S + kSpan - 1) / kSpan * p.M * Ep_);
    before_.reset(kSpan * p.M * Ep_);
    rho_.reset(kSpan * Mp_);
  }

  void run(int64_t item) {
    const int64_t h = item / p_.B, b = item % p_.B;
    refs_.pack(p_, h);
    grads_.clear(refs_);
    source_.b = b, source_.h = h, source_.lo = 0, source_.la = la_;
    load_masses<F>(p_, b, h, la_);
    fill(d_log_b_.data(), Mp_, F(0));
    carried_.load_state(p_.initial, b, h);
    far_ = !refs_.near();
    anchors_.start(far_);
    for (int64_t row0 = 0; row0 < p_.S; row0 += rows_) forward_block(b, h, row0, std::min(rows_, p_.S - row0));
    begin_reverse(b, h);
    for (int64_t row0 = (p_.S - 1) / rows_ * rows_; p_.S && row0 >= 0; row0 -= rows_)
      reverse_block(b, h, row0, std::min(rows_, p_.S - row0));
    if (p_.d_initial) end_reverse(b, h);
    store_ref_grads<F>(refs_, b, h, grads_, p_.d_references, p_.d_ref_pos);
    const Block<F> d_log_b(p_.d_log_b, b, h), d_hyper(p_.d_hyper, b, h);
    for (int64_t j = 0; d_log_b && j < p_.M; ++j) d_log_b(j, 0) = d_log_b_[j];
    for (int i = 0; d_hyper && i < kNumHyper; ++i) d_hyper(i, 0) = static_cast<F>(grads_.hyper[i]);
  }

 private:
  static constexpr int64_t kSpan = 16;  // tokens whose z are kept at a time: they stay in the second-level cache

  // Scans a block: W^q, log C and d log C of every query, dS, dq.
  void forward_block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    source_.logits(row0, n, tile_);
    causal_weights<F>(refs_, p_.T, n, la_ + row0, tile_, lse_);
    source_.load_values(row0, n, v_);
    load_rows<F>(p_.d_o, b, h, row0, n, nullptr, d_o_, Ep_);
    source_.load_queries(row0, n);
    const Rows<F> x = source_.x;
    const F *inv = source_.inv, *pos = source_.pos;
    kernel_tile<F>(refs_, n, x, inv, kappa_);
    logit_tile<F>(refs_, n, kappa_, pos, ds_);
    gates_.load(p_, b, h, row0, n);
    std::copy(gates_.log.data(), gates_.log + n, log_decay_ + row0);
    scan_.begin(carried_);
    if (row0 == 0) std::copy(scan_.top.data(), scan_.top + Mp_, top0_.data());
    if (row0 == 0) std::copy(scan_.sum.data(), scan_.sum + Mp_, sum0_.data());
    const bool near = !p_.log_decay && chunk_.begin(n, la_ + row0, tile_, nullptr, v_, scan_);
    near_[row0 / rows_] = near;
    if (near) forward_chunk(b, h, row0, n);
    for (int64_t i = 0; !near && i < n; ++i) {
      if (p_.d_log_decay && i % kSpan == 0) keep_means((row0 + i) / kSpan);
      far_ ? forward_step<true>(b, h, row0, i) : forward_step<false>(b, h, row0, i);
    }
    if (row0 + n < p_.S || p_.d_final)
      near ? chunk_.add_to(carried_, n, v_, 0) : carried_.add(n, tile_, gates_.fading(), v_, gates_.sum);
    logit_grads<F>(refs_, n, kappa_, pos, ds_, static_cast<const F*>(nullptr), grads_);
    token_grads<F>(refs_, b, h, row0, n, x, inv, kappa_, ds_, p_.d_query, d_x_, grads_);
  }

  template <bool kFar>
  void forward_step(int64_t b, int64_t h, int64_t row0, int64_t i) {
    const int64_t s = row0 + i;
    F* ds = ds_ + i * Mp_;
    la_[s] == -kInf<F> ? scan_.stay() : scan_.advance(tile_ + i * Mp_, gates_.log[i]);
    std::copy(scan_.top.data(), scan_.top + Mp_, top_ + s * Mp_);
    std::copy(scan_.sum.data(), scan_.sum + Mp_, sum_ + s * Mp_);
    if (kFar && la_[s] != -kInf<F>) anchors_.advance(s, tile_ + i * Mp_, scan_.top, v_ + i * Ep_);
    if (kFar) anchors_.keep(s);
    if (!scan_.seen) {
      for (F* p : {weight_ + s * Mp_, d_log_c_ + s * Mp_, ds}) fill(p, Mp_, F(0));
      return;
    }
    scan_.log_sums(log_c_);
    causal_read<F>(refs_, p_.T, log_c_, ds, g_);
    fill(dp_.data(), Mp_, F(0));
    if (kFar) fill(from_anchor_.data(), Mp_, F(0));
    for (int64_t j = 0; j < p_.M; ++j) {
      Vec<F> acc{}, beyond{};
      const F *a = anchors_[j], inverse = 1 / scan_.sum[j];
      for (int64_t e = 0; e < Ep_; e += kLanes<F>) {
        F* at = scan_.n + j * Ep_ + e;
        const Vec<F> n = load(at) * scan_.scale[j] + load(v_ + i * Ep_ + e) * scan_.weight[j];
        const Vec<F> d_o = load(d_o_ + i * Ep_ + e);
        store(at, n);
        acc += n * d_o;
        if (kFar) beyond += (n * inverse - load(a + e)) * d_o;
      }
      dp_[j] = reduce_add<F>(acc) / scan_.sum[j];
      if (kFar) from_anchor_[j] = reduce_add<F>(beyond);
    }
    query_gradient(b, h, s, ds, dp_, kFar ? from_anchor_.data() : nullptr);
  }

  // `forward_step` of all queries of a chunk.
  void forward_chunk(int64_t b, int64_t h, int64_t row0, int64_t n) {
    chunk_grads_.pooled(n, chunk_, scan_, v_, d_o_);
    chunk_.weights(refs_, p_.T, n, ds_, g_, scale_);
    chunk_.save_sums(n, scan_, top_ + row0 * Mp_, sum_ + row0 * Mp_);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (row0 + i) * Mp_;
      F* ds = ds_ + i * Mp_;
      if (top_[at] == -kInf<F>) {
        for (F* p : {weight_ + at, d_log_c_ + at, ds}) fill(p, Mp_, F(0));
        continue;
      }
      for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
        store(ds + j, load(ds + j) * scale_[i]);
        if (grads_.wants_hyper) store(log_c_ + j, load(top_ + at + j) + vlog<F>(load(sum_ + at + j)));
      }
      query_gradient(b, h, row0 + i, ds, chunk_grads_.p + i * Mp_);
    }
  }

  // From W of query s, in place, and ⟨dO_s, z_j⟩ to dS; keeps W (dropped) and d log C, with ⟨dO_s, z_j⟩ from anchors
  // where that is given.
  void query_gradient(int64_t b, int64_t h, int64_t s, F* ds, F* dp, const F* from_anchor = nullptr) {
    F *w = weight_ + s * Mp_, *d_log_c = d_log_c_ + s * Mp_;
    std::copy(ds, ds + Mp_, w);
    fill(mask_.data(), Mp_, F(1));
    drop<F>(p_, b, h, s, 1, Mp_, mask_);
    Vec<F> means{}, totals{};
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> d = load(dp + j) * load(mask_ + j), weight = load(ds + j);
      store(dp + j, d);
      means += d * weight;
      totals += weight;
    }
    const F total = reduce_add<F>(totals), mean = total > 0 ? reduce_add<F>(means) / total : F(0);
    const F lam = p_.T ? refs_.lam_b : F(0);
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> weight = load(w + j), d = load(dp + j), grad = weight * (d - mean);
      store(ds + j, grad);
      store(d_log_c + j, -weight * (from_anchor ? load(from_anchor + j) * load(mask_ + j) : d) - grad * lam);
      store(d_log_b_ + j, load(d_log_b_ + j) + grad);
      store(w + j, weight * load(mask_ + j));
    }
    if (!p_.T || !grads_.wants_hyper) return;
    for (int64_t j = 0; j < p_.M; ++j) grads_.hyper[kLambdaB] -= static_cast<double>(ds[j]) * log_c_[j];
  }

  // z of the scan, where the span of so many tokens begins.
  void keep_means(int64_t span) {
    F* z = starts_ + span * p_.M * Ep_;
    for (int64_t j = 0; j < p_.M; ++j, z += Ep_) {
      const F scale = scan_.sum[j] > 0 ? 1 / scan_.sum[j] : F(0);
      for (int64_t e = 0; e < Ep_; e += kLanes<F>) store(z + e, load(scan_.n + j * Ep_ + e) * scale);
    }
  }

  // z before each of the tokens first..end of a block, which are in one span, and their ρ.
  void means_before(int64_t row0, int64_t first, int64_t end) {
    const F* start = starts_ + (row0 + first) / kSpan * p_.M * Ep_;
    std::copy(start, start + p_.M * Ep_, before_.data());
    for (int64_t i = first; i < end; ++i) {
      const int64_t s = row0 + i;
      const F *top = top_ + s * Mp_, *sum = sum_ + s * Mp_, *omega = tile_ + i * Mp_;
      const F *last_top = s ? top - Mp_ : top0_.data(), *last_sum = s ? sum - Mp_ : sum0_.data();
      F *rho = rho_ + (i - first) * Mp_, *z = before_ + (i - first) * p_.M * Ep_;
      for (int64_t j = 0; j < p_.M; ++j, z += Ep_) {
        rho[j] = last_top[j] == -kInf<F> ? F(0) : ratio_of(j, last_top, last_sum, top, sum, log_decay_[s]);
        const F p = la_[s] == -kInf<F> ? F(0) : std::exp(omega[j] - top[j]) / sum[j];
        for (int64_t e = 0; i + 1 < end && e < Ep_; e += kLanes<F>)
          store(z + p_.M * Ep_ + e, load(z + e) * rho[j] + load(v_ + i * Ep_ + e) * p);
      }
    }
  }

  // The gradient of the gate of token i of a block, from G and h at it.
  template <bool kFar>
  F gate_gradient(int64_t i) const {
    const F *rho = rho_ + i % kSpan * Mp_, *z = before_ + i % kSpan * p_.M * Ep_;
    double sum = 0;
    for (int64_t j = 0; j < p_.M; ++j, z += Ep_) {
      Vec<F> acc{};
      const F* a = anchors_[j];
      for (int64_t e = 0; e < Ep_; e += kLanes<F>)
        acc += load(G_ + j * Ep_ + e) * (kFar ? load(z + e) - load(a + e) : load(z + e));
      sum += rho[j] * (reduce_add<F>(acc) + h_[j]);
    }
    return static_cast<F>(sum);
  }

  // G and h after the last token, in units of C there.
  void begin_reverse(int64_t b, int64_t h) {
    fill(G_.data(), Mp_ * Ep_, F(0));
    fill(h_.data(), Mp_, 0.0);
    factors_.reset();
    anchors_.start(far_);
    Buffer<F> row(2 * p_.E + 3);
    for (int64_t j = 0; p_.d_final && j < p_.M; ++j) {
      load_row_of<F>(p_.d_final, b, h, j, row);
      const F c = carried_.c[j] + carried_.c_lost[j];
      for (int64_t e = 0; e < p_.E; ++e) G_[j * Ep_ + e] = row[e] * c;
      h_[j] = static_cast<double>(row[p_.E]) * c;
    }
  }

  // h as chunks and states have it.
  void leave_anchors() {
    for (int64_t j = 0; j < p_.M; ++j) h_[j] += anchors_.leave(j, G_ + j * Ep_, source_);
  }

  // The gradient of the initial state, from G and h of the first token.
  void end_reverse(int64_t b, int64_t h) {
    Buffer<F> row(2 * p_.E + 3);
    leave_anchors();
    carried_.load_state(p_.initial, b, h);
    scan_.begin(carried_);
    for (int64_t j = 0; j < p_.M; ++j) {
      const bool held = scan_.sum[j] > 0;
      const F ratio = held && p_.S ? ratio_of(j, scan_.top, scan_.sum, top_, sum_, log_decay_[0]) : F(1);
      const F unit = held ? ratio / scan_.sum[j] : F(0);
      for (int64_t e = 0; e < p_.E; ++e) row[e] = row[p_.E + 1 + e] = G_[j * Ep_ + e] * unit;
      row[p_.E] = row[2 * p_.E + 1] = static_cast<F>(h_[j] * unit);
      row[2 * p_.E + 2] = 0;
      store_row_of<F>(p_.d_initial, b, h, j, row);
    }
  }

  // γ C/C' of a token's sums C and those C' of the next, whose log gate is given.
  static F ratio_of(int64_t j, const F* top, const F* sum, const F* next_top, const F* next_sum, F log_decay) {
    return std::exp(top[j] - next_top[j] + log_decay) * sum[j] / next_sum[j];
  }

  // `ratio_of` a token whose next one follows in memory: the product of all leads from the last token to the first.
  F next_ratio(int64_t j, const F* top, const F* sum, F log_decay, double gate) {
    const F moved = top[j] - top[Mp_ + j];
    const double fade = moved == 0 ? gate : std::exp(static_cast<double>(moved) + log_decay);
    return factors_.next(j, fade * sum[j] / sum[Mp_ + j]);
  }

  void reverse_block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    source_.load_keys(row0, n);
    kernel_tile<F>(refs_, n, source_.x, source_.inv, kappa_);
    logit_tile<F>(refs_, n, kappa_, source_.pos, ds_);
    std::copy(ds_.data(), ds_ + n * Mp_, tile_.data());
    causal_weights<F>(refs_, p_.T, n, la_ + row0, tile_, lse_, row_top_, row_sum_);
    source_.load_values(row0, n, v_);
    load_rows<F>(p_.d_o, b, h, row0, n, nullptr, d_o_, Ep_);
    if (near_[row0 / rows_]) reverse_chunk(b, h, row0, n);
    for (int64_t i = n - 1; !near_[row0 / rows_] && i >= 0; --i) {
      if (p_.d_log_decay && (i == n - 1 || (i + 1) % kSpan == 0)) means_before(row0, i / kSpan * kSpan, i + 1);
      far_ ? reverse_step<true>(b, h, row0, i) : reverse_step<false>(b, h, row0, i);
    }
    if (p_.d_value) store_rows<F>(p_.d_value, b, h, row0, n, dv_.data(), Ep_, static_cast<const F*>(nullptr));
    logit_grads<F>(refs_, n, kappa_, source_.pos, ds_, totals_, grads_);
    token_grads<F>(refs_, b, h, row0, n, source_.x, source_.inv, kappa_, ds_, p_.d_key, d_x_, grads_);
  }

  // `reverse_step` of all keys of a chunk, on G and h in its units.
  void reverse_chunk(int64_t b, int64_t h, int64_t row0, int64_t n) {
    const int64_t first = row0 * Mp_, last = (row0 + n - 1) * Mp_;
    const bool later = row0 + n < p_.S;
    leave_anchors();
    for (int64_t j = 0; j < p_.M; ++j) {
      const double fade = later ? std::exp(static_cast<double>(top_[last + j] - top_[last + Mp_ + j])) : 1;
      scale_after(j, top_[last + j] == -kInf<F> ? 0 : fade / sum_[last + j + (later ? Mp_ : 0)]);
    }
    chunk_grads_.keys(n, tile_, top_ + last, sum_ + first, weight_ + first, d_log_c_ + first, v_, d_o_, G_, h_, dv_);
    for (int64_t j = 0; j < p_.M; ++j) scale_after(j, sum_[first + j]);
    for (int64_t i = n - 1; i >= 0; --i) key_gradient(b, h, row0, i, chunk_grads_.p + i * Mp_);
  }

  // Column j of G and h times a factor.
  void scale_after(int64_t j, double exact) {
    const F factor = factors_.next(j, exact);
    h_[j] *= factor;
    for (int64_t e = j * Ep_; e < (j + 1) * Ep_; e += kLanes<F>) store(G_ + e, load(G_ + e) * factor);
  }

  // Brings G and h to token s; leaves dℓ_s in ds_ and dv_s in dv_.
  template <bool kFar>
  void reverse_step(int64_t b, int64_t h, int64_t row0, int64_t i) {
    const int64_t s = row0 + i;
    const F *top = top_ + s * Mp_, *sum = sum_ + s * Mp_, *w = weight_ + s * Mp_, *omega = tile_ + i * Mp_;
    F* dv = dv_ + i * Ep_;
    const bool present = la_[s] != -kInf<F>, later = s + 1 < p_.S;
    fill(dv, Ep_, F(0));
    const double gate = later && log_decay_[s + 1] != 0 ? std::exp(static_cast<double>(log_decay_[s + 1])) : 1;
    for (int64_t j = 0; j < p_.M; ++j) {
      // γ C_sj/C_{s+1,j} and e^{ω_sj}/C_sj; sums start at the first key, and none comes before it.
      F ratio = top[j] == -kInf<F> ? F(0) : later ? next_ratio(j, top, sum, log_decay_[s + 1], gate) : F(1);
      const F p = present ? std::exp(omega[j] - top[j]) / sum[j] : F(0);
      h_[j] *= ratio;
      if (kFar && anchors_.moves(s, j)) {
        for (int64_t e = j * Ep_; e < (j + 1) * Ep_; e += kLanes<F>) store(G_ + e, load(G_ + e) * ratio);
        h_[j] += anchors_.move(s, j, G_ + j * Ep_, source_);
        ratio = 1;
      }
      h_[j] += d_log_c_[s * Mp_ + j];
      const F* a = anchors_[j];
      Vec<F> acc{};
      for (int64_t e = 0; e < Ep_; e += kLanes<F>) {
        F* at = G_ + j * Ep_ + e;
        const Vec<F> next = load(at) * ratio + load(d_o_ + i * Ep_ + e) * w[j];
        store(at, next);
        acc += next * (kFar ? load(v_ + i * Ep_ + e) - load(a + e) : load(v_ + i * Ep_ + e));
        store(dv + e, load(dv + e) + next * p);
      }
      dp_[j] = present ? static_cast<F>(p * (reduce_add<F>(acc) + h_[j])) : F(0);
    }
    key_gradient(b, h, row0, i, dp_);
  }

  // From dω of token i of a block to dℓ in ds_, where ℓ is.
  void key_gradient(int64_t b, int64_t h, int64_t row0, int64_t i, const F* dp) {
    const int64_t s = row0 + i;
    const bool present = la_[s] != -kInf<F>;
    F *dl = ds_ + i * Mp_, df = 0;
    for (int64_t j = 0; j < p_.M; ++j) df += dp[j];
    const F middle = grads_.balanced ? refs_.middle_logit() : F(0);
    if (p_.T && present) grads_.hyper[kLambdaA] -= df * (static_cast<double>(lse_[i]) - middle);
    const F back = p_.T && present ? -refs_.lam_a * df : F(0);
    totals_[i] = df + back;
    const F share = back == 0 ? F(0) : back / row_sum_[i], top = back == 0 ? F(0) : row_top_[i];
    for (int64_t j = 0; j < Mp_; j += kLanes<F>) {
      const Vec<F> through = vexp<F>(load(dl + j) + load(refs_.log_b + j) - top) * share;
      store(d_log_b_ + j, load(d_log_b_ + j) + through);
      store(dl + j, load(dp + j) + through);
    }
    fill(dl + p_.M, Mp_ - p_.M, F(0));
    if (p_.d_log_a)
      static_cast<F*>(p_.d_log_a.data)[b * p_.d_log_a.stride[0] + h * p_.d_log_a.stride[1] + s * p_.d_log_a.stride[2]] =
          df;
    if (p_.d_log_decay) {
      const View& v = p_.d_log_decay;
      static_cast<F*>(v.data)[b * v.stride[0] + h * v.stride[1] + s * v.stride[2]] =
          far_ ? gate_gradient<true>(i) : gate_gradient<false>(i);
    }
  }

  const CausalParams& p_;
  Refs<F> refs_;
  RefGrads<F> grads_;
  KeySource<F> source_;
  int64_t rows_, Mp_, Ep_;
  Scan<F> scan_;
  Chunk<F> chunk_;
  ChunkBackward<F> chunk_grads_;
  std::vector<char> near_;  // which blocks were taken as chunks
  Carried<F> carried_;
  BlockGates<F> gates_;
  // Column maxima and sums, W^q (dropped) and d log C of every token of one head: what the reverse scan needs.
  Buffer<F> la_;
  bool far_ = false;  // whether keys may lie too far apart for ⟨G, v⟩ and h to cancel
  Anchors<F> anchors_;
  Buffer<F> log_decay_, top_, sum_, weight_, log_c_, d_log_c_, kappa_, tile_, ds_, v_, d_o_, dv_, d_x_, lse_, scale_,
      row_top_, row_sum_, totals_, g_, dp_, from_anchor_, d_log_b_, G_;
  Buffer<F> mask_;
  Buffer<double> h_;  // a long sum that cancels against ⟨G, v⟩
  Factors<F> factors_;
  // Before the first token; z where spans begin [spans][M][Ep], before the tokens of a span, and their ρ.
  Buffer<F> top0_, sum0_, starts_, before_, rho_;
};

template <class F>
void causal_backward(const CausalParams& p) {
  run_heads<CausalBackwardWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
