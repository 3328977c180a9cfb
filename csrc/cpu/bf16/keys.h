// Transport of the keys onto the references where e^ℓ and e^g stay in range: what transport.h does in scaled mode, on
// tiles that are turned.  A vector holds one reference's number of 16 keys, so that sums over references need no
// folding, and weights are rounded to bfloat16 as the product with the values takes them.
#pragma once
#include "../attention.h"
#include "refs.h"

namespace sfk {
namespace {

// What one thread knows of the columns.
struct KeySums {
  Buffer<float> sum, z;  // [M][lanes] Σ e^{f} K, still to be folded; [Mp][Ez] Σ of rounded weights times (values, 1)
  float ref = 0;         // the logarithm that both are relative to
  bool bad = false;      // a key has no finite norm
};

class KeyTransport {
 public:
  KeyTransport(const AttentionParams& p, TileRefs& refs, int threads)
      : Ez(whole(p.E + 1, kTile)),
        g(refs.Mp),
        c(std::max<int64_t>(p.T, 1) * refs.Mp),
        z(refs.Mp * Ez),
        la(p.S + kRows),
        x(kRows * refs.D),
        room(2 * (refs.D + Ez)),
        p_(p),
        refs_(refs),
        cached_(p.T > 1 ? std::min(cache_rows<float>(p, threads), p.S + kRows) / kRows * kRows : 0),
        cache_(cached_ * refs.Mp),
        tile_(kRows * refs.Mp),
        turned_(kRows * refs.D),
        weights_(kRows * refs.Mp),
        values_(kRows * Ez),
        G_(refs.Mp) {
    sums.sum.reset(refs.M * kLanes<float>);
    sums.z.reset(refs.Mp * Ez);
    fill(weights_.data(), kRows * refs.Mp, Bf16{0});
  }

  // g, c and z of the head, complete on every member of the team; false where the range does not allow it.  la holds
  // the log masses of this thread's keys lo..hi.
  bool run(int64_t b, int64_t h, int64_t lo, int64_t hi, const Team& team);

  int64_t Ez;
  Buffer<float> g, c, z;  // [Mp] [max(T,1)][Mp] [Mp][Ez], whose column E is 1
  Buffer<float> la;       // [rows] log masses
  Buffer<Bf16> x, room;   // [kRows][D] rows of keys or queries; for rows whose elements are apart
  KeySums sums;

 private:
  void block(int64_t row0, int64_t n, bool first, float lam, bool pool);
  void make_kernel(int64_t row0, int64_t n, float* K);
  void row_potentials(int64_t row0, const float* K, float lam, Vec<float>* u);
  void lower_to(float ref, bool pool);
  bool merge(float shift, bool pool, float* c_t, const Team& team);

  const AttentionParams& p_;
  TileRefs& refs_;
  int64_t cached_, b_ = 0, h_ = 0, lo_ = 0;
  Buffer<float> cache_, tile_;  // [block][Mp][kRows] K = e^ℓ
  Buffer<Bf16> turned_;         // [D/2][kRows][2] keys
  Buffer<Bf16> weights_;        // [Mp][kRows]
  Buffer<Bf16> values_;         // [kRows/2][Ez][2]
  Buffer<float> G_;             // [Mp] e^{g − max g}
};

bool KeyTransport::run(int64_t b, int64_t h, int64_t lo, int64_t hi, const Team& team) {
  b_ = b, h_ = h, lo_ = lo;
  const Refs<float>& refs = refs_.exact;
  const int64_t M = refs_.M, Mp = refs_.Mp, passes = std::max<int64_t>(p_.T, 1);
  const float lam = p_.T ? refs.lam_a : 0;
  for (int64_t i = hi - lo; i < hi - lo + kRows; ++i) la[i] = -kInf<float>;
  std::copy(refs.log_b.data(), refs.log_b + Mp, g.data());
  sums.bad = false;
  for (int64_t t = 1; t <= passes; ++t) {
    float spread;
    const float shift = -lam * exp_shifted<float>(M, Mp, g, G_, spread);
    if (!(spread - refs.least() <= Limits<float>::kRange)) return false;
    const bool pool = t == passes && p_.E > 0;
    sums.ref = -kInf<float>;
    fill(sums.sum.data(), M * kLanes<float>, 0.0f);
    if (pool) fill(sums.z.data(), Mp * Ez, 0.0f);
    for (int64_t row0 = 0; row0 < hi - lo; row0 += kRows)
      block(row0, std::min(kRows, hi - lo - row0), t == 1, lam, pool);
    team.sync();
    float* c_t = c + (t - 1) * Mp;
    const bool ok = merge(shift, pool, c_t, team);
    team.sync();
    if (!ok) return false;
    for (int64_t j = 0; p_.T && j < M; ++j) g[j] = refs.log_b[j] - refs.lam_b * c_t[j];
  }
  return true;
}

void KeyTransport::block(int64_t row0, int64_t n, bool first, float lam, bool pool) {
  const bool cached = row0 + kRows <= cached_;
  float* const K = cached ? cache_ + row0 * refs_.Mp : tile_.data();
  if (first || !cached) make_kernel(row0, n, K);
  Vec<float> u[kGroups], top = splat(-kInf<float>);
  row_potentials(row0, K, lam, u);
  for (const Vec<float>& some : u) top = vmax(some, top);
  const float highest = reduce_max<float>(top);
  if (highest > sums.ref) lower_to(highest, pool);
  if (sums.ref == -kInf<float>) return;
  for (Vec<float>& some : u) some = vexp<float>(some - sums.ref);
  Ahead ahead = pool ? ahead_of(p_.value, b_, h_, lo_ + row0, n) : Ahead{};
  const int64_t share = refs_.share();
  for (int64_t j = 0; j < refs_.M; ++j) {
    ahead.fetch(share);
    Vec<float> w[kGroups], sum = load(sums.sum + j * kLanes<float>);
    SFK_UNROLL
    for (int v = 0; v < kGroups; ++v) w[v] = load(K + j * kRows + v * kLanes<float>) * u[v];
    store(sums.sum + j * kLanes<float>, sum + ((w[0] + w[1]) + (w[2] + w[3])));
    if (!pool) continue;
    store_rounded(weights_ + j * kRows, w[0], w[1]);
    store_rounded(weights_ + j * kRows + 2 * kLanes<float>, w[2], w[3]);
  }
  if (!pool) return;
  pair_rows(p_.value, b_, h_, lo_ + row0, n, la + row0, values_, Ez, room);
  tile_product<true>(refs_.Mp, Ez, kRows, {weights_, kRows, kRows}, {values_, 2 * Ez, kRows}, sums.z, Ez);
}

// K = e^ℓ of a block: ℓ is at most 0, and at least refs_.exact.least().
void KeyTransport::make_kernel(int64_t row0, int64_t n, float* K) {
  const int64_t D = refs_.D;
  copy_rows(p_.key, b_, h_, lo_ + row0, n, la + row0, x, D, room);
  transpose<float>(kRows, D / 2, reinterpret_cast<float*>(x.data()), D / 2, reinterpret_cast<float*>(turned_.data()),
                   kRows);
  Vec<float> scale[kGroups] = {};
  for (int64_t d = 0; d < D / 2; ++d)
    for (int v = 0; v < kGroups; ++v) scale[v] = add_squares(scale[v], turned_ + 2 * (d * kRows + v * kLanes<float>));
  const float away = refs_.away, slope = refs_.slope;
  for (Vec<float>& some : scale) {
    sums.bad |= !(reduce_max<float>(some) < kInf<float>);
    some = inverse_root(some, away);
  }
  tile_product<false>(refs_.Mp, kRows, 2 * D, {refs_.rows, 2 * D, 2 * D}, {turned_, 2 * kRows, D}, K, kRows);
  for (int64_t j = 0; j < refs_.M; ++j, K += kRows) SFK_UNROLL
  for (int v = 0; v < kGroups; ++v) {
    const Vec<float> kappa = vexp2<float>(load(K + v * kLanes<float>) * scale[v] - away);
    store(K + v * kLanes<float>, vexp2<float>(kappa * slope - slope));
  }
}

// u = log a − λ_a log (K G); −inf beyond the rows.
void KeyTransport::row_potentials(int64_t row0, const float* K, float lam, Vec<float>* u) {
  Vec<float> dot[kGroups] = {};
  for (int64_t j = 0; j < refs_.M; ++j)
    for (int v = 0; v < kGroups; ++v) dot[v] += load(K + j * kRows + v * kLanes<float>) * G_[j];
  for (int v = 0; v < kGroups; ++v) u[v] = load(la + row0 + v * kLanes<float>) - lam * vlog<float>(dot[v]);
}

void KeyTransport::lower_to(float ref, bool pool) {
  const float scale = std::exp(sums.ref - ref);
  for (int64_t k = 0; k < refs_.M * kLanes<float>; ++k) sums.sum[k] *= scale;
  for (int64_t k = 0; pool && k < refs_.Mp * Ez; ++k) sums.z[k] *= scale;
  sums.ref = ref;
}

// c_j = shift + log Σ over the team; z_j = Σ/Σ, of weights as they were rounded: those of a column then sum to 1.
bool KeyTransport::merge(float shift, bool pool, float* c_t, const Team& team) {
  float ref = -kInf<float>;
  bool ok = true;
  for (int i = 0; i < team.size; ++i) {
    ref = std::max(ref, team.member<KeySums>(i).ref);
    ok = ok && !team.member<KeySums>(i).bad;
  }
  if (!ok || ref == -kInf<float>) return false;
  if (pool) fill(z.data(), refs_.Mp * Ez, 0.0f);
  for (int64_t j = 0; j < refs_.M; ++j) {
    float sum = 0, *row = z + j * Ez;
    for (int i = 0; i < team.size; ++i) {
      const KeySums& s = team.member<KeySums>(i);
      const float scale = std::exp(s.ref - ref);
      sum += reduce_add<float>(load(s.sum + j * kLanes<float>)) * scale;
      for (int64_t e = 0; pool && e < Ez; ++e) row[e] += s.z[j * Ez + e] * scale;
    }
    ok = ok && sum > Limits<float>::kColumn;
    c_t[j] = std::log(static_cast<double>(sum)) + ref + shift;
    const float inv = pool ? 1 / row[p_.E] : 0;
    for (int64_t e = 0; pool && e < Ez; ++e) row[e] *= inv;
  }
  return ok;
}

}  // namespace
}  // namespace sfk
