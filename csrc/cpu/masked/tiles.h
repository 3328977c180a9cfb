// Query-dependent masks by tiles of [keys][queries]: which tiles hold anything, and the masses in them.
//
// Queries lie in the lanes: what a block of queries has for each key, reference or coordinate is a row of kQueries
// numbers, so that sums over these are sums of vectors, and a mask is turned once, when its tile is read.
#pragma once
#include <vector>

#include "../attention.h"

namespace sfk {
namespace {

constexpr int64_t kQueries =
    64;  // of a block: as wide as the register tile of a product (gemm.h), 4 vectors of AVX-512

// src [rows][ld] -> dst [cols][dst_ld]
template <class F>
void transpose(int64_t rows, int64_t cols, const F* src, int64_t ld, F* dst, int64_t dst_ld) {
  constexpr int64_t kSide = 16;  // rows and columns that are turned while they are in the first-level cache
  for (int64_t i0 = 0; i0 < rows; i0 += kSide)
    for (int64_t j0 = 0; j0 < cols; j0 += kSide)
      for (int64_t j = j0; j < std::min(cols, j0 + kSide); ++j)
        for (int64_t i = i0; i < std::min(rows, i0 + kSide); ++i) dst[j * dst_ld + i] = src[i * ld + j];
}

// What the keys of a head weigh before a query's mask: log a_s + (1 − λ_a) m_s.
template <class F>
struct KeyWeights {
  Buffer<F> log, plain;  // [S]: −∞ and 0 where a key takes no part; plain = e^{log − top}
  F top, lowest;         // the largest, and the smallest of log − top
  int64_t first;         // key that takes part; S where none does

  explicit KeyWeights(int64_t S) : log(S + kLanes<F>), plain(S + kLanes<F>) {}
  void finish(int64_t S) {
    top = -kInf<F>, lowest = 0, first = S;
    for (int64_t s = S; s < S + kLanes<F>; ++s) log[s] = -kInf<F>;
    for (int64_t s = S - 1; s >= 0; --s)
      if (log[s] != -kInf<F>) top = std::max(top, log[s]), first = s;
    if (first == S) top = 0;
    for (int64_t s = 0; s < S; s += kLanes<F>) store(plain + s, vexp<F>(load(log + s) - top));
    for (int64_t s = first; s < S; ++s)
      if (log[s] != -kInf<F>) lowest = std::min(lowest, log[s] - top);
  }
};

struct KeyTile {
  int64_t s0, n;
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
        key_seen_(p.mask ? p.S : 0),
        occupied_(p.mask ? blocks() * columns() : 0) {}

  // The mask of this head: read as a whole where it is not that of the head before.
  void begin_head(int64_t b, int64_t h) {
    if (!p_.mask) return;
    const int64_t base = b * p_.mask.stride[0] + h * p_.mask.stride[1];
    if (base == base_) return;
    base_ = base;
    std::fill(key_seen_.begin(), key_seen_.end(), 0);
    for (int64_t block = 0; block < blocks(); ++block)
      for (int64_t k = 0; k < columns(); ++k) occupied_[block * columns() + k] = occupied(block * kQueries, k * keys_);
  }
  // Whether any query sees the key; the others are never read.
  bool sees(int64_t s) const { return p_.mask ? key_seen_[s] : p_.L > 0; }

  // Queries row0..row0+n: the tiles they see something in, and what their masses are relative to.
  void begin_block(int64_t row0, int64_t n, const KeyWeights<F>& weights) {
    row0_ = row0, n_ = n, weights_ = &weights, lowest = weights.lowest;
    tiles.clear();
    const int64_t end = visible(row0 + n - 1);
    for (int64_t k = 0; k * keys_ < end; ++k)
      if (!p_.mask || occupied_[row0 / kQueries * columns() + k])
        tiles.push_back({k * keys_, std::min(keys_, end - k * keys_)});
    for (int64_t i = 0; i < kQueries; ++i) {
      F top = -kInf<F>;
      if (i < n && !p_.mask) top = weights.first < visible(row0 + i) ? weights.top : top;
      if (i < n && p_.mask) top = row_top(i);
      seen[i] = top != -kInf<F>;
      reference[i] = seen[i] == 0 ? F(0) : is_float() ? top : weights.top;
    }
  }

  // n_is of a tile [n][kQueries]: e^{mask + weight − reference}, 0 where query i does not see key s.
  void masses(const KeyTile& tile, F* out) {
    if (!p_.mask) return causal_tile(tile, weights_->plain, F(0), out);
    each_row(tile, [&](int64_t i, F* row) {
      for (int64_t s = 0; s < pad<F>(tile.n); s += kLanes<F>) {
        const Vec<F> x = load(row + s) + load(weights_->log + tile.s0 + s) - reference[i];
        lowest = is_float() ? std::min(lowest, reduce_min<F>(x == -kInf<F> ? Vec<F>{} : x)) : lowest;
        store(row + s, vexp<F>(x));
      }
    });
    transpose<F>(kQueries, tile.n, row_, pad<F>(keys_), out, kQueries);
  }

  // The logarithms of `masses`.
  void log_masses(const KeyTile& tile, F* out) {
    if (!p_.mask) {
      causal_tile(tile, weights_->log, -kInf<F>, out);
      for (int64_t k = 0; k < tile.n * kQueries; ++k) out[k] -= weights_->top;
      return;
    }
    each_row(tile, [&](int64_t i, F* row) {
      for (int64_t s = 0; s < pad<F>(tile.n); s += kLanes<F>)
        store(row + s, load(row + s) + load(weights_->log + tile.s0 + s) - reference[i]);
    });
    transpose<F>(kQueries, tile.n, row_, pad<F>(keys_), out, kQueries);
  }

  // Adds a tile [n][kQueries] of gradients to the mask's, rows of queries that see nothing left out.
  void add_gradient(int64_t b, int64_t h, const KeyTile& tile, const F* gradient) const {
    const View& to = p_.d_mask;
    const int64_t base = b * to.stride[0] + h * to.stride[1] + row0_ * to.stride[2] + tile.s0 * to.stride[3];
    const auto add = [&](auto* data) {
      for (int64_t i = 0; i < n_; ++i)
        for (int64_t s = 0; s < tile.n; ++s) data[i * to.stride[2] + s * to.stride[3]] += gradient[s * kQueries + i];
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

  // What the mask adds for query row0 + i and the keys s0..s0+n: −∞ where it bans them.
  void additive(int64_t i, int64_t s0, int64_t n, F* out) const {
    const int64_t at = base_ + i * p_.mask.stride[2] + s0 * p_.mask.stride[3], step = p_.mask.stride[3];
    const int64_t end = std::max<int64_t>(0, std::min(n, visible(i) - s0));
    if (is_float()) {
      load_row<F>(p_.mask, at, step, end, out);
      for (int64_t s = 0; s < end; ++s) out[s] = out[s] > -kInf<F> ? out[s] : -kInf<F>;  // NaN bans
    } else {
      const uint8_t* src = static_cast<const uint8_t*>(p_.mask.data) + at;
      for (int64_t s = 0; s < end; ++s) out[s] = src[s * step] ? F(0) : -kInf<F>;
    }
    for (int64_t s = end; s < pad<F>(n); ++s) out[s] = -kInf<F>;
  }

  bool occupied(int64_t row0, int64_t s0) {
    const int64_t n = std::min(keys_, p_.S - s0);
    bool any = false;
    for (int64_t i = row0; i < std::min(p_.L, row0 + kQueries); ++i) {
      additive(i, s0, n, row_);
      for (int64_t s = 0; s < n; ++s) {
        const bool here = row_[s] != -kInf<F>;
        any |= here, key_seen_[s0 + s] |= here;
      }
    }
    return any;
  }

  F row_top(int64_t i) {
    Vec<F> top = splat(-kInf<F>);
    for (const KeyTile& tile : tiles) {
      additive(row0_ + i, tile.s0, tile.n, row_);
      for (int64_t s = 0; s < pad<F>(tile.n); s += kLanes<F>)
        top = vmax(top, load(row_ + s) + load(weights_->log + tile.s0 + s));
    }
    return reduce_max<F>(top);
  }

  // call(i, row) on what the mask adds for each query of the block; −∞ for those beyond it, or that see nothing.
  template <class Call>
  void each_row(const KeyTile& tile, Call call) {
    const int64_t ld = pad<F>(keys_);
    for (int64_t i = 0; i < kQueries; ++i) {
      F* row = row_ + i * ld;
      if (seen[i] == 0)
        fill(row, ld, -kInf<F>);
      else
        additive(row0_ + i, tile.s0, tile.n, row);
      call(i, row);
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
  std::vector<uint8_t> key_seen_, occupied_;  // [S] any query sees it; [blocks][columns] the tile holds something
};

}  // namespace
}  // namespace sfk
