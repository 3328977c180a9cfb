// Backward of the transport on the chip, exact for the T iterations that ran: from dz and dg^T to dk, dv and dℓ.
//
// Every block holds K = e^{ℓ−m} of its keys (or ℓ − m, in the log domain) through all iterations, t = T..1:
//
//   Q^t_sj = e^{ℓ + f^t − c^t} = K_sj q^t_s e^{top c − c^t_j},    R^t_sj = K_sj G^t_j/(K G^t)_s
//   df^t_s = Σ_j Q^t_sj dc^t_j (t = T: also ⟨v_s, dz_j⟩ − ⟨z_j, dz_j⟩),    dg^{t−1}_j = −λ_a Σ_s R^t_sj df^t_s
//
// dℓ, the sum of all those terms, is K times a matrix of rank 2T and ⟨v, dz⟩: formed in the last pass, tile by tile.
#pragma once
#include "gradients.cuh"

namespace sfk {
namespace {

// Scaled, gradients are multiplied by factors up to e^range: half of the exponents are left to them.
constexpr float kBackwardRange = 40;

// One head's transport, backward, as a block sees it.
template <class T, bool kLog>
struct KeyPass {
  const AttentionParams& p;
  const Head& head;
  const KeyShare& keys;
  const BackwardShared<T>& shared;
  HyperSums& sums;
  bool lone;  // one key takes part: it is pooled with weight 1, a constant
  int steps = static_cast<int>(p.T > 1 ? p.T : 1), last = steps - 1;

  SFK_DEVICE float* row_q(int t) const { return shared.row_q + t * shared.rows; }
  SFK_DEVICE float* row_r(int t) const { return shared.row_r + t * shared.rows; }
  // max_j (ℓ − m + g_j) of iteration t, until the next one; m is needed until the last.
  SFK_DEVICE float* row_top(int t) const { return t ? row_r(t - 1) : shared.top + 0; }
  SFK_DEVICE float* col_q(int t) const { return shared.col_q + t * head.Mp; }
  SFK_DEVICE float* col_r(int t) const { return shared.col_r + t * head.Mp; }
  SFK_DEVICE float* d_col(int t) const { return shared.d_col + t * head.Mp; }

  // Q without dc: of element l in row i and column j.
  SFK_DEVICE float sent(float l, float q, float c) const { return kLog ? exp_approx((l + q) + c) : l * q * c; }

  // max_j (ℓ_ij − m_i + g_j) of iteration t, for the four lanes that share row i; 0 where there is none.  One chunk of
  // ℓ is still there when it is asked for; of several the first are not: then step_rows has kept it.
  SFK_DEVICE float row_maximum(int i, int t) const {
    if (head.Mp > kColumns) return shared.row_top[t * shared.rows + i];
    float x[2] = {kNone, kNone};
    for (int j = lane_index() % 4; j < head.M; j += 4) x[0] = fmaxf(x[0], shared.l[head.place(i, j)] + col_r(t)[j]);
    row_maxima(x);
    return finite_or_zero(x[0]);
  }

  // Whether the columns of Q are divided by the sums that they have here.  Far from every reference f and c are
  // thousands, rounded to 2^−13: without it columns would be off by that, and what of them should cancel meets squared
  // distances.
  SFK_DEVICE bool settles() const { return sizeof(T) == 4 && head.P; }

  template <class Visit>
  SFK_DEVICE void over_blocks(const float* part, int count, int turn, Visit visit);
  SFK_DEVICE void settle_rows(int t);
  SFK_DEVICE void settle_columns(int t);
  SFK_DEVICE void settle();
  SFK_DEVICE void settle_values();
  SFK_DEVICE void step_columns(int t);
  SFK_DEVICE void pool_rows();
  SFK_DEVICE void step_rows(int t);
  SFK_DEVICE void sum_columns(int t);
  SFK_DEVICE void run();
  SFK_DEVICE void to_logits(int row, int first, int tiles, Chunk& dl) const;
  SFK_DEVICE void load_plan(int row, int first, int tiles, Chunk& w) const;
  SFK_DEVICE void store_values(const Rows<T>& to, int row, int count) const;
  SFK_DEVICE void finish() const;
};

// visit(j, total) with the sums of [count,Mp] parts of all blocks; turns 0 and 1, as the other blocks read behind.
template <class T, bool kLog>
template <class Visit>
SFK_DEVICE void KeyPass<T, kLog>::over_blocks(const float* part, int count, int turn, Visit visit) {
  sync_block();
  float* parts = shared.parts + turn * head.Mp;
  for (int j = thread_index(); j < head.Mp; j += block_threads()) {
    float total = 0;
    for (int k = 0; k < count; ++k) total += part[k * head.Mp + j];
    parts[j] = total;
  }
  sync_cluster();
  for (int j = thread_index(); j < head.Mp; j += block_threads())
    visit(j, sum_over_ranks(0, [&](int k) { return map_shared(parts, k)[j]; }));
}

// f^t, as the row factors of Q: step_rows takes these, as its own may be rounded elsewhere.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::settle_rows(int t) {
  const float lam = p.T ? head.lam_a : 0.0f;
  float* q = row_q(t);
  if (kLog) {
    log_rows(head, shared.rows, shared.l, col_r(t), shared.log_a, shared.top, q, lam, p.T > 0);
  } else {
    const float offset = static_cast<float>(-double{lam} * shared.levels[2 * t] - shared.levels[2 * t + 1]);
    scaled_rows(head, shared.rows, shared.l, col_r(t), shared.log_a, shared.top, q, lam, shared.scratch);
    for (int i = thread_index(); i < shared.rows; i += block_threads()) q[i] = exp_approx(q[i] + offset);
  }
  sync_block();
}

// 1/Σ_s Q^t_sj, where step_columns will have dc^t.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::settle_columns(int t) {
  const int sharing = Strips(head.Mp, block_warps()).sharing;
  const float *q = row_q(t), *c = col_q(t);
  settle_rows(t);
  each_column(head.Mp, [&](int j, int share) {
    float total = 0;
#pragma unroll 1
    for (int i = share; i < shared.rows; i += sharing) total += sent(shared.l[head.place(i, j)], q[i], c[j]);
    shared.part[share * head.Mp + j] = total;
  });
  over_blocks(shared.part, sharing, t % 2, [&](int j, float total) { d_col(t)[j] = total > 0 ? 1 / total : 1.0f; });
}

// All iterations' columns: by a factor of dc, and those of W^k by one of dz.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::settle() {
  sync_block();
#pragma unroll 1
  for (int t = 0; t < steps; ++t) settle_columns(t);
  sync_block();
  for (int k = thread_index(); !lone && k < head.Mp * shared.v_length; k += block_threads())
    shared.zd[k] = rounded<T>(to_float(shared.zd[k]) * d_col(last)[k / shared.v_length]);
  for (int k = thread_index(); k < block_warps() * head.Mp; k += block_threads()) shared.columns[k] = 0;
}

// ⟨z_j, dz_j⟩ from the plan of pool_rows: the forward's z is of one that may be rounded elsewhere.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::settle_values() {
  over_blocks(shared.columns, block_warps(), steps % 2, [&](int j, float total) { shared.zdz[j] = total; });
}

// dc^t and the parts of d log b and dλ_b that dg^t gives.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::step_columns(int t) {
  for (int j = thread_index(); j < head.Mp; j += block_threads()) {
    const float c = j < head.M ? *at(p.c, head.b, head.h, t, j) : kNone;
    const bool reached = c != kNone;
    float d = p.d_c.data && j < head.M ? *at(p.d_c, head.b, head.h, t, j) : 0.0f;
    if (p.T == 0 || reached) shared.d_log_b[j] += shared.dg[j];
    if (p.T && reached) {
      d -= head.lam_b * shared.dg[j];
      // Σ_j dg_j = 0 unless c has a gradient: then only its spread counts.
      sums.of[kLambdaB] -= shared.dg[j] * (p.d_c.data ? c : c - shared.levels[2 * t + 1]);
    }
    if (t == last && !lone) d -= shared.zdz[j];
    if (settles()) d *= d_col(t)[j];
    d_col(t)[j] = reached ? (kLog ? d : d * col_q(t)[j]) : 0.0f;
  }
  sync_block();
}

// Σ_j K_sj e^{top c − c_j} ⟨v_s, dz_j⟩ of every row (in the log domain Q for that product), where row_r^T will be.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::pool_rows() {
  const int g = lane_index() / 4, t = lane_index() % 4, ld = shared.v_length, step = block_warps() * kTile;
  if (kLog && !settles())
    log_rows(head, shared.rows, shared.l, col_r(last), shared.log_a, shared.top, row_q(last), head.lam_a, p.T > 0);
  const Rows<T> values(p.value, head.b, head.h);
  const Pairs<T> pairs = {shared, nullptr, &values, keys.first, keys.count, shared.log_a};
  pairs.each(0, step, shared.rows, [&](int row0, const T*, const T* w) {
    const int row = row0 + warp_index() * kTile;
    if (row >= shared.rows) return;
    float sum[2] = {};
#pragma unroll 1
    for (int first = 0; first < head.Mp; first += kColumns) {
      const int tiles = chunk_tiles(head, first);
      Chunk product = {};
      rows_product<T>(product, w + warp_index() * kTile * ld, shared.zd + first * ld, ld, ld - kShift<T>, tiles);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (n >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row + g + e / 2 * 8, j = first + n * 8 + 2 * t + e % 2;
          const float q = kLog ? row_q(last)[i] : 1.0f;
          product[n][e] *= sent(shared.l[head.place(i, j)], q, col_q(last)[j]);
          sum[e / 2] += product[n][e];
        }
      }
      if (settles())
        add_over_rows(product, first, tiles, shared.columns + warp_index() * head.Mp, 1,
                      [&](int r, int, float x) { return kLog ? x : x * row_q(last)[row + g + r * 8]; });
    }
    for (int r = 0; r < 2; ++r) {
      const float all = over_columns(sum[r]);
      if (t == 0) row_r(last)[row + g + r * 8] = lone ? 0.0f : all;
    }
  });
}

// f^t, as the row factors of Q and R, df^t, and the parts of d log a and dλ_a.  A row is eight lanes' work.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::step_rows(int t) {
  const float lam = p.T ? head.lam_a : 0.0f, shift = shared.levels[2 * t], level = shared.levels[2 * t + 1];
  const float offset = static_cast<float>(-double{lam} * shift - level);
  // Σ_s df_s = 0 unless c has a gradient: only the spread of LSE_j(ℓ + g) counts for dλ_a.
  const float center = p.d_c.data ? 0.0f : head.logit(head.kappa(0, 1));
  const float *G = col_r(t), *Q = col_q(t), *d = d_col(t);
  const auto add = [](float a, float b) { return a + b; };
#pragma unroll 1
  for (int i = warp_index() * 4 + lane_index() / 8; i < shared.rows; i += block_warps() * 4) {
    const float *l = shared.l + i * head.stride, mass = shared.log_a[i];
    const float m = shared.top[i];
    const int turn = head.turn(i);
    float lse, q, total = 0, df = 0, top = 0;
    if (kLog) {
      top = kNone;
      for (int j = lane_index() % 8; j < head.M; j += 8) top = fmaxf(top, l[head.turned(j, turn)] + G[j]);
      top = octet(top, [](float a, float b) { return fmaxf(a, b); });
      for (int j = lane_index() % 8; j < head.M; j += 8)
        total += exp_approx(l[head.turned(j, turn)] + G[j] - finite_or_zero(top));
      total = octet(total, add);
      lse = LogSum{top, total}.value();
      q = p.T ? (mass == kNone ? kNone : potential(mass + m * (1 - lam), lam, lse)) : mass + m;
      if (settles()) q = row_q(t)[i];
      lse += m;
      for (int j = lane_index() % 8; j < head.M; j += 8) df += sent(l[head.turned(j, turn)], q, Q[j]) * d[j];
    } else {
#pragma unroll 1
      for (int j = lane_index() % 8 * 4; j < head.Mp; j += 32) {
        const Vec4 x = *reinterpret_cast<const Vec4*>(l + head.turned(j, turn));
        total = dot(x, *reinterpret_cast<const Vec4*>(G + j), total);
        df = dot(x, *reinterpret_cast<const Vec4*>(d + j), df);
      }
      total = octet(total, add);
      const float log_total = logf(total);
      lse = m + shift + log_total;
      q = exp_approx((mass + offset) + m * (1 - lam) - lam * log_total);
    }
    df = octet(df, add);
    if (kLog) sync_warp();  // all eight have read m: row_top of the last pass lies there
    if (lane_index() % 8) continue;
    if (t == last) df += row_r(t)[i];  // see pool_rows; by the lane that writes there
    if (!kLog && settles()) q = row_q(t)[i];
    if (!kLog) df *= q;
    if (mass == kNone || lse == kNone) df = 0;
    shared.d_log_a[i] += df;
    if (p.T) sums.of[kLambdaA] -= df * (lse == kNone ? 0.0f : lse - center);
    row_q(t)[i] = q;
    if (kLog) row_top(t)[i] = finite_or_zero(top);
    if (kLog && head.Mp > kColumns) shared.row_top[t * shared.rows + i] = finite_or_zero(top);
    row_r(t)[i] = total > 0 ? -lam * df / total : 0.0f;
  }
  sync_block();
}

// dg^{t−1}: this block's part, and the sum of all.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::sum_columns(int t) {
  const int sharing = Strips(head.Mp, block_warps()).sharing;
  const float *r = row_r(t), *G = col_r(t);
  each_column(head.Mp, [&](int j, int share) {
    float total = 0;
#pragma unroll 1
    for (int i = share * 8; i < shared.rows; i += sharing * 8) {
      const float* l = shared.l + i * head.stride;
#pragma unroll
      for (int k = 0; k < 8; ++k) {  // of eight rows the places of a column are constants
        const float x = l[head.place(k, j)];
        total = fmaf(kLog ? exp_approx((x + G[j]) - row_top(t)[i + k]) : x, r[i + k], total);
      }
    }
    shared.part[share * head.Mp + j] = total;
  });
  over_blocks(shared.part, sharing, t % 2, [&](int j, float total) { shared.dg[j] = kLog ? total : total * G[j]; });
}

// All iterations: what the rows and columns of every dℓ need.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::run() {
  if (settles()) settle();
  pool_rows();
  if (settles()) settle_values();
#pragma unroll 1
  for (int t = last; t >= 0; --t) {
    step_columns(t);
    step_rows(t);
    if (p.T) sum_columns(t);
  }
  for (int j = thread_index(); p.T && j < head.Mp; j += block_threads()) shared.d_log_b[j] += shared.dg[j];
}

// ⟨v_s, dz_j⟩ -> dℓ of a tile whose first row is `row`.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::to_logits(int row, int first, int tiles, Chunk& dl) const {
  const int i[2] = {row + lane_index() / 4, row + lane_index() / 4 + 8}, column = first + lane_index() % 4 * 2;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n >= tiles) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(dl[n][e], e / 2, column + n * 8 + e % 2);
    }
  };
  const int turn = head.turn_anew(lane_index() / 4);
  const auto logit = [&](int r, int j) { return shared.l[i[r] * head.stride + head.turned(j, turn)]; };
  if (head.M == 1 && p.T) {  // R = 1, and every Q term is its own row sum: exactly 0 where λ_a = 1
    each([&](float& d, int r, int j) { d = j == 0 ? (1 - head.lam_a) * shared.d_log_a[i[r]] : 0.0f; });
    return;
  }
  const float* Q = row_q(last);
  const float pooled[2] = {Q[i[0]], Q[i[1]]};
  each([&](float& d, int r, int j) {
    d = lone ? 0.0f : sent(kLog ? logit(r, j) : 1.0f, pooled[r], col_q(last)[j]) * d;
  });
#pragma unroll 1
  for (int t = last; t >= 0; --t) {
    const float q[2] = {row_q(t)[i[0]], row_q(t)[i[1]]}, R[2] = {row_r(t)[i[0]], row_r(t)[i[1]]};
    const float *g = col_r(t), *c = col_q(t), *dc = d_col(t);
    const float top[2] = {kLog ? row_maximum(i[0], t) : 0.0f, kLog ? row_maximum(i[1], t) : 0.0f};
    each([&](float& d, int r, int j) {
      if (kLog) {
        d += sent(logit(r, j), q[r], c[j]) * dc[j];
        if (p.T) d += R[r] * exp_approx((logit(r, j) + g[j]) - top[r]);
      } else {
        d = fmaf(q[r], dc[j], d);
        if (p.T) d = fmaf(R[r], g[j], d);
      }
    });
  }
  if (!kLog) each([&](float& d, int r, int j) { d *= logit(r, j); });
  // What comes of dℓ goes where others have read: rows as a whole, and in 16 bits two numbers where one was.
  if (kLog || sizeof(T) == 2) sync_warp();
}

// W^k of a tile and a chunk of references, in the places of a product's results.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::load_plan(int row, int first, int tiles, Chunk& w) const {
  const int g = lane_index() / 4, column = first + lane_index() % 4 * 2;
  const float q[2] = {row_q(last)[row + g], row_q(last)[row + g + 8]};
  const bool there[2] = {shared.log_a[row + g] != kNone, shared.log_a[row + g + 8] != kNone};
  load_chunk(head, w, first, tiles, shared.l + row * head.stride);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    if (n >= tiles) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, j = column + n * 8 + e % 2;
      w[n][e] = lone ? (there[r] && j < head.M ? 1.0f : 0.0f) : sent(w[n][e], q[r], col_q(last)[j]);
    }
  }
}

// dv_s = Σ_j W^k_sj dz_j of a tile.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::store_values(const Rows<T>& to, int row, int count) const {
  const int ld = shared.v_length;
#pragma unroll 1
  for (int e0 = 0; e0 < ld - kShift<T>; e0 += kNarrow) {
    const int left = ld - kShift<T> - e0, tiles = (left < kNarrow ? left : kNarrow) / 8;
    float acc[kNarrow / 8][4] = {};
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1
      for (int first = 0; first < head.Mp; first += kColumns) {
        Chunk w = {};
        load_plan(row, first, chunk_tiles(head, first), w);
        chunk_product<T>(acc, w, chunk_tiles(head, first), shared.zd + first * ld + e0, ld, tiles);
      }
    } else {
      const auto weight = [&](int i, int j) {
        if (lone) return shared.log_a[row + i] == kNone || j >= head.M ? 0.0f : 1.0f;
        return sent(shared.l[head.place(row + i, j)], row_q(last)[row + i], col_q(last)[j]);
      };
      weights_product<T>(acc, weight, shared.zd + e0, ld, head.Mp, tiles);
    }
    store_tile(to, keys.first + row, count, e0, acc);
  }
}

// The last pass: dv, dk and the keys' parts of the parameters' sums.
template <class T, bool kLog>
SFK_DEVICE void KeyPass<T, kLog>::finish() const {
  const Rows<T> key(p.key, head.b, head.h), value(p.value, head.b, head.h);
  const Positions positions(p.key_pos, head);
  const int step = block_warps() * kTile, g = lane_index() / 4;
  const Pairs<T> pairs = {shared, &key, &value, keys.first, keys.count, shared.log_a};
  pairs.each(0, step, shared.rows, [&](int row0, T* x, const T* w) {
    const int row = row0 + warp_index() * kTile, count = keys.count - row;
    const Weights<T> tile = {shared.l + row * head.stride, head, head.Mp, false};
    if (row < shared.rows) {
      if (p.d_value.data) store_values(Rows<T>(p.d_value, head.b, head.h), row, count);
      T* mine = x + warp_index() * kTile * shared.y_length;
      scale_tile(head, shared, mine);
      const auto token = [&](int i) {
        return i < keys.count && shared.log_a[i] != kNone ? static_cast<int>(keys.first) + i : -1;
      };
      const int tokens[2] = {token(row + g), token(row + g + 8)};
      const auto logits = [&](int first, int tiles, Chunk& dl) { to_logits(row, first, tiles, dl); };
      const float rest = p.T ? 1 - head.lam_a : 1.0f;  // of df: Σ_j R = 1
      const float total[2] = {rest * shared.d_log_a[row + g], rest * shared.d_log_a[row + g + 8]};
      float along[2];
      gradient_tile(head, shared, mine, w + warp_index() * kTile * shared.v_length, tile, positions, tokens, total,
                    logits, sums, along);
      if (p.d_key.data)
        store_token_gradients(Rows<T>(p.d_key, head.b, head.h), head, shared, mine, tile, keys.first + row, count,
                              along);
    }
    sync_block();
    const int left = shared.rows - row0;
    const Weights<T> weights = {shared.l + row0 * head.stride, head, head.Mp, false};
    if (p.d_references.data)
      add_weighted(shared.d_y, shared.sums_length, weights, x, shared.y_length, left < step ? left : step);
  });
}

// g^{t−1} and −c^t of all iterations, as the factors of R and Q.  False where the scaled form cannot hold them: then
// they are logarithms.  The next barrier is the caller's.
template <class T>
SFK_DEVICE bool load_columns(const AttentionParams& p, const Head& head, const BackwardShared<T>& shared,
                             float lowest) {
  const int steps = static_cast<int>(p.T > 1 ? p.T : 1), Mp = head.Mp;
  for (int k = thread_index(); k < steps * Mp; k += block_threads()) {
    const int t = k / Mp, j = k % Mp;
    const float before = t && j < head.M ? *at(p.c, head.b, head.h, t - 1, j) : 0.0f;
    shared.col_r[k] = t ? potential(shared.log_b[j], head.lam_b, before) : shared.log_b[j];
    shared.col_q[k] = j < head.M ? *at(p.c, head.b, head.h, t, j) : kNone;
  }
  sync_block();
  bool holds = true;
#pragma unroll 1
  for (int t = 0; t < steps; ++t) {  // every warp alike
    const Span g = span_of(shared.col_r + t * Mp, head.M), c = span_of(shared.col_q + t * Mp, head.M);
    holds = holds && g.spread - lowest <= kBackwardRange && (c.top == kNone || c.spread <= kBackwardRange);
    if (thread_index() == 0)
      shared.levels[2 * t] = finite_or_zero(g.top), shared.levels[2 * t + 1] = finite_or_zero(c.top);
  }
  sync_block();
  for (int k = thread_index(); k < steps * Mp; k += block_threads()) {
    const float shift = shared.levels[k / Mp * 2], level = shared.levels[k / Mp * 2 + 1], c = shared.col_q[k];
    if (holds) shared.col_r[k] = exp_approx(shared.col_r[k] - shift);
    shared.col_q[k] = c == kNone ? (holds ? 0.0f : kNone) : holds ? exp_approx(level - c) : -c;
  }
  return holds;
}

}  // namespace
}  // namespace sfk
