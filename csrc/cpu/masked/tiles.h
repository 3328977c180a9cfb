// Query-dependent masks by tiles of [keys][queries]: which tiles hold anything, and the masses in them.
//
// Queries lie in the lanes: what a block of queries has for each key, reference or coordinate is a row of kQueries
// numbers, so that sums over these are sums of vectors, and a mask is turned once, when its tile is read.
#pragma once
#include <vector>

#include "../attention.h"
#include "../base/reciprocal.h"
#include "../base/transpose.h"

namespace sfk {
namespace {

constexpr int64_t kQueries =
    64;  // of a block: as wide as the register tile of a product (gemm.h), 4 vectors of AVX-512

// What the keys of a head weigh before a query's mask: log a_s + (1 − λ_a) m_s.
template <class F>
struct KeyWeights {
  Buffer<F> log, plain;  // [S]: −∞ and 0 where a key takes no part; plain = e^{log − top}
  F top, lowest;         // the largest, and the smallest of log − top
  int64_t first;         // key that takes part; S where none does
  bool all;              // whether all keys do

  explicit KeyWeights(int64_t S) : log(S + kLanes<F>), plain(S + kLanes<F>) {}
  void finish(int64_t S) {
    top = -kInf<F>, lowest = 0, first = S, all = true;
    for (int64_t s = S; s < S + kLanes<F>; ++s) log[s] = -kInf<F>;
    for (int64_t s = S - 1; s >= 0; --s)
      if (log[s] != -kInf<F>)
        top = std::max(top, log[s]), first = s;
      else
        all = false;
    if (first == S) top = 0;
    for (int64_t s = 0; s < S; s += kLanes<F>) store(plain + s, vexp<F>(load(log + s) - top));
    for (int64_t s = first; s < S; ++s)
      if (log[s] != -kInf<F>) lowest = std::min(lowest, log[s] - top);
  }
};

struct KeyTile {
  int64_t s0, n;
  bool full = false;  // every query of the block sees every key, with the masses of the keys
};

template <class F>
class MaskTiles {
 public:
  MaskTiles(const MaskedParams& p, int64_t keys)
      : p_(p),
        keys_(keys),
        offset_(p.S - p.L),
        row_(pad<F>(keys) * kQueries),
        reference(kQueries),
        seen(kQueries),
        key_top_(p.mask ? p.S + kLanes<F> : 0),
        row_top_(p.mask ? p.L : 0),
        occupied_(p.mask ? blocks() * columns() : 0) {}

  // The mask of this head: read as a whole where it is not that of the head before.
  void begin_head(int64_t b, int64_t h) {
    if (!p_.mask) return;
    const int64_t base = b * p_.mask.stride[0] + h * p_.mask.stride[1];
    if (base == base_) return;
    base_ = base;
    fill(key_top_.data(), p_.S, -kInf<F>), fill(row_top_.data(), p_.L, -kInf<F>);
    for (int64_t block = 0; block < blocks(); ++block)
      for (int64_t k = 0; k < columns(); ++k) occupied_[block * columns() + k] = occupied(block * kQueries, k * keys_);
  }
  // Whether any query sees the key; the others are never read.
  bool sees(int64_t s) const { return p_.mask ? key_top_[s] != -kInf<F> : p_.L > 0; }

  // Queries row0..row0+n: the tiles they see something in, and what their masses are relative to.
  void begin_block(int64_t row0, int64_t n, const KeyWeights<F>& weights) {
    row0_ = row0, n_ = n, weights_ = &weights, lowest = weights.lowest;
    tiles.clear();
    const int64_t end = visible(row0 + n - 1);
    for (int64_t k = 0; k * keys_ < end; ++k)
      if (!p_.mask || occupied_[row0 / kQueries * columns() + k])
        tiles.push_back({k * keys_, std::min(keys_, end - k * keys_), !p_.mask && (k + 1) * keys_ <= visible(row0)});
    for (int64_t i = 0; i < kQueries; ++i) {
      F top = -kInf<F>;
      if (i < n && !p_.mask) top = weights.first < visible(row0 + i) ? weights.top : top;
      if (i < n && p_.mask) top = weights.all ? row_top_[row0 + i] + weights.top : row_top(i);
      seen[i] = top != -kInf<F>;
      reference[i] = seen[i] == 0 ? F(0) : is_float() ? top : weights.top;
    }
  }

  // n_is of a tile [n][kQueries]: e^{mask + weight − reference}, 0 where query i does not see key s.  Nothing where it
  // is full: the weights say it all.
  void masses(const KeyTile& tile, F* out) {
    if (tile.full) return;
    if (!p_.mask) return causal_tile(tile, weights_->plain, F(0), out);
    Vec<F> low = splat(lowest);
    each_row(tile, [&](int64_t i, const F* given, F* row) {
      const F *log = weights_->log + tile.s0, *plain = weights_->plain + tile.s0;
      for (int64_t s = 0; !is_float() && s < pad<F>(tile.n); s += kLanes<F>)
        store(row + s, load(given + s) == F(0) ? load(plain + s) : Vec<F>{});
      for (int64_t s = 0; is_float() && s < pad<F>(tile.n); s += kLanes<F>) {
        const Vec<F> x = sum(given + s, log + s) - reference[i];
        low = vmin(x == -kInf<F> ? Vec<F>{} : x, low);
        store(row + s, vexp<F>(x));
      }
    });
    lowest = reduce_min<F>(low);
    transpose<F>(kQueries, tile.n, row_, pad<F>(keys_), out, kQueries);
  }

  // The logarithms of `masses`.
  void log_masses(const KeyTile& tile, F* out) {
    if (!p_.mask) {
      causal_tile(tile, weights_->log, -kInf<F>, out);
      for (int64_t k = 0; k < tile.n * kQueries; ++k) out[k] -= weights_->top;
      return;
    }
    each_row(tile, [&](int64_t i, const F* given, F* row) {
      for (int64_t s = 0; s < pad<F>(tile.n); s += kLanes<F>)
        store(row + s, sum(given + s, weights_->log + tile.s0 + s) - reference[i]);
    });
    transpose<F>(kQueries, tile.n, row_, pad<F>(keys_), out, kQueries);
  }

  // Adds a tile [n][kQueries] of gradients to the mask's.
  void add_gradient(int64_t b, int64_t h, const KeyTile& tile, const F* gradient) const {
    const int64_t ld = pad<F>(keys_);
    transpose<F>(tile.n, kQueries, gradient, kQueries, row_, ld);
    const View& to = p_.d_mask;
    const int64_t base = b * to.stride[0] + h * to.stride[1] + row0_ * to.stride[2] + tile.s0 * to.stride[3];
    const auto add = [&](auto* data) {
      for (int64_t i = 0; i < n_; ++i)
        for (int64_t s = 0; s < tile.n; ++s) data[i * to.stride[2] + s * to.stride[3]] += row_[i * ld + s];
    };
    to.dtype == Dtype::f64 ? add(static_cast<double*>(to.data) + base) : add(static_cast<float*>(to.data) + base);
  }

  int64_t keys() const { return keys_; }

 private:
  bool is_float() const { return p_.mask && p_.mask.dtype != kBool; }
  int64_t blocks() const { return (p_.L + kQueries - 1) / kQueries; }
  int64_t columns() const { return (p_.S + keys_ - 1) / keys_; }
  // How many keys stand before the first that query i may not see for being later.
  int64_t visible(int64_t i) const { return p_.causal ? std::max<int64_t>(0, std::min(p_.S, i + offset_ + 1)) : p_.S; }

  // What the mask adds for query i and the keys s0..s0+n, up to a whole vector: −∞ where it bans them, or NaN, which
  // says the same.  As it lies in memory where that will do, else in `room`.
  const F* additive(int64_t i, int64_t s0, int64_t n, F* room) const {
    const int64_t at = base_ + i * p_.mask.stride[2] + s0 * p_.mask.stride[3], step = p_.mask.stride[3];
    const int64_t end = std::max<int64_t>(0, std::min(n, visible(i) - s0));
    const Dtype own = sizeof(F) == 8 ? Dtype::f64 : Dtype::f32;
    if (step == 1 && end == pad<F>(n) && p_.mask.dtype == own) return static_cast<const F*>(p_.mask.data) + at;
    if (is_float()) {
      load_row<F>(p_.mask, at, step, end, room);
    } else {
      const uint8_t* src = static_cast<const uint8_t*>(p_.mask.data) + at;
      for (int64_t s = 0; step == 1 && s < end; ++s) room[s] = src[s] ? F(0) : -kInf<F>;
      for (int64_t s = 0; step != 1 && s < end; ++s) room[s] = src[s * step] ? F(0) : -kInf<F>;
    }
    for (int64_t s = end; s < pad<F>(n); ++s) room[s] = -kInf<F>;
    return room;
  }
  static Vec<F> sum(const F* row, const F* log) { return vmax(load(row) + load(log), splat(-kInf<F>)); }

  // Whether a bool mask says at a glance that query i sees none of the keys s0..s0+n.
  bool bans_all(int64_t i, int64_t s0, int64_t n) const {
    if (is_float() || p_.mask.stride[3] != 1) return false;
    const uint8_t* row = static_cast<const uint8_t*>(p_.mask.data) + base_ + i * p_.mask.stride[2] + s0;
    uint8_t any = 0;
    for (int64_t s = 0; s < n; ++s) any |= row[s];
    return any == 0;
  }

  // Whether any query of the block sees a key of the tile; raises the maxima of its rows and columns.
  bool occupied(int64_t row0, int64_t s0) {
    const int64_t n = std::min(keys_, p_.S - s0);
    Vec<F> any = splat(-kInf<F>);
    for (int64_t i = row0; i < std::min(p_.L, row0 + kQueries); ++i) {
      if (bans_all(i, s0, n)) continue;
      const F* row = additive(i, s0, n, row_);
      Vec<F> top = splat(-kInf<F>);
      for (int64_t s = 0; s < n; s += kLanes<F>) {
        const Vec<F> x = vmax(load(row + s), splat(-kInf<F>));
        top = vmax(top, x);
        store(key_top_ + s0 + s, vmax(load(key_top_ + s0 + s), x));
      }
      row_top_[i] = std::max(row_top_[i], reduce_max<F>(top));
      any = vmax(any, top);
    }
    return reduce_max<F>(any) != -kInf<F>;
  }

  F row_top(int64_t i) {
    Vec<F> top = splat(-kInf<F>);
    for (const KeyTile& tile : tiles) {
      const F* row = additive(row0_ + i, tile.s0, tile.n, row_);
      for (int64_t s = 0; s < tile.n; s += kLanes<F>) top = vmax(top, sum(row + s, weights_->log + tile.s0 + s));
    }
    return reduce_max<F>(top);
  }

  // call(i, given, row) on what the mask adds for each query of the block, and where its row is to be; the row is −∞
  // for queries beyond the block, and for those that see nothing.
  template <class Call>
  void each_row(const KeyTile& tile, Call call) {
    const int64_t ld = pad<F>(keys_);
    for (int64_t i = 0; i < kQueries; ++i) {
      F* row = row_ + i * ld;
      if (seen[i] == 0) fill(row, ld, -kInf<F>);
      call(i, seen[i] == 0 ? row : additive(row0_ + i, tile.s0, tile.n, row), row);
    }
  }

  // Without a mask: `weights` of the keys that stand before the causal edge, `banned` beyond.
  void causal_tile(const KeyTile& tile, const F* weights, F banned, F* out) const {
    for (int64_t s = tile.s0; s < tile.s0 + tile.n; ++s, out += kQueries) {
      const int64_t from = p_.causal ? std::max<int64_t>(0, s - offset_ - row0_) : 0;
      for (int64_t i = 0; i < kQueries; ++i) out[i] = i < from || i >= n_ ? banned : weights[s];
    }
  }

  const MaskedParams& p_;
  int64_t keys_, offset_, row0_ = 0, n_ = 0, base_ = -1;
  const KeyWeights<F>* weights_ = nullptr;
  Buffer<F> row_;  // [kQueries][keys] a tile as the mask holds it

 public:
  Buffer<F> reference, seen;   // [kQueries] what log masses count from; 1 where the query sees a key, else 0
  std::vector<KeyTile> tiles;  // of the block
  F lowest;                    // the smallest log mass of the block, of what is not banned

 private:
  Buffer<F> key_top_, row_top_;    // [S] [L] the maxima of the mask's columns and rows
  std::vector<uint8_t> occupied_;  // [blocks][columns] whether the tile holds something
};

}  // namespace
}  // namespace sfk
