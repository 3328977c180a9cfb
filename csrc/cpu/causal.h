// Causal set_attention for T <= 1: a scan over the tokens with an M x (E + 1) state, one head per thread.
//
// A block of tokens is a few products (bounded.h where β and ε bound all logits, else chunk.h), or goes token by token
// (scan.h) where its weights are too far apart.  The sums are carried with twice the digits (carried.h), from block to
// block, or from bundle to bundle of those of bounded.h, counted from the call's first token: a sequence may end after
// any token, and go on in another call with the bits of one call after whole bundles.
#pragma once
#include "../causal_params.h"
#include "bounded.h"

namespace sfk {
namespace {

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

// log a of one head, 0 where none are given: a factor of all masses changes nothing, and a state must not depend on S.
template <class F>
void load_masses(const CausalParams& p, int64_t b, int64_t h, F* la) {
  if (p.log_a)
    load_log_mass<F>(p, b, h, 0, p.S, la);
  else
    fill(la, p.S, F(0));
}

// The gates of a block of tokens, and what is left of them after each.
template <class F>
struct BlockGates {
  Buffer<F> log, later;  // [rows]
  double sum = 0;
  bool given;

  BlockGates(const CausalParams& p, int64_t rows) : log(rows), later(rows), given(p.log_decay) {}
  void load(const CausalParams& p, int64_t b, int64_t h, int64_t row0, int64_t n) {
    fill(log.data(), n, F(0));
    sum = 0;
    if (!given) return;
    const View& v = p.log_decay;
    load_row<F>(v, b * v.stride[0] + h * v.stride[1] + row0 * v.stride[2], v.stride[2], n, log);
    for (int64_t i = n - 1; i >= 0; --i) later[i] = static_cast<F>(sum), sum += log[i];
  }
  const F* fading() const { return given ? later.data() : nullptr; }
};

template <class F>
class CausalWorker {
 public:
  explicit CausalWorker(const CausalParams& p)
      : p_(p),
        refs_(p),
        source_(p, refs_),
        rows_(chunk_rows(refs_.Mp)),
        Ep_(pad<F>(p.E)),
        scan_(p.M, refs_.Mp, Ep_),
        chunk_(p.M, refs_.Mp, rows_, Ep_),
        bundle_(p.M, refs_.Mp, Ep_),
        carried_(p.M, refs_.Mp, p.E, Ep_),
        gates_(p, rows_),
        la_(p.S),
        omega_(rows_ * refs_.Mp),
        w_(rows_ * refs_.Mp),
        v_(rows_ * Ep_),
        o_(rows_ * Ep_),
        lse_(rows_),
        scale_(rows_),
        log_c_(refs_.Mp),
        g_(refs_.Mp) {}

  void run(int64_t item) {
    const int64_t h = item / p_.B, b = item % p_.B;
    refs_.pack(p_, h);
    source_.b = b, source_.h = h, source_.lo = 0, source_.la = la_;
    load_masses<F>(p_, b, h, la_);
    carried_.load_state(p_.initial, b, h);
    bundle_.forget();
    const bool bounded = chunk_.may_hold(p_, refs_);
    for (int64_t row0 = 0; row0 < p_.S; row0 += rows_) {
      const int64_t n = std::min(rows_, p_.S - row0);
      if (bounded && bounded_block(b, h, row0, n)) continue;
      bundle_.end(carried_);
      block(b, h, row0, n);
    }
    if (p_.final_state) bundle_.end(carried_);
    carried_.save_state(p_.final_state, b, h);
  }

 private:
  bool last(int64_t row0, int64_t n) const { return row0 + n == p_.S && !p_.final_state; }

  // False, and nothing has changed, where weights or sums are too far from 1.
  bool bounded_block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    source_.load_keys(row0, n);
    const Rows<F> v = source_.values(row0, n, v_);
    bundle_.begin(carried_);
    Ahead ahead = ahead_of(p_.key, b, h, row0, n), ahead_q = ahead_of(p_.query, b, h, row0, n),
          ahead_v = ahead_of(p_.value, b, h, row0, n), ahead_o = ahead_of(p_.o, b, h, row0, n);
    if (!chunk_.begin(refs_, p_.T, n, source_.x, source_.inv, la_ + row0, v, bundle_.c, &ahead)) return false;
    source_.load_queries(row0, n);
    chunk_.read_weights(refs_, p_.T, n, source_.x, source_.inv, w_, scale_, &ahead_q);
    drop<F>(p_, b, h, row0, n, refs_.Mp, w_);
    chunk_.read(n, w_, v, bundle_.n, o_, &ahead_v);
    store_rows<F>(p_.o, b, h, row0, n, o_.data(), Ep_, scale_.data());
    if (last(row0, n)) return true;
    bundle_.add(n, chunk_, v, &ahead_o);
    if ((row0 + n) % Bundle<F>::kRows == 0) bundle_.end(carried_);
    return true;
  }

  void block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    source_.logits(row0, n, omega_);
    causal_weights<F>(refs_, p_.T, n, la_ + row0, omega_, lse_);
    source_.load_values(row0, n, v_);
    source_.load_queries(row0, n);
    logits_of<F>(refs_, n, source_.x, source_.inv, source_.pos, w_);
    gates_.load(p_, b, h, row0, n);
    scan_.begin(carried_);
    const bool near =
        chunk_.Chunk<F>::begin(n, la_ + row0, omega_, gates_.given ? gates_.log.data() : nullptr, v_, scan_);
    if (near)
      read_chunk(b, h, row0, n);
    else
      for (int64_t i = 0; i < n; ++i) step(b, h, row0, i);
    store_rows<F>(p_.o, b, h, row0, n, o_.data(), Ep_, static_cast<const F*>(nullptr));
    if (last(row0, n)) return;
    near ? chunk_.add_to(carried_, n, v_, gates_.sum) : carried_.add(n, omega_, gates_.fading(), v_, gates_.sum);
  }

  void read_chunk(int64_t b, int64_t h, int64_t row0, int64_t n) {
    chunk_.weights(refs_, p_.T, n, w_, g_, scale_);
    drop<F>(p_, b, h, row0, n, refs_.Mp, w_);
    chunk_.over_sums(n, scale_, w_);
    chunk_.read(n, w_, {v_, Ep_}, scan_.seen ? scan_.n.data() : nullptr, o_);
  }

  void step(int64_t b, int64_t h, int64_t row0, int64_t i) {
    F *w = w_ + i * refs_.Mp, *o = o_ + i * Ep_;
    la_[row0 + i] == -kInf<F> ? scan_.stay() : scan_.advance(omega_ + i * refs_.Mp, gates_.log[i]);
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

  const CausalParams& p_;
  Refs<F> refs_;
  KeySource<F> source_;
  int64_t rows_, Ep_;
  Scan<F> scan_;
  BoundedChunk<F> chunk_;
  Bundle<F> bundle_;
  Carried<F> carried_;
  BlockGates<F> gates_;
  Buffer<F> la_, omega_, w_, v_, o_, lse_, scale_, log_c_, g_;
};

// A thread a head, and no more threads than are useful.
template <class Worker, class Params>
void run_heads(const Params& p) {
  if (p.B * p.H == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(useful_threads(p.threads, attention_flops(p)), p.B * p.H));
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<Worker>(p));
  run_each(workers, p.B * p.H);
}

template <class F>
void causal_forward(const CausalParams& p) {
  run_heads<CausalWorker<F>>(p);
}

}  // namespace
}  // namespace sfk
