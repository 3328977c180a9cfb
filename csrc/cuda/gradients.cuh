// From dℓ to the gradients of tokens and parameters: what the passes over queries and keys share.
//
// With ĉ_ij = ⟨x̂_i, ŷ_j⟩, dĉ = β κ dℓ/ε (rbf) or dκ = dℓ/ε (dot):
//
//   dx_i = (Σ_j dĉ_ij ŷ_j − x̂_i Σ_j dĉ_ij ĉ_ij)/‖x_i‖,   dŷ_j = Σ_i dĉ_ij x̂_i,   dy_j = (dŷ_j − ŷ_j⟨ŷ_j, dŷ_j⟩)/‖y_j‖
//   dβ = Σ dℓ κ (ĉ − 1)/ε,   dε = −Σ dℓ (κ − 1)/ε²,   dτ = −2τ Σ dℓ ‖p − π‖²,   dπ_j = 2τ² Σ_i dℓ_ij (p_i − π_j)
//
// A block goes over its tokens in steps of a tile for every warp.  The sums over tokens stay in shared memory until the
// blocks of the cluster add theirs, in the order of their ranks.
#pragma once
#include "transport.cuh"

namespace sfk {
namespace {

// Shared memory of a block, backward.  Where two things are named they take turns: before and after the queries.
template <class T>
struct BackwardShared : HeadShared<T> {
  int buffers, sums_length, values_length;  // steps of tokens in memory, 1 or 2; rows of dy, of dz
  Place<float> tile;                        // [warps·16,stride] the queries' weights; lies where the logits will
  Place<float> d_z;                         // [Mp,values_length] the sums of the queries; the same
  Place<T> zd;                              // [Mp,v_length] z; dz
  Place<float> d_y;                         // [Mp,sums_length] the sums of dŷ
  Place<float> scale, factor;               // [warps,16] x is scaled by; the rows' factor
  Place<float> columns, places;             // [warps,Mp] Σ dS, [warps,Mp,P] Σ dℓ (p − π)
  Place<float> row_q, row_r, d_log_a;       // [steps,rows] twice, [rows]
  Place<float> row_top;  // [steps,rows] where the references are several chunks: see KeyPass::row_maximum
  Place<float> col_q, col_r, d_col, levels;    // [steps,Mp] thrice, [steps,2]
  Place<float> zdz, dg, d_log_b, part, parts;  // [Mp] [Mp] [Mp] [sharing,Mp] [2,Mp]
  Place<float> sums;                           // [8] of the block, read by the others

  // Of a row of logits, see Form.
  static int stride_of(int64_t M) {
    return known_references<T>(M) ? known_references<T>(M) : LogitRows::padded_stride(M);
  }
  static int64_t queries_numbers(const AttentionParams& p, int warps) {
    return int64_t{warps} * kTile * stride_of(p.M) + int64_t{padded(p.M)} * (padded(p.E) + 8);
  }
  static int64_t staged_numbers(const AttentionParams& p, int warps, int buffers) {
    const int64_t rows = int64_t{warps} * kTile, keys = rows * kBuffers<T> * row_length<T>(p.D);
    const int64_t pairs = rows * buffers * (row_length<T>(p.D) + row_length<T>(p.E));
    return keys > pairs ? keys : pairs;
  }
  BackwardShared() = default;
  BackwardShared(Arena& arena, const AttentionParams& p, const BlockShape& block)
      : HeadShared<T>(arena, p, block, stride_of(p.M), queries_numbers(p, block.warps),
                      staged_numbers(p, block.warps, block.buffers)),
        buffers(block.buffers),
        sums_length(padded(p.D) + 8),
        values_length(padded(p.E) + 8) {
    const int warps = block.warps, rows_ = block.rows;
    const int Mp = padded(p.M), steps = static_cast<int>(p.T > 1 ? p.T : 1), P = static_cast<int>(p.P);
    tile = this->l, d_z.at = this->l.at + warps * kTile * stride_of(p.M);
    zd = arena.take<T>(Mp * this->v_length);
    d_y = arena.take(Mp * sums_length);
    scale = arena.take(warps * kTile), factor = arena.take(warps * kTile);
    columns = arena.take(warps * Mp), places = arena.take(p.ref_pos.data ? warps * Mp * P : 0);
    const int64_t all_rows = int64_t{steps} * rows_, all_columns = int64_t{steps} * Mp;
    row_q = arena.take(all_rows), row_r = arena.take(all_rows), d_log_a = arena.take(rows_);
    row_top = arena.take(Mp > kColumns ? all_rows : 0);
    col_q = arena.take(all_columns), col_r = arena.take(all_columns), d_col = arena.take(all_columns);
    levels = arena.take(2 * steps);
    zdz = arena.take(Mp), dg = arena.take(Mp), d_log_b = arena.take(Mp);
    part = arena.take(Strips(Mp, warps).sharing * Mp), parts = arena.take(2 * Mp);
    sums = arena.take(8);
  }
};

// What a thread has seen of the sums for the hyperparameters, in the order of Hyper.
struct HyperSums {
  float of[kNumHyper] = {};
};

// Tokens with what belongs to them, a tile for every warp at a time: x [warps·16,y_length] and w [warps·16,v_length].
template <class T>
struct Pairs {
  const BackwardShared<T>& shared;
  const Rows<T>*x, *w;  // x may be null
  int64_t first;        // row 0 of this block
  int count;            // rows that exist
  const float* mass;

  SFK_DEVICE T* x_of(int buffer) const {
    return shared.staged + buffer * block_warps() * kTile * (shared.y_length + shared.v_length);
  }
  SFK_DEVICE T* w_of(int buffer) const { return x_of(buffer) + block_warps() * kTile * shared.y_length; }
  SFK_DEVICE void fetch(int row, int end, int buffer) const {
    if (row < end) {
      const float* from = mass ? mass + row : nullptr;
      const int rows = block_warps() * kTile, index = thread_index(), step = block_threads();
      if (x) stage(*x, x_of(buffer), shared.y_length, rows, first + row, count - row, from, index, step);
      stage(*w, w_of(buffer), shared.v_length, rows, first + row, count - row, from, index, step);
    }
    copies_commit();
  }
  // visit(row, x, w) for the rows start, start + step, .. < end; the barriers before and after are here.
  template <class Visit>
  SFK_DEVICE void each(int start, int step, int end, Visit visit) const {
    const bool ahead = shared.buffers == 2;
    int buffer = 0;
    if (ahead) fetch(start, end, 0);
#pragma unroll 1
    for (int row = start; row < end; row += step) {
      fetch(ahead ? row + step : row, end, ahead ? buffer ^ 1 : 0);
      ahead ? copies_wait<1>() : copies_wait<0>();
      sync_block();
      visit(row, x_of(buffer), w_of(buffer));
      sync_block();
      if (ahead) buffer ^= 1;
    }
  }
};

// 1/‖x‖ of the rows of this warp's tile as scale·factor; x is multiplied by the scale, a power of two that keeps
// float16 weights of x in range (1 for the other dtypes, which need none).
template <class T>
SFK_DEVICE void scale_tile(const Head& head, const BackwardShared<T>& shared, T* x) {
  const int row = lane_index() / 2, at = warp_index() * kTile + row, depth = shared.y_length - kShift<T>;
  const float inverse = head.rbf ? inverse_norm(x, shared.y_length, depth) : 1.0f;
  float scale = 1;
  if (std::is_same<T, F16>::value && head.rbf && inverse > 0) {
    scale = exp2f(rintf(log2f(inverse)));
    for (int d = lane_index() % 2; d < depth; d += 2) {
      T& number = x[row * shared.y_length + d];
      number = rounded<T>(to_float(number) * scale);
    }
  }
  if (lane_index() % 2 == 0) shared.scale[at] = scale, shared.factor[at] = inverse / scale;
  sync_warp();
}

// Σ over the 16 rows of a tile of what the lanes hold of rows g and g + 8.
SFK_DEVICE float over_rows(float x) {
  for (int mask = 4; mask < kWarp; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
// Σ over the lanes that share row g.
SFK_DEVICE float over_columns(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Adds Σ_i term(i, j, dℓ_ij) to out[j·step], of this warp's own; i: 0 and 1 for rows g and g + 8.
template <class Term>
SFK_DEVICE void add_over_rows(const Chunk& dl, int first, int tiles, float* out, int step, Term term) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int j = first + n * 8 + 2 * t + c;
      const float sum = over_rows(term(0, j, dl[n][c]) + term(1, j, dl[n][2 + c]));
      if (lane_index() < 4) out[j * step] += sum;
    }
  }
}

// Where rows g and g + 8 stand: whether they have a position, the reference nearest to it, and how far that is,
// squared.
struct Places {
  bool placed[2] = {false, false};
  int nearest[2] = {0, 0};
  float least[2] = {0, 0};

  SFK_DEVICE Places(const Head& head, const float* pi, const Positions& positions, const int (&token)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      placed[r] = head.P && token[r] >= 0 && positions.placed(token[r], head.P);
      float lowest = -kNone;
#pragma unroll 1
      for (int j = 0; placed[r] && j < head.M; ++j) {
        float square = 0;
#pragma unroll 1
        for (int c = 0; c < head.P; ++c) {
          const float away = positions.coordinate(token[r], c) - pi[j * head.P + c];
          square = fmaf(away, away, square);
        }
        if (square < lowest) lowest = least[r] = square, nearest[r] = j;
      }
    }
  }
};

// The positions' part of a chunk: dτ's sum, and Σ_i dℓ_ij (p_i − π_j).  Squares count from that of the row's nearest
// reference on: dℓ sums to a known total but for rounding, and a squared distance of thousands would multiply that.
template <class T>
SFK_DEVICE void add_places(const Head& head, const BackwardShared<T>& shared, const Positions& positions,
                           const int (&token)[2], const Places& places, const Chunk& dl, int first, int tiles,
                           HyperSums& sums) {
  const auto& placed = places.placed;
#pragma unroll 1
  for (int c = 0; c < head.P; ++c) {
    float p[2], least[2];
    for (int r = 0; r < 2; ++r) {
      p[r] = placed[r] ? positions.coordinate(token[r], c) : 0.0f;
      least[r] = p[r] - shared.pi[places.nearest[r] * head.P + c];
    }
    add_over_rows(dl, first, tiles, shared.places + warp_index() * head.Mp * head.P + c, head.P,
                  [&](int r, int j, float d) {
                    const float away = p[r] - shared.pi[j * head.P + c];
                    if (!placed[r]) return 0.0f;
                    sums.of[kPositionScale] += d * ((away - least[r]) * (away + least[r]));
                    return d * away;
                  });
  }
}

// dĉ of this warp's tile into `tile`, times the rows' factor and as the products will take it: where what to_logits
// needs of the chunk may have been, which therefore waits for the warp.
// to_logits(first, tiles, chunk) makes dℓ of ⟨w_i, zd_j⟩; total: what rows g and g + 8 of it sum to; along: their
// Σ_j dĉ_ij ĉ_ij.
template <class T, class ToLogits>
SFK_DEVICE void gradient_tile(const Head& head, const BackwardShared<T>& shared, const T* x, const T* w,
                              const Weights<T>& tile, const Positions& positions, const int (&token)[2],
                              const float (&total)[2], ToLogits to_logits, HyperSums& sums, float (&along)[2]) {
  const int g = lane_index() / 4, t = lane_index() % 4, yl = shared.y_length, vl = shared.v_length;
  const float* factors = shared.factor + warp_index() * kTile;
  const float factor[2] = {factors[g], factors[g + 8]};
  const Places places(head, shared.pi, positions, token);
  if (t == 0) sums.of[kPositionScale] += places.least[0] * total[0] + places.least[1] * total[1];
  along[0] = along[1] = 0;
#pragma unroll 1
  for (int first = 0; first < head.Mp; first += kColumns) {
    const int tiles = chunk_tiles(head, first);
    Chunk dl = {}, product = {};
    rows_product<T>(dl, w, shared.zd + first * vl, vl, vl - kShift<T>, tiles);
    to_logits(first, tiles, dl);
    if (head.P) add_places(head, shared, positions, token, places, dl, first, tiles, sums);
    rows_product<T>(product, x, shared.y + first * yl, yl, yl - kShift<T>, tiles);
    const int turn = tile.rows.turn_anew(g);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n >= tiles) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        const float kappa = head.kappa(product[n][e], factor[r]), cosine = product[n][e] * factor[r];
        sums.of[kEpsilon] += dl[n][e] * (kappa - head.middle);
        if (head.rbf) sums.of[kBandwidth] += dl[n][e] * (kappa * (cosine - 1) - head.middle_slope);
        const float d = dl[n][e] * head.inv_eps * (head.rbf ? head.beta * kappa : 1.0f);
        const float operand = to_float(rounded<T>(d * factor[r]));
        along[r] += operand * cosine;
        product[n][e] = operand;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
        tile.store(g + r * 8, first + n * 8 + 2 * t, turn, product[n][2 * r], product[n][2 * r + 1]);
    }
  }
  along[0] = over_columns(along[0]), along[1] = over_columns(along[1]);
  sync_warp();
}

// dx of this warp's tile to the rows of `to` from `first` on, as many as there are.
template <class T>
SFK_DEVICE void store_token_gradients(const Rows<T>& to, const Head& head, const BackwardShared<T>& shared, const T* x,
                                      const Weights<T>& tile, int64_t first, int count, const float (&along)[2]) {
  const int g = lane_index() / 4, t = lane_index() % 4, ld = shared.y_length;
  const float *factor = shared.factor + warp_index() * kTile, *scale = shared.scale + warp_index() * kTile;
#pragma unroll 1
  for (int d0 = 0; d0 < ld - kShift<T>; d0 += kNarrow) {
    const int left = ld - kShift<T> - d0, tiles = (left < kNarrow ? left : kNarrow) / 8;
    float acc[kNarrow / 8][4] = {};
    tile.times(acc, shared.y + d0, ld, tiles);
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = g + k / 2 * 8, d = d0 + n * 8 + 2 * t + k % 2;
        const float radial = head.rbf && d < ld ? to_float(x[i * ld + d]) * factor[i] * along[k / 2] : 0.0f;
        acc[n][k] = scale[i] * (acc[n][k] - radial);
      }
    store_tile(to, first, count, d0, acc);
  }
}

// out[j,e] += product(acc, j0, e0, tiles) of 16 references from j0 on and 8·tiles of the columns that rows of `ld`
// have from e0 on: a warp's at a time, so that every number has one owner.
template <class T, class Product>
SFK_DEVICE void add_products(float* out, int out_length, int Mp, int ld, Product product) {
  const int width = ld - kShift<T>, across = (width + kNarrow - 1) / kNarrow, tasks = Mp / kTile * across;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int task = warp_index(); task < tasks; task += block_warps()) {
    const int j0 = task / across * kTile, e0 = task % across * kNarrow;
    const int tiles = (width - e0 < kNarrow ? width - e0 : kNarrow) / 8;
    float acc[kNarrow / 8][4] = {};
    product(acc, j0, e0, tiles);
#pragma unroll
    for (int n = 0; n < kNarrow / 8; ++n) {
      if (n >= tiles) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) out[(j0 + g + k / 2 * 8) * out_length + e0 + n * 8 + 2 * t + k % 2] += acc[n][k];
    }
  }
}

// out[j,e] += Σ_i w[i,j] rows[i,e] over `depth` rows in shared memory.
template <class T>
SFK_DEVICE void add_weighted(float* out, int out_length, const Weights<T>& w, const T* rows, int ld, int depth) {
  add_products<T>(out, out_length, w.Mp, ld, [&](auto& acc, int j0, int e0, int tiles) {
    w.transposed_times(acc, j0, rows + e0, ld, depth, tiles);
  });
}

// The blocks' dŷ added up and taken to dy; each block has its share of the references.
template <class T>
SFK_DEVICE void store_references(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared,
                                 int64_t group) {
  const int D = static_cast<int>(p.D), ranks = cluster_size();
  for (int j = cluster_rank() * block_warps() + warp_index(); j < head.M; j += ranks * block_warps()) {
    float square = 0, along = 0;
    for (int d = lane_index(); d < D; d += kWarp) {
      const float sum = sum_over_ranks(0, [&](int r) { return map_shared(shared.d_y, r)[j * shared.sums_length + d]; });
      const float y = read(p.references, head.h, j, d);
      shared.d_y[j * shared.sums_length + d] = sum;  // no other block reads these rows
      square += y * y, along += y * sum;
    }
    square = warp_sum(square), along = warp_sum(along);
    const float inverse = square > 1e-24f ? 1 / sqrtf(square) : 0.0f;
    for (int d = lane_index(); d < D; d += kWarp) {
      const float sum = shared.d_y[j * shared.sums_length + d];
      const float unit = read(p.references, head.h, j, d) * inverse;
      *at(p.d_references, group, head.h, j, d) = head.rbf ? (sum - unit * (along * inverse)) * inverse : sum;
    }
  }
}

// dπ, by the first block.
template <class T>
SFK_DEVICE void store_places(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared,
                             int64_t group) {
  for (int k = thread_index(); cluster_rank() == 0 && k < head.M * head.P; k += block_threads()) {
    float sum = 0;
#pragma unroll 1
    for (int r = 0; r < cluster_size(); ++r)
      for (int w = 0; w < block_warps(); ++w) sum += map_shared(shared.places, r)[w * head.Mp * head.P + k];
    *at(p.d_ref_pos, group, head.h, k / head.P, k % head.P) = 2 * head.tau2 * sum;
  }
}

}  // namespace
}  // namespace sfk
