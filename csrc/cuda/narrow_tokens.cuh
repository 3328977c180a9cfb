// What narrow.cuh keeps on the chip, and its tokens: from device memory to the registers in which products want them.
//
// With g = lane/4, t = lane%4 a lane reads numbers 32p + 8t .. + 7 of rows g and g + 8: a sum of products may go over
// them in any order that both operands have, so ŷ lies in shared memory in the order that makes them the left operand
// (`depth_place`), and z in the order that leaves a lane with 16 bytes of o (`width_place`).
#pragma once
#include "peers.cuh"

namespace sfk {
namespace {

constexpr int kNarrowThreads = 2 * kThreads;            // the most of a block
constexpr int kDepth = 64;                              // the most numbers of a token's key
constexpr int kDepthRow = kDepth + 8;                   // and of a row of ŷ, of z: eight rows in all banks
constexpr int kRow = LogitRows::padded_stride(kUsual);  // of K
constexpr int kSteps = kUsual / kTile;                  // of a product over references, or over kDepth
// The range of K in units of e, and what weights of queries are multiplied by, as a power of 2: float16 has no
// exponents to lose.  In float32 a mass or a G that vanishes beside the largest, e^−87 of it, is then still nothing
// beside their products with the least K: e^{−87 + 60}.
template <class T>
constexpr float kNarrowRange = std::is_same<T, F16>::value ? 18.0f : 30.0f;
template <class T>
constexpr float kLift = std::is_same<T, F16>::value ? 13.0f : 0.0f;

SFK_BOTH constexpr int depth_place(int d) {
  return d / 32 * 32 + d % 8 / 4 * 16 + d % 4 / 2 * 8 + d % 32 / 8 * 2 + d % 2;
}
SFK_BOTH constexpr int width_place(int e) { return e / 32 * 32 + e % 8 / 2 * 8 + e % 32 / 8 * 2 + e % 2; }

// Shared memory of a block.
template <class T>
struct NarrowShared {
  float rate, beta;          // log2(e)/ε, β·log2(e)
  int rows, v_length;        // numbers of a row of values and of z
  int value_rows;            // values in shared memory at a time, twice: two for every eight threads
  Place<float> l, part;      // [rows,kRow] K, then the plan; [warps,32,kPartRow] of z, where the plan was if it is done
  Place<T> y, staged, z;     // [64,kDepthRow]; [2,value_rows,v_length] values; [64,v_length]
  Place<float> mass, u;      // [rows] a_s/ref and u_s/ref
  Place<float> log_b, g;     // [64] in base 2
  Place<float> factor;       // [64] 1/Σ_s K u
  Place<float> sums, total;  // [warps,64] [2,64] of K u
  Place<float> ref;          // [1]
  float* exchange = nullptr;  // where blocks meet in device memory
  int left = 0;               // numbers that each leaves there

  NarrowShared() = default;
  NarrowShared(Arena& arena, const AttentionParams& p, const BlockShape& block)
      : rows(block.rows),
        v_length((padded(p.E) + kNarrow - 1) / kNarrow * kNarrow + kShift<T>),
        value_rows(block.warps > 8 ? 2 * kValueRows : kValueRows) {
    const int64_t plan = int64_t{rows} * kRow, parts = int64_t{block.warps} * kNarrow * kPartRow;
    const int pieces = kUsual / kNarrow * (v_length / kNarrow);  // see PoolTask
    const bool at_once = pieces <= block.warps;
    left = kPartsAt + (at_once ? pieces : block.warps) * kNarrow * kPartRow;
    l = arena.take(plan > parts || !at_once ? plan : parts);
    part = at_once ? l : arena.take(parts);
    y = arena.take<T>(kUsual * kDepthRow), staged = arena.take<T>(2 * value_rows * v_length);
    z = arena.take<T>(kUsual * v_length);
    mass = arena.take(rows), u = arena.take(rows);
    log_b = arena.take(kUsual), g = arena.take(kUsual), factor = arena.take(kUsual);
    sums = arena.take(block.warps * kUsual), total = arena.take(2 * kUsual), ref = arena.take(1);
  }
};

// A batch element of a head.
struct NarrowHead {
  int b, h, M;
};

// A tile of 16 tokens as it comes from memory: 16 bytes of rows g and g + 8, kDepth/32 times.
struct RawTile {
  Bits4 of[2][kDepth / 32];
  uint32_t there[2];  // all bits, or none
};

// The same as the left operand of the kSteps products over kDepth numbers, zeros where there is nothing.
using Operand = uint32_t[kSteps][4];

// Where a lane reads its numbers of a head's tokens: rows of whole 16 bytes.  Of what is not there the last row is read
// (of a block without keys, which come after all others, the row before).
struct Tokens {
  const unsigned char* base;
  int row, last;               // bytes of a row, the last row
  uint32_t wide[kDepth / 32];  // all bits where the rows are so wide
  const float* mass;           // of keys; null: all are there

  SFK_DEVICE Tokens(const View& v, int b, int h, int64_t first, int count, const float* mass_)
      : base(static_cast<const unsigned char*>(v.data) + 2 * (b * v.stride[0] + h * v.stride[1] + first * v.stride[2])),
        row(2 * static_cast<int>(v.stride[2])),
        last(count - 1),
        mass(mass_) {
#pragma unroll
    for (int p = 0; p < kDepth / 32; ++p) wide[p] = 32 * p + lane_index() % 4 * 8 < v.size[3] ? ~0u : 0u;
  }
  // Rows from `first` on.
  SFK_DEVICE RawTile tile(int first) const {
    RawTile x;
    const int at = lane_index() % 4 * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int wanted = first + lane_index() / 4 + 8 * r, i = wanted < last ? wanted : last;
      x.there[r] = mass && !(wanted <= last && mass[i] > 0) ? 0u : ~0u;
      const unsigned char* from = base + static_cast<int64_t>(i) * row;
#pragma unroll
      for (int p = 0; p < kDepth / 32; ++p)
        x.of[r][p] = *reinterpret_cast<const Bits4*>(from + ((at + 64 * p) & wide[p]));
    }
    return x;
  }
  SFK_DEVICE void operand(const RawTile& x, Operand& a) const {
#pragma unroll
    for (int p = 0; p < kDepth / 32; ++p)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t keep = x.there[r] & wide[p];
        a[2 * p][r] = x.of[r][p].x & keep, a[2 * p][2 + r] = x.of[r][p].y & keep;
        a[2 * p + 1][r] = x.of[r][p].z & keep, a[2 * p + 1][2 + r] = x.of[r][p].w & keep;
      }
  }
};

// β/‖x‖ in base 2 of rows g and g + 8: ‖x‖² from the diagonal of X Xᵀ, whose right operand the left one's registers
// are.
template <class T>
SFK_DEVICE void row_scales(const Operand& x, float beta, float (&scale)[2]) {
  const int g = lane_index() / 4;
  float square[2][4] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    multiply_add<T>(square[0], x[k], x[k][0], x[k][2]), multiply_add<T>(square[1], x[k], x[k][1], x[k][3]);
  const bool mine = lane_index() % 4 == g / 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float own = g % 2 ? square[r][2 * r + 1] : square[r][2 * r];
    scale[r] = mine ? own : 0.0f;
  }
  row_sums(scale);
#pragma unroll
  for (int r = 0; r < 2; ++r) scale[r] = scale[r] > 1e-24f ? root_inverse_approx(scale[r]) * beta : 0.0f;
}

// ⟨x_i, ŷ_j⟩ of a tile and all references, and what makes β cos of them, in base 2.
template <class T>
SFK_DEVICE void products(const Operand& x, const T* y, float beta, Chunk& w, float (&scale)[2]) {
  const int lane = lane_index();
  row_scales<T>(x, beta, scale);
#pragma unroll
  for (int n = 0; n < kUsual / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) w[n][e] = 0;
  const T* rows = y + (lane / 16 * 8 + lane % 8) * kDepthRow + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kUsual / 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, rows + n * 8 * kDepthRow + k * kTile);
      multiply_add<T>(w[n], x[k], b[0], b[1]), multiply_add<T>(w[n + 1], x[k], b[2], b[3]);
    }
  }
}

// Products -> 2^{rate·κ + add_j}; add(n): of columns 8n + 2t and the next.
template <class Add>
SFK_DEVICE void exponentials(Chunk& w, const float (&scale)[2], float rate, float beta, Add add) {
#pragma unroll
  for (int n = 0; n < kUsual / 8; ++n) {
    const Vec2 more = add(n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float kappa = exp2_approx(fmaf(w[n][e], scale[e / 2], -beta));
      w[n][e] = exp2_approx(fmaf(kappa, rate, e % 2 ? more.y : more.x));
    }
  }
}

// ŷ and log b of the head; a row is four lanes' work, which read what they read of tokens.
template <class T>
SFK_DEVICE void load_unit_references(const AttentionParams& p, const NarrowHead& head, const NarrowShared<T>& shared) {
  const int t = lane_index() % 4;
  const float* base = static_cast<const float*>(p.references.data) + head.h * p.references.stride[0];
#pragma unroll 1
  for (int j = warp_index() * 8 + lane_index() / 4; j < kUsual; j += block_warps() * 8) {
    Vec4 y[4] = {};
    float square = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int d = k / 2 * 32 + t * 8 + k % 2 * 4;
      if (j < head.M && d < p.D) y[k] = *reinterpret_cast<const Vec4*>(base + j * p.references.stride[1] + d);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) square = dot(y[k], y[k], square);
    square += shuffle_xor(square, 1), square += shuffle_xor(square, 2);
    const float scale = square > 1e-24f ? 1 / sqrtf(square) : 0.0f;
    uint32_t* out = reinterpret_cast<uint32_t*>(shared.y + j * kDepthRow);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int place = depth_place(k / 2 * 32 + k % 2 * 4) / 2 + t;
      out[place] = pack<T>(y[k].x * scale, y[k].y * scale), out[place + 4] = pack<T>(y[k].z * scale, y[k].w * scale);
    }
  }
  const float uniform = -logf(static_cast<float>(head.M));
  for (int j = thread_index(); j < kUsual; j += block_threads())
    shared.log_b[j] = kLog2e * (j >= head.M ? kNone : p.log_b.data ? read(p.log_b, head.h, j) : uniform);
}

}  // namespace
}  // namespace sfk
