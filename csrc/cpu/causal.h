// Causal set_attention for T <= 1: a scan over the tokens with an M x (E + 1) state, one head per thread.
#pragma once
#include "attention.h"

namespace sfk {
namespace {

// Running column sums of e^ω and e^ω v, scaled by e^{-top_j}; ω_sj = ℓ_sj + f̂_s + log a_s.
template <class F>
struct Scan {
  int64_t M, Mp, Ep;
  Buffer<F> top, sum, scale, weight, n;  // [Mp] x 4, [Mp][Ep]
  bool seen = false;

  Scan(int64_t M_, int64_t Mp_, int64_t Ep_)
      : M(M_), Mp(Mp_), Ep(Ep_), top(Mp_), sum(Mp_), scale(Mp_), weight(Mp_), n(Mp_ * Ep_) {}
  void reset() {
    fill(top.data(), Mp, -kInf<F>);
    fill(sum.data(), Mp, F(0));
    fill(n.data(), Mp * Ep, F(0));
    seen = false;
  }
  // The sums take in a key; `scale` and `weight` say how n must follow.
  void advance(const F* omega) {
    seen = true;
    for (int64_t j = 0; j < Mp; j += kLanes<F>) {
      const Vec<F> w = load(omega + j), old = load(top + j), next = vmax(old, w);
      const Vec<F> shift = next == -kInf<F> ? Vec<F>{} : next;
      const Vec<F> s = vexp<F>(old - shift), e = vexp<F>(w - shift);
      store(top + j, next);
      store(scale + j, s);
      store(weight + j, e);
      store(sum + j, load(sum + j) * s + e);
    }
  }
  void stay() {
    fill(scale.data(), Mp, F(1));
    fill(weight.data(), Mp, F(0));
  }
  // log C_j; −inf in the padding.
  void log_sums(F* out) const {
    for (int64_t j = 0; j < Mp; j += kLanes<F>) store(out + j, load(top + j) + vlog<F>(load(sum + j)));
  }
};

// ℓ of a block of keys -> ω in place, −inf throughout for keys that take no part; lse [n] = LSE_j(ℓ_sj + log b_j), and
// its parts where they are asked for.
template <class F>
void causal_weights(const Refs<F>& r, int64_t T, int64_t n, const F* la, F* tile, F* lse, F* top = nullptr,
                    F* sum = nullptr) {
  for (int64_t i = 0; i < n; ++i, tile += r.Mp) {
    if (la[i] == -kInf<F>) {
      fill(tile, r.Mp, -kInf<F>);
      lse[i] = 0;
      continue;
    }
    lse[i] = T ? row_lse<F>(r.Mp, tile, r.log_b, top ? top + i : nullptr, sum ? sum + i : nullptr) : F(0);
    const F f = la[i] - (T ? r.lam_a * lse[i] : F(0));
    for (int64_t j = 0; j < r.Mp; ++j) tile[j] = j < r.M ? tile[j] + f : -kInf<F>;
  }
}

// Softmax of ℓ_q + log b − λ_b log C (T = 0: ℓ_q + log b) of one query, in place.
template <class F>
void causal_read(const Refs<F>& r, int64_t T, const F* log_sums, F* row, F* g) {
  for (int64_t j = 0; j < r.Mp; ++j) g[j] = r.log_b[j];
  for (int64_t j = 0; T && j < r.M; ++j) g[j] -= r.lam_b * log_sums[j];
  F scale;
  exp_rows<F>(1, r.Mp, row, g, &scale);
  for (int64_t j = 0; j < r.Mp; j += kLanes<F>) store(row + j, load(row + j) * scale);
}

template <class F>
class CausalWorker {
 public:
  explicit CausalWorker(const AttentionParams& p)
      : p_(p),
        refs_(p),
        source_(p, refs_),
        rows_(tile_rows(refs_.Mp)),
        Ep_(pad<F>(p.E)),
        scan_(p.M, refs_.Mp, Ep_),
        la_(p.S),
        omega_(rows_ * refs_.Mp),
        w_(rows_ * refs_.Mp),
        v_(rows_ * Ep_),
        o_(rows_ * Ep_),
        lse_(rows_),
        log_c_(refs_.Mp),
        g_(refs_.Mp) {}

  void run(int64_t item) {
    const int64_t h = item / p_.B, b = item % p_.B;
    refs_.pack(p_, h);
    source_.b = b, source_.h = h, source_.lo = 0, source_.la = la_;
    load_log_mass<F>(p_, b, h, 0, p_.S, la_);
    scan_.reset();
    for (int64_t row0 = 0; row0 < p_.S; row0 += rows_) {
      const int64_t n = std::min(rows_, p_.S - row0);
      source_.logits(row0, n, omega_);
      causal_weights<F>(refs_, p_.T, n, la_ + row0, omega_, lse_);
      source_.values(row0, n, v_);
      load_rows<F>(p_.query, b, h, row0, n, nullptr, source_.x, refs_.Dp);
      if (refs_.rbf) inverse_norms<F>(source_.x, n, refs_.Dp, source_.inv);
      if (refs_.P) load_rows<F>(p_.query_pos, b, h, row0, n, nullptr, source_.pos, refs_.P);
      logits_of<F>(refs_, n, source_.x, source_.inv, source_.pos, w_);
      for (int64_t i = 0; i < n; ++i) step(b, h, row0, i);
      store_rows<F>(p_.o, b, h, row0, n, o_.data(), Ep_, static_cast<const F*>(nullptr));
    }
  }

 private:
  void step(int64_t b, int64_t h, int64_t row0, int64_t i) {
    F *w = w_ + i * refs_.Mp, *o = o_ + i * Ep_;
    la_[row0 + i] == -kInf<F> ? scan_.stay() : scan_.advance(omega_ + i * refs_.Mp);
    if (!scan_.seen) return fill(o, Ep_, F(0));
    scan_.log_sums(log_c_);
    causal_read<F>(refs_, p_.T, log_c_, w, g_);
    drop<F>(p_, b, h, row0 + i, 1, refs_.Mp, w);
    for (int64_t j = 0; j < p_.M; ++j) w[j] /= scan_.sum[j];
    for (int64_t e = 0; e < Ep_; e += kLanes<F>) {
      const Vec<F> v = load(v_ + i * Ep_ + e);
      Vec<F> acc{};
      for (int64_t j = 0; j < p_.M; ++j) {
        const Vec<F> n = load(scan_.n + j * Ep_ + e) * scan_.scale[j] + v * scan_.weight[j];
        store(scan_.n + j * Ep_ + e, n);
        acc += n * w[j];
      }
      store(o + e, acc);
    }
  }

  const AttentionParams& p_;
  Refs<F> refs_;
  KeySource<F> source_;
  int64_t rows_, Ep_;
  Scan<F> scan_;
  Buffer<F> la_, omega_, w_, v_, o_, lse_, log_c_, g_;
};

// A thread a head, and no more threads than are useful.
template <class Worker>
void run_heads(const AttentionParams& p) {
  if (p.B * p.H == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(useful_threads(p.threads, attention_flops(p)), p.B * p.H));
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<Worker>(p));
  run_each(workers, p.B * p.H);
}

template <class F>
void causal_forward(const AttentionParams& p) {
  run_heads<CausalWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
