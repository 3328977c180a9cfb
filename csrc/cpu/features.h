// Nyström features ψ(x) = ‖x‖ W κ(w, x̂), W the whitening matrix that the caller computed, forward and backward.
//
// Centred, κ̃ = s (e^{β(ĉ − c₀)} − 1) takes the place of κ, and is 0 for a landmark without direction:
//   dκ̃/dĉ = β (κ̃ + s),   dκ̃/dβ = (κ̃ + s)(ĉ − A) + κ̃ d log s/dβ.
#pragma once
#include "base/team.h"
#include "gradients.h"

namespace sfk {
namespace {

template <class F>
class FeatureWorker {
 public:
  struct Shared {
    RefGrads<F>* grads;
    Buffer<F> d_whitening;  // [R][Rp]
  };

  FeatureWorker(const FeatureParams& p, int)
      : p_(p),
        refs_(p.R, p.D, 0, true),
        grads_(refs_, true, true),
        rows_(tile_rows(refs_.Mp)),
        whitening_(p.R * refs_.Mp),
        whitening_t_(p.R * refs_.Mp),
        x_(rows_ * refs_.Dp),
        d_x_(rows_ * refs_.Dp),
        inv_(rows_),
        norm_(rows_),
        along_(rows_),
        kappa_(rows_ * refs_.Mp),
        cosine_(p.centring ? rows_ * refs_.Mp : 0),
        gain_(refs_.Mp),
        psi_(rows_ * refs_.Mp),
        d_kappa_(rows_ * refs_.Mp) {
    shared_.grads = &grads_;
    grads_.wants_hyper = !p.centring;  // dβ is summed here then
    shared_.d_whitening.reset(p.R * refs_.Mp);
  }
  Shared& shared() { return shared_; }

  void run(int64_t item, const Team& team) {
    const int64_t h = item / p_.B, b = item % p_.B, Rp = refs_.Mp;
    pack(h);
    grads_.clear(refs_);
    fill(shared_.d_whitening.data(), p_.R * Rp, F(0));
    const auto [lo, hi] = team.share(p_.N, rows_);
    for (int64_t row0 = lo; row0 < hi; row0 += rows_) {
      const int64_t n = std::min(rows_, hi - row0);
      load_rows<F>(p_.x, b, h, row0, n, nullptr, x_, refs_.Dp);
      const Rows<F> x{x_, refs_.Dp};
      inverse_norms<F>(x, n, refs_.Dp, inv_, norm_);
      p_.centring ? centred_tile(n) : kernel_tile<F>(refs_, n, x, inv_, kappa_);
      if (p_.psi) {
        gemm<F>(n, Rp, p_.R, kappa_, Rp, 1, whitening_, Rp, psi_, Rp, false);
        store_rows<F>(p_.psi, b, h, row0, n, psi_.data(), Rp, norm_.data());
      } else {
        backward_block(b, h, row0, n);
      }
    }
    if (p_.psi) return;
    team.sync();
    if (team.rank == 0) store_parameters(b, h, team);
    team.sync();
  }

 private:
  void pack(int64_t h) {
    if (h == refs_.packed_head) return;
    refs_.packed_head = h;
    const F bandwidth = p_.bandwidths ? static_cast<const F*>(p_.bandwidths.data)[h * p_.bandwidths.stride[0]]
                                      : static_cast<F>(p_.bandwidth);
    refs_.set_kernel(bandwidth, 1);
    refs_.pack_points(p_.landmarks, h);
    if (p_.centring) {
      const Block<F> numbers(p_.centring, h);
      for (int i = 0; i < kNumCentring; ++i) centring_[i] = numbers(0, i);
      fill(gain_.data(), refs_.Mp, F(0));
      for (int64_t j = 0; j < p_.R; ++j) gain_[j] = refs_.inv_norm[j] > 0 ? centring_[kGain] : F(0);
    }
    const Block<F> w(p_.whitening, h);
    for (int64_t i = 0; i < p_.R; ++i)
      for (int64_t j = 0; j < refs_.Mp; ++j) {
        whitening_[i * refs_.Mp + j] = j < p_.R ? w(i, j) : F(0);
        whitening_t_[i * refs_.Mp + j] = j < p_.R ? w(j, i) : F(0);
      }
  }

  // ĉ and κ̃ of n rows.
  void centred_tile(int64_t n) {
    const int64_t Rp = refs_.Mp;
    gemm<F>(n, Rp, p_.D, x_, refs_.Dp, 1, refs_.yt, Rp, cosine_, Rp, false);
    const F beta = refs_.beta, shift = beta * centring_[kOffset];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < Rp; j += kLanes<F>) {
        const Vec<F> cosine = load(cosine_ + i * Rp + j) * inv_[i];
        store(cosine_ + i * Rp + j, cosine);
        store(kappa_ + i * Rp + j, vexpm1<F>(cosine * beta - shift) * load(gain_ + j));
      }
  }

  // Adds to dβ, and leaves dκ̃/dĉ / β in place of κ̃.
  void centred_grads(int64_t n) {
    const int64_t Rp = refs_.Mp;
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> d_beta{};
      for (int64_t j = i * Rp; j < (i + 1) * Rp; j += kLanes<F>) {
        const Vec<F> kappa = load(kappa_ + j), slope = kappa + load(gain_ + (j - i * Rp));
        d_beta += load(d_kappa_ + j) * (slope * (load(cosine_ + j) - centring_[kMean]) + kappa * centring_[kGrowth]);
        store(kappa_ + j, slope);
      }
      grads_.hyper[kBandwidth] += reduce_add<F>(d_beta);
    }
  }

  void backward_block(int64_t b, int64_t h, int64_t row0, int64_t n) {
    const int64_t Rp = refs_.Mp, Dp = refs_.Dp;
    load_rows<F>(p_.d_psi, b, h, row0, n, nullptr, psi_, Rp);
    gemm<F>(n, Rp, p_.R, psi_, Rp, 1, whitening_t_, Rp, d_kappa_, Rp, false);
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> dot{};
      for (int64_t j = i * Rp; j < (i + 1) * Rp; j += kLanes<F>) {
        dot += load(kappa_ + j) * load(d_kappa_ + j);
        store(d_kappa_ + j, load(d_kappa_ + j) * norm_[i]);
        store(psi_ + j, load(psi_ + j) * norm_[i]);
      }
      along_[i] = reduce_add<F>(dot);  // d‖x‖
    }
    gemm<F>(p_.R, Rp, n, kappa_, 1, Rp, psi_, Rp, shared_.d_whitening, Rp, true);
    if (p_.centring) centred_grads(n);
    const Place<F> d_x{p_.d_x ? d_x_.data() : nullptr, Dp};
    kernel_grads<F>(refs_, n, Rows<F>{x_, Dp}, inv_, kappa_, d_kappa_, F(1), d_x, grads_);
    if (!p_.d_x) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < Dp; ++d) d_x_[i * Dp + d] += x_[i * Dp + d] * inv_[i] * along_[i];
    store_rows<F>(p_.d_x, b, h, row0, n, d_x_.data(), Dp, static_cast<const F*>(nullptr));
  }

  void store_parameters(int64_t b, int64_t h, const Team& team) {
    F* sum = shared_.d_whitening;
    for (int i = 1; i < team.size; ++i) {
      const Shared& s = team.template member<Shared>(i);
      grads_.add(refs_, *s.grads);
      for (int64_t k = 0; k < p_.R * refs_.Mp; ++k) sum[k] += s.d_whitening[k];
    }
    store_ref_grads<F>(refs_, b, h, grads_, p_.d_landmarks, View{});
    const Block<F> d_bandwidth(p_.d_bandwidth, b, h), d_whitening(p_.d_whitening, b, h);
    if (d_bandwidth) d_bandwidth(0, 0) = static_cast<F>(grads_.hyper[kBandwidth]);
    for (int64_t i = 0; d_whitening && i < p_.R; ++i)
      for (int64_t j = 0; j < p_.R; ++j) d_whitening(i, j) = sum[i * refs_.Mp + j];
  }

  const FeatureParams& p_;
  Refs<F> refs_;
  RefGrads<F> grads_;
  Shared shared_;
  int64_t rows_;
  F centring_[kNumCentring];
  Buffer<F> whitening_, whitening_t_, x_, d_x_, inv_, norm_, along_, kappa_, cosine_, gain_, psi_, d_kappa_;
};

template <class F>
void run_features(const FeatureParams& p, double products) {
  if (p.B * p.H == 0) return;
  const double flops = 2.0 * products * p.B * p.H * static_cast<double>(p.N) * p.R * (p.D + p.R);
  std::vector<std::unique_ptr<FeatureWorker<F>>> workers;
  const int threads = useful_threads(p.threads, flops);
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<FeatureWorker<F>>(p, threads));
  run_team(workers, p.B * p.H);
}

template <class F>
void features_forward(const FeatureParams& p) {
  run_features<F>(p, 1);
}
template <class F>
void features_backward(const FeatureParams& p) {
  run_features<F>(p, 3);
}

}  // namespace
}  // namespace sfk
