// A block of queries under a mask: its logits, what its iterations leave, and how it reads.
#pragma once
#include "keys.h"

namespace sfk {
namespace {

// Logits and κ of the queries, by rows.
template <class F>
struct BlockQueries {
  Rows<F> x;                 // [kQueries][Dp]
  Buffer<F> room, inv, pos;  // [kQueries][Dp] [kQueries] [kQueries][P]
  Buffer<F> kappa, logits;   // [kQueries][Mp]

  explicit BlockQueries(const Refs<F>& refs)
      : room(kQueries * refs.Dp),
        inv(kQueries),
        pos(kQueries * refs.P),
        kappa(kQueries * refs.Mp),
        logits(kQueries * refs.Mp) {}

  // Rows whose `seen` is 0 are not read.
  void load(const AttentionParams& p, const Refs<F>& refs, int64_t b, int64_t h, int64_t row0, int64_t n,
            const F* seen) {
    F skip[kQueries];
    for (int64_t i = 0; i < n; ++i) skip[i] = seen[i] == 0 ? -kInf<F> : F(0);
    x = rows_of<F>(p.query, b, h, row0, n, skip, room, refs.Dp);
    if (refs.rbf) inverse_norms<F>(x, n, refs.Dp, inv);
    if (refs.P) load_rows<F>(p.query_pos, b, h, row0, n, skip, pos, refs.P);
    kernel_tile<F>(refs, n, x, inv, kappa);
    logit_tile<F>(refs, n, kappa, pos, logits);
  }
};

// What a block's iterations leave, queries in the lanes; step t is iteration t + 1.  In the log domain the logarithms.
template <class F>
class BlockPotentials {
 public:
  BlockPotentials(const Refs<F>& refs, int64_t T)
      : steps(std::max<int64_t>(T, 1)),
        w(refs.Mp * kQueries),
        keep(refs.Mp * kQueries),
        refs_(refs),
        T_(T),
        sums_(steps * refs.Mp * kQueries),
        v_(steps * refs.Mp * kQueries),
        lanes_(refs.Mp * kQueries) {}

  F* sums(int64_t t) const { return sums_ + t * refs_.Mp * kQueries; }  // [M][kQueries] C^t
  F* v(int64_t t) const { return v_ + t * refs_.Mp * kQueries; }        // [M][kQueries] V^t / max_j V^t

  void set_v(int64_t t, bool logs) {
    const F *c = sums(t), lam = T_ ? refs_.lam_b : F(0);
    F* out = v(t);
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      Vec<F> top = splat(-kInf<F>);
      for (int64_t k = i, j = 0; j < refs_.M; ++j, k += kQueries) {
        Vec<F> x;
        if (!logs && lam == 1)
          x = refs_.b[j] * reciprocal(load(c + k));
        else
          x = refs_.log_b[j] - lam * (logs ? load(c + k) : vlog<F>(load(c + k)));
        top = vmax(top, x);
        store(out + k, x);
      }
      const Vec<F> inverse = F(1) / top;
      for (int64_t k = i; k < refs_.M * kQueries; k += kQueries)
        store(out + k, !logs && lam == 1 ? load(out + k) * inverse
                       : logs            ? load(out + k) - top
                                         : vexp<F>(load(out + k) - top));
    }
  }

  // W^q from the logits [n][Mp] and the last sums, and what dropout multiplies it by; 0 for queries that see nothing.
  void read(const AttentionParams& p, int64_t b, int64_t h, int64_t row0, int64_t n, const F* logits, const F* seen,
            bool logs) {
    const F *c = sums(steps - 1), lam = T_ ? refs_.lam_b : F(0);
    transpose<F>(n, refs_.M, logits, refs_.Mp, lanes_, kQueries);
    for (int64_t i = 0; i < kQueries; i += kLanes<F>) {
      const Vec<F> there = load(seen + i);
      Vec<F> top = splat(-kInf<F>), sum{};
      for (int64_t k = i, j = 0; j < refs_.M; ++j, k += kQueries) {
        const Vec<F> log_sum = logs ? load(c + k) : vlog<F>(load(c + k));
        const Vec<F> x = load(lanes_ + k) + (refs_.log_b[j] - lam * log_sum);
        store(w + k, there == F(0) ? Vec<F>{} : x);
        top = vmax(top, load(w + k));
      }
      for (int64_t k = i; k < refs_.M * kQueries; k += kQueries) {
        const Vec<F> x = vexp<F>(load(w + k) - top);
        store(w + k, x);
        sum += x;
      }
      const Vec<F> inverse = there == F(0) ? Vec<F>{} : F(1) / sum;
      for (int64_t k = i; k < refs_.M * kQueries; k += kQueries) store(w + k, load(w + k) * inverse);
    }
    set_keep(p, b, h, row0, n);
  }

  int64_t steps;
  Buffer<F> w, keep;  // [Mp][kQueries]

 private:
  void set_keep(const AttentionParams& p, int64_t b, int64_t h, int64_t row0, int64_t n) {
    fill(keep.data(), refs_.M * kQueries, F(p.dropout_p <= 0));
    if (p.dropout_p <= 0) return;
    fill(lanes_.data(), n * refs_.Mp, F(1));
    drop<F>(p, b, h, row0, n, refs_.Mp, lanes_);
    transpose<F>(n, refs_.M, lanes_, refs_.Mp, keep, kQueries);
  }

  const Refs<F>& refs_;
  int64_t T_;
  Buffer<F> sums_, v_;  // [steps][Mp][kQueries]
  Buffer<F> lanes_;     // [kQueries][Mp] or [Mp][kQueries]
};

}  // namespace
}  // namespace sfk
