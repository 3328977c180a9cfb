// The keys of one head under query-dependent masks: formed once, and shared by all its queries.
#pragma once
#include "tiles.h"

namespace sfk {
namespace {

// e^{ℓ − m}, m the row maximum; where some of these leave the range that products can hold, ℓ − m instead.
//
// The first iteration starts from g⁰ = log b, the same for every query: its row sums are a factor a key.
template <class F>
class MaskedKeys {
 public:
  MaskedKeys(const MaskedParams& p, Refs<F>& refs)
      : source(p, refs),
        weights(p.S),
        first(p.S + kLanes<F>),
        log_first(p.S + kLanes<F>),
        lse(p.S + kLanes<F>),
        m(p.S + kLanes<F>),
        before(p.mask ? 0 : (p.S / tile_rows(refs.Mp) + 2) * refs.Mp),
        p_(p),
        refs_(refs),
        la_(p.S + kLanes<F>),
        rows_(p.S * refs.Mp),
        logs_(tile_rows(refs.Mp) * refs.Mp),
        values_(tile_rows(refs.Mp) * source.Ep) {}

  // `range`: how far below the row maximum e^ℓ may lie.
  void begin(int64_t b, int64_t h, const MaskTiles<F>& mask, F range) {
    source.b = b, source.h = h, source.lo = 0, source.la = la_;
    load_log_mass<F>(p_, b, h, 0, p_.S, la_);
    for (int64_t s = 0; s < p_.S; ++s)
      if (!mask.sees(s)) la_[s] = -kInf<F>;
    Vec<F> low{};
    const int64_t step = tile_rows(refs_.Mp);
    for (int64_t s0 = 0; s0 < p_.S; s0 += step) load(s0, std::min(step, p_.S - s0), low);
    in_logs = reduce_min<F>(low) < -range;
    for (int64_t k = 0; !in_logs && k < p_.S * refs_.Mp; k += kLanes<F>)
      store(rows_ + k, vexp<F>(sfk::load(rows_ + k)));
    weigh();
    if (!p_.mask && !in_logs) add_up();
  }

  // e^{ℓ − m} [n][Mp] of a tile; not where `in_logs`.
  const F* tile(const KeyTile& t) const { return rows_ + t.s0 * refs_.Mp; }
  // ℓ − m of it.
  const F* logs(const KeyTile& t) {
    const F* rows = tile(t);
    if (in_logs) return rows;
    for (int64_t k = 0; k < t.n * refs_.Mp; k += kLanes<F>) store(logs_ + k, vlog<F>(sfk::load(rows + k)));
    return logs_;
  }
  // v of a tile by rows of E numbers; zeros where the key takes no part.  As it lies in memory where that will do.
  Rows<F> values(const KeyTile& t) {
    const View& v = p_.value;
    if (weights.all && v.dtype == kDtype<F> && v.stride[3] == 1) {
      const int64_t at = source.b * v.stride[0] + source.h * v.stride[1] + t.s0 * v.stride[2];
      return {static_cast<const F*>(v.data) + at, v.stride[2]};
    }
    return source.values(t.s0, t.n, values_);
  }
  bool takes_part(int64_t s) const { return la_[s] != -kInf<F>; }

  KeySource<F> source;
  KeyWeights<F> weights;
  Buffer<F> first, log_first;  // [S] what the first iteration multiplies a mass by, and its logarithm
  Buffer<F> lse;               // [S] LSE_j(ℓ − m + log b)
  Buffer<F> m;                 // [S]
  Buffer<F> before;  // [tiles + 1][Mp] Σ n Ex of the first iteration over the tiles before, where all are full
  bool in_logs = false;

 private:
  // ℓ − m and what follows from it for keys s0..s0+n.
  void load(int64_t s0, int64_t n, Vec<F>& low) {
    F* rows = rows_ + s0 * refs_.Mp;
    source.logits(s0, n, rows);
    shift_rows<F>(n, refs_.M, refs_.Mp, rows, la_ + s0, m + s0);
    for (int64_t i = 0; i < n; ++i, rows += refs_.Mp) {
      lse[s0 + i] = row_lse<F>(refs_.Mp, rows, refs_.log_b);
      for (int64_t j = 0; j < refs_.Mp; j += kLanes<F>) {
        const Vec<F> x = sfk::load(rows + j);
        low = vmin(x == -kInf<F> ? Vec<F>{} : x, low);
      }
    }
  }

  void weigh() {
    const F lam = p_.T ? refs_.lam_a : F(0);
    F top = -kInf<F>;
    for (int64_t s = 0; s < p_.S; ++s) {
      weights.log[s] = la_[s] + (1 - lam) * m[s];
      log_first[s] = -lam * lse[s];
      if (takes_part(s)) top = std::max(top, log_first[s]);
    }
    weights.finish(p_.S);
    for (int64_t s = 0; s < p_.S + kLanes<F>; ++s) log_first[s] = s < p_.S && takes_part(s) ? log_first[s] - top : F(0);
    for (int64_t s = 0; s < p_.S; s += kLanes<F>) store(first + s, vexp<F>(sfk::load(log_first + s)));
  }

  void add_up() {
    const int64_t step = tile_rows(refs_.Mp), Mp = refs_.Mp;
    fill(before.data(), Mp, F(0));
    for (int64_t s0 = 0; s0 < p_.S; s0 += step) {
      F *last = before + s0 / step * Mp, *next = last + Mp;
      std::copy(last, last + Mp, next);
      for (int64_t s = s0; s < std::min(p_.S, s0 + step); ++s)
        for (int64_t j = 0; j < Mp; j += kLanes<F>)
          store(next + j, sfk::load(next + j) + weights.plain[s] * first[s] * sfk::load(rows_ + s * Mp + j));
    }
  }

  const MaskedParams& p_;
  Refs<F>& refs_;
  Buffer<F> la_;    // [S] log masses; −∞ where no query sees the key
  Buffer<F> rows_;  // [S][Mp]
  Buffer<F> logs_, values_;
};

}  // namespace
}  // namespace sfk
