// What the backward of query-dependent masks collects over the queries of a head, and how it leaves.
#pragma once
#include <atomic>
#include <thread>

#include "../gradients.h"
#include "../transport_backward.h"
#include "walk.h"

namespace sfk {
namespace {

// Heads that share a mask add to its gradient in their own order, whichever thread has them: block by block, each waits
// for the head before.
class MaskTurns {
 public:
  explicit MaskTurns(const MaskedParams& p)
      : shared_b_(p.d_mask.stride[0] == 0),
        shared_h_(p.d_mask.stride[1] == 0),
        H_(p.H),
        B_(p.B),
        blocks_((p.L + kQueries - 1) / kQueries),
        done_(p.d_mask ? (shared_b_ ? 1 : B_) * (shared_h_ ? 1 : H_) * blocks_ : 0) {}

  void wait(int64_t b, int64_t h, int64_t block) const {
    while (at(b, h, block).load(std::memory_order_acquire) != turn(b, h)) std::this_thread::yield();
  }
  void pass(int64_t b, int64_t h, int64_t block) { at(b, h, block).store(turn(b, h) + 1, std::memory_order_release); }

 private:
  int64_t turn(int64_t b, int64_t h) const { return shared_h_ ? (shared_b_ ? h * B_ + b : h) : shared_b_ ? b : 0; }
  std::atomic<int64_t>& at(int64_t b, int64_t h, int64_t block) const {
    const int64_t mask = (shared_b_ ? 0 : b) * (shared_h_ ? 1 : H_) + (shared_h_ ? 0 : h);
    return done_[mask * blocks_ + block];
  }

  bool shared_b_, shared_h_;
  int64_t H_, B_, blocks_;
  mutable std::vector<std::atomic<int64_t>> done_;
};

// Sums over all queries of one head.
template <class F>
class MaskedSums {
 public:
  MaskedSums(const MaskedParams& p, Refs<F>& refs)
      : d_exp(p.S * refs.Mp),
        d_value(p.S * pad<F>(p.E)),
        d_mass(p.S),
        d_first(p.S),
        d_log_b(refs.Mp),
        refs_grads(refs, p.d_references.data, p.d_hyper.data),
        p_(p),
        refs_(refs),
        kappa_(tile_rows(refs.Mp) * refs.Mp),
        dl_(tile_rows(refs.Mp) * refs.Mp),
        d_x_(tile_rows(refs.Mp) * refs.Dp),
        totals_(tile_rows(refs.Mp)) {
    refs_grads.balanced = true;
  }

  void clear() {
    refs_grads.clear(refs_);
    fill(d_exp.data(), p_.S * refs_.Mp, F(0));
    fill(d_value.data(), p_.S * pad<F>(p_.E), F(0));
    fill(d_mass.data(), p_.S, F(0));
    fill(d_first.data(), p_.S, F(0));
    fill(d_log_b.data(), refs_.Mp, 0.0);
    has_logs_ = false;
  }
  // dℓ [S][Mp] of blocks in the log domain.
  F* d_logits() {
    if (!has_logs_) {
      if (!d_logits_size_) d_logits_.reset(d_logits_size_ = p_.S * refs_.Mp + 1);
      fill(d_logits_.data(), p_.S * refs_.Mp, F(0));
      has_logs_ = true;
    }
    return d_logits_;
  }

  // Adds what other blocks of the same head left in another precision.
  template <class G>
  void add(const MaskedSums<G>& other) {
    const int64_t Mp = refs_.Mp, Ep = pad<F>(p_.E), Dp = refs_.Dp;
    for (int64_t s = 0; s < p_.S; ++s) {
      for (int64_t j = 0; j < p_.M; ++j) d_exp[s * Mp + j] += other.d_exp[s * pad<G>(p_.M) + j];
      for (int64_t e = 0; e < p_.E; ++e) d_value[s * Ep + e] += other.d_value[s * pad<G>(p_.E) + e];
      d_mass[s] += other.d_mass[s], d_first[s] += other.d_first[s];
    }
    for (int64_t j = 0; j < p_.M; ++j) {
      d_log_b[j] += other.d_log_b[j];
      for (int64_t d = 0; d < p_.D; ++d) refs_grads.y[j * Dp + d] += other.refs_grads.y[j * pad<G>(p_.D) + d];
      for (int64_t c = 0; c < refs_.P; ++c) refs_grads.pos[c * Mp + j] += other.refs_grads.pos[c * pad<G>(p_.M) + j];
    }
    for (int i = 0; i < kNumHyper; ++i) refs_grads.hyper[i] += other.refs_grads.hyper[i];
  }

  // The gradients of keys, values, log masses and parameters.
  void store(MaskedKeys<F>& keys, int64_t b, int64_t h) {
    const int64_t step = tile_rows(refs_.Mp);
    for (int64_t s0 = 0; s0 < p_.S; s0 += step) store_keys(keys, b, h, {s0, std::min(step, p_.S - s0)});
    store_ref_grads<F>(refs_, b, h, refs_grads, p_.d_references, p_.d_ref_pos);
    for (int64_t j = 0; p_.d_log_b && j < p_.M; ++j) store_row_of<double>(p_.d_log_b, b, h, j, d_log_b + j);
    for (int i = 0; p_.d_hyper && i < kNumHyper; ++i) store_row_of<double>(p_.d_hyper, b, h, i, refs_grads.hyper + i);
  }

  Buffer<F> d_exp;         // [S][Mp] of e^{ℓ − m}
  Buffer<F> d_value;       // [S][Ep]
  Buffer<F> d_mass;        // [S] Σ_t df^t
  Buffer<F> d_first;       // [S] df^1
  Buffer<double> d_log_b;  // [Mp]
  RefGrads<F> refs_grads;

 private:
  void store_keys(MaskedKeys<F>& keys, int64_t b, int64_t h, const KeyTile& at) {
    keys.source.load_keys(at.s0, at.n);
    kernel_tile<F>(refs_, at.n, keys.source.x, keys.source.inv, kappa_);
    finish_logits(keys, at);
    logit_grads<F>(refs_, at.n, kappa_, keys.source.pos, dl_, totals_, refs_grads);
    const KeySource<F>& tokens = keys.source;
    token_grads<F>(refs_, b, h, at.s0, at.n, tokens.x, tokens.inv, kappa_, dl_, p_.d_key, d_x_, refs_grads);
    const F* ones = nullptr;
    if (p_.d_value) store_rows<F>(p_.d_value, b, h, at.s0, at.n, d_value + at.s0 * pad<F>(p_.E), pad<F>(p_.E), ones);
    const View& to = p_.d_log_a;
    if (!to) return;
    store_row<F>(to, b * to.stride[0] + h * to.stride[1] + at.s0 * to.stride[2], to.stride[2], at.n, d_mass + at.s0);
  }

  // dℓ of a tile: what the queries left, and −λ_a softmax_j(ℓ + log b) df^1, the same for all of them.
  void finish_logits(MaskedKeys<F>& keys, const KeyTile& at) {
    const F lam = p_.T ? refs_.lam_a : F(0);
    const F* logits = keys.logs(at);
    for (int64_t i = 0; i < at.n; ++i) {
      const int64_t s = at.s0 + i;
      const F back = -lam * d_first[s];
      totals_[i] = (1 - lam) * d_mass[s];
      for (int64_t j = 0; j < refs_.Mp; j += kLanes<F>) {
        const Vec<F> l = load(logits + i * refs_.Mp + j);
        const Vec<F> through = back * vexp<F>(l + load(refs_.log_b + j) - keys.lse[s]);
        Vec<F> d = through;
        if (!keys.in_logs) d += load(keys.tile(at) + i * refs_.Mp + j) * load(d_exp + s * refs_.Mp + j);
        if (has_logs_) d += load(d_logits_ + s * refs_.Mp + j);
        sfk::store(dl_ + i * refs_.Mp + j, d);
        for (int64_t k = 0; k < kLanes<F>; ++k) d_log_b[j + k] += lane<F>(through, k);
      }
      fill(dl_ + i * refs_.Mp + p_.M, refs_.Mp - p_.M, F(0));
      if (p_.M == 1) dl_[i * refs_.Mp] = totals_[i];  // exactly 0 where λ_a = 1
    }
  }

  const MaskedParams& p_;
  Refs<F>& refs_;
  Buffer<F> kappa_, dl_, d_x_, totals_, d_logits_;
  int64_t d_logits_size_ = 0;
  bool has_logs_ = false;
};

}  // namespace
}  // namespace sfk
