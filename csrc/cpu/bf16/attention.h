// set_attention and set_pool, forward, on bfloat16 tokens: products of bfloat16, everything between them in float32.
#pragma once
#include "keys.h"

namespace sfk {
namespace {

class TileWorker {
 public:
  TileWorker(const AttentionParams& p, int threads, std::vector<char>& left)
      : p_(p),
        left_(left),
        refs_(p),
        keys_(p, refs_, threads),
        Mk_(whole(p.M, kDepth)),
        g_(refs_.Mp),
        tile_(kRows * refs_.Mp),
        weights_(kRows * Mk_),
        z_(Mk_ * keys_.Ez),
        out_(kRows * keys_.Ez) {
    fill(weights_.data(), kRows * Mk_, Bf16{0});
  }
  KeySums& shared() { return keys_.sums; }

  // What is out of range, or exact by a rule of its own (no key, a lone one), is left to the kernel of every dtype.
  void run(int64_t item, const Team& team) {
    const TileRegisters registers;
    const int64_t h = item / p_.B, b = item % p_.B;
    refs_.pack(p_, h);
    if (p_.reading) {
      const bool done = load_memory(b, h);
      if (team.rank == 0) left_[item] = !done;
      return done ? read(b, h, team) : void();
    }
    const auto [lo, hi] = team.share(p_.S, kRows);
    const bool any = load_log_mass<float>(p_, b, h, lo, hi, keys_.la);
    const bool done = any && !is_lone<float>(keys_.la, hi - lo, team) && keys_.run(b, h, lo, hi, team);
    if (team.rank == 0) left_[item] = !done;
    if (!done) return;
    if (team.rank == 0 && p_.c) store_state(b, h);
    if (p_.o) read(b, h, team);
  }

 private:
  // The given z and g; false where they or the references do not allow a read by tiles.  Those of keys that tiles took
  // always do, so that a read depends on nothing else.
  bool load_memory(int64_t b, int64_t h) {
    const int64_t Ez = keys_.Ez;
    fill(keys_.z.data(), refs_.Mp * Ez, 0.0f);
    for (int64_t j = 0; j < p_.M; ++j) {
      load_row_of<float>(p_.z, b, h, j, keys_.z + j * Ez);
      keys_.z[j * Ez + p_.E] = 1;
    }
    load_row<float>(p_.g, vector_offset(p_.g, b, h, 0), p_.g.stride[2], p_.M, keys_.g);
    return refs_.exact.least() >= -Limits<float>::kRange &&
           *std::max_element(keys_.g + 0, keys_.g + p_.M) > -kInf<float>;
  }

  void store_state(int64_t b, int64_t h) {
    for (int64_t t = 0; t < std::max<int64_t>(p_.T, 1); ++t) store_row_of<float>(p_.c, b, h, t, keys_.c + t * refs_.Mp);
    for (int64_t j = 0; j < p_.M; ++j) store_row_of<float>(p_.z, b, h, j, keys_.z + j * keys_.Ez);
    if (p_.g) store_row<float>(p_.g, vector_offset(p_.g, b, h, 0), p_.g.stride[2], p_.M, keys_.g + 0);
  }

  // z as a right operand, and what the logits of a query are shifted by: they are at most 0, and so is g.
  void pack_state() {
    const int64_t Ez = keys_.Ez;
    const float *g = keys_.g, top = *std::max_element(g, g + p_.M);
    for (int64_t j = 0; j < refs_.Mp; ++j)
      g_[j] = j < p_.M ? static_cast<float>(kLog2e) * (g[j] - top) - refs_.slope : -kInf<float>;
    const auto row = [&](int64_t j, int64_t e) { return j < p_.M ? load(keys_.z + j * Ez + e) : Vec<float>{}; };
    for (int64_t j = 0; j < Mk_; j += 2)
      for (int64_t e = 0; e < Ez; e += kLanes<float>) store_pairs(z_ + (j * Ez + 2 * e), row(j, e), row(j + 1, e));
  }

  void read(int64_t b, int64_t h, const Team& team) {
    const int64_t D = refs_.D, Mp = refs_.Mp, Ez = keys_.Ez;
    const auto [lo, hi] = team.share(p_.L, kRows);
    pack_state();
    for (int64_t row0 = lo; row0 < hi; row0 += kRows) {
      const int64_t n = std::min(kRows, hi - row0);
      copy_rows(p_.query, b, h, row0, n, nullptr, keys_.x, D, keys_.room);
      for (int64_t i = 0; i < n; ++i) scale_[i] = row_scale(keys_.x + i * D);
      tile_product<false>(kRows, Mp, 2 * D, {keys_.x, D, D}, {refs_.pairs, 2 * Mp, 2 * D}, tile_, Mp);
      Ahead ahead = ahead_of(p_.query, b, h, row0, n), ahead_o = ahead_of(p_.o, b, h, row0, n);
      for (int64_t i = 0; i < n; ++i) {
        ahead.fetch(1), ahead_o.fetch(1);
        weigh(scale_[i], tile_ + i * Mp, weights_ + i * Mk_);
      }
      tile_product<false>(kRows, Ez, Mk_, {weights_, Mk_, Mk_}, {z_, 2 * Ez, Mk_}, out_, Ez);
      for (int64_t i = 0; i < n; ++i) store_output(row_offset(p_.o, b, h, row0 + i), out_ + i * Ez);
    }
  }

  // β log₂e/‖x‖.  A row whose squares overflow is made smaller first; its cosines are the same.
  float row_scale(Bf16* x) {
    const auto sum_squares = [&] {
      Vec<float> squares{};
      for (int64_t d = 0; d < refs_.D; d += 2 * kLanes<float>) squares = add_squares(squares, x + d);
      return reduce_add<float>(squares);
    };
    float square = sum_squares();
    if (square == kInf<float>) {
      for (int64_t d = 0; d < refs_.D; ++d) x[d] = Narrow<Bf16, float>::from(to_f32(x[d]) * 0x1p-80f);
      square = sum_squares();
    }
    return square <= 1e-24f ? 0 : refs_.away / std::sqrt(square);
  }

  // A row of W^q, up to the factor that the column of ones sums.
  void weigh(float scale, const float* cosines, Bf16* weights) {
    const float away = refs_.away, slope = refs_.slope;
    const auto weight = [&](int64_t j) {
      const Vec<float> kappa = vexp2<float>(load(cosines + j) * scale - away);
      return vexp2<float>(kappa * slope + load(g_ + j));
    };
    int64_t j = 0;
    for (; j + 2 * kLanes<float> <= refs_.Mp; j += 2 * kLanes<float>)
      store_rounded(weights + j, weight(j), weight(j + kLanes<float>));
    if (j < refs_.Mp) store_rounded(weights + j, weight(j), Vec<float>{});
  }

  void store_output(int64_t offset, const float* row) {
    const float scale = 1 / row[p_.E];
    Bf16* to = static_cast<Bf16*>(p_.o.data) + offset;
    const int64_t stride = p_.o.stride[3];
    for (int64_t e = 0; e < p_.E; e += kLanes<float>) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)(load(row + e) * scale));
      if (stride == 1) {
        _mm256_mask_storeu_epi16(to + e, static_cast<__mmask16>(first(p_.E - e)), (__m256i)rounded);
        continue;
      }
      Bf16 apart[kLanes<float>];
      std::memcpy(apart, &rounded, sizeof(apart));
      for (int64_t k = 0; k < std::min<int64_t>(kLanes<float>, p_.E - e); ++k) to[(e + k) * stride] = apart[k];
    }
  }

  const AttentionParams& p_;
  std::vector<char>& left_;  // [H·B] heads that are not done
  TileRefs refs_;
  KeyTransport keys_;
  int64_t Mk_;  // M in whole depths
  Buffer<float> g_, tile_;
  Buffer<Bf16> weights_, z_;
  Buffer<float> out_;
  float scale_[kRows];
};

inline bool takes_tiles(const AttentionParams& p) {
  return p.key.dtype == Dtype::bf16 && p.kernel == KernelKind::rbf && !p.ref_pos && !p.w_q && !p.w_k && p.E > 0;
}

inline int tile_threads(const AttentionParams& p) { return useful_threads(p.threads, attention_flops(p) / 4); }

// One head of a tensor [B,H,..] or, where not `batched`, of one [H,..].
inline View head_of(View v, bool batched, int64_t b, int64_t h) {
  if (!v) return v;
  const int64_t away = batched ? b * v.stride[0] + h * v.stride[1] : h * v.stride[0];
  v.data = static_cast<char*>(v.data) + away * element_size(v.dtype);
  v.size[0] = v.size[batched ? 1 : 0] = 1;
  return v;
}

inline AttentionParams head_of(AttentionParams p, int64_t b, int64_t h) {
  p.B = p.H = 1;
  for (View* v : {&p.query, &p.key, &p.value, &p.log_a, &p.o, &p.z, &p.c, &p.g}) *v = head_of(*v, true, b, h);
  for (View* v : {&p.references, &p.log_b}) *v = head_of(*v, false, b, h);
  for (View& v : p.hyper) v = head_of(v, false, b, h);
  return p;
}

// What tiles take, without dropout; calls `rest` for the heads that they left: for each, or once for all.
template <class Rest>
void by_tiles(const AttentionParams& p, Rest rest) {
  const int threads = tile_threads(p);
  std::vector<char> left(p.B * p.H);
  std::vector<std::unique_ptr<TileWorker>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<TileWorker>(p, threads, left));
  run_team(workers, p.B * p.H);
  workers.clear();
  const int64_t count = std::count(left.begin(), left.end(), 1);
  if (count == p.B * p.H) return rest(p);
  for (int64_t item = 0; count && item < p.B * p.H; ++item)
    if (left[item]) rest(head_of(p, item % p.B, item / p.B));
}

// Room for a tensor [B,H,n,m] of a call.
inline View room_for(const AttentionParams& p, const Buffer<float>& room, int64_t n, int64_t m) {
  return {room.data(), {p.B, p.H, n, m}, {p.H * n * m, n * m, m, 1}, 4, Dtype::f32};
}

// z, c and g by `keys`, then o from z and g by `read`.
template <class Keys, class Read>
void in_halves(AttentionParams p, Keys keys, Read read) {
  const int64_t heads = p.B * p.H, steps = std::max<int64_t>(p.T, 1);
  const Buffer<float> g(heads * p.M), z(p.z ? 0 : heads * p.M * p.E), c(p.c ? 0 : heads * steps * p.M);
  if (!p.g) p.g = {g.data(), {p.B, p.H, p.M, 1}, {p.H * p.M, p.M, 1, 0}, 3, Dtype::f32};
  if (!p.z) p.z = room_for(p, z, p.M, p.E);
  if (!p.c) p.c = room_for(p, c, steps, p.M);
  AttentionParams half = p;
  half.o = View{};
  keys(half);
  half = p;
  half.reading = true;
  read(half);
}

// Fewer tokens of a head than this leave most of a block of kRows empty, and are float32's: on tile registers that
// costs next to nothing.
#if defined(__AMX_TILE__)
constexpr int64_t kFewest = 1;
#else
constexpr int64_t kFewest = 48;
#endif

// `rest`: the kernel of every dtype.  What of the keys or of the read is left to it depends on that half alone, as
// where each is a call of its own: a read that drops weights is, and one of keys that were left is not.
template <class Rest>
void tile_attention(const AttentionParams& p, Rest rest) {
  const bool drops = p.o && p.dropout_p > 0;
  const bool few_keys = !p.reading && p.S < kFewest, few_queries = p.o && p.L < kFewest;
  if (!takes_tiles(p) || (p.reading && (drops || few_queries)) || (few_keys && (few_queries || !p.o))) return rest(p);
  if (p.B * p.H == 0) return;
  const auto again = [&](const AttentionParams& half) { tile_attention(half, rest); };
  if (drops || few_keys || few_queries) return in_halves(p, again, again);
  by_tiles(p, [&](const AttentionParams& some) {
    if (p.reading || !p.o) return rest(some);
    in_halves(some, rest, [&](const AttentionParams& read) { by_tiles(read, rest); });
  });
}

}  // namespace
}  // namespace sfk
