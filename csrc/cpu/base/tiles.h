// Moving rows between strided tensors of any dtype and packed tiles of F.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "../../params.h"
#include "../../philox.h"
#include "gemm.h"
#include "scratch.h"

namespace sfk {
namespace {

// 64-byte aligned scratch.  Not initialised: kernels write before they read.
template <class F>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reset(n); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { release(); }
  void reset(int64_t n) {
    release();
    bytes_ = sizeof(F) * static_cast<size_t>(n > 0 ? n : 1);
    data_ = static_cast<F*>(take_scratch(bytes_));
  }
  F* data() const { return data_; }
  operator F*() const { return data_; }

 private:
  void release() {
    if (data_) give_scratch(data_, bytes_);
    data_ = nullptr;
  }
  F* data_ = nullptr;
  size_t bytes_ = 0;
};

inline int64_t element_size(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

template <class F>
void fill(F* p, int64_t n, F value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_f32(float x) { return x; }
inline double to_f32(double x) { return x; }
inline float to_f32(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_f32(F16 x) {
  // Exponent and mantissa moved in place are the value times 2^-112, denormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float f = bit_cast<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000u) f = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(f) | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

template <class To, class F>
struct Narrow {
  static To from(F x) { return static_cast<To>(x); }
};
template <class F>
struct Narrow<Bf16, F> {
  static Bf16 from(F value) {
    const uint32_t u = bit_cast<uint32_t>(static_cast<float>(value));
    if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((u >> 16) | 0x40)};
    return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // round to nearest, ties to even
  }
};
template <class F>
struct Narrow<F16, F> {
  static F16 from(F value) {
    const uint32_t u = bit_cast<uint32_t>(static_cast<float>(value));
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
    const uint32_t a = u & 0x7fffffff;
    if (a > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (a >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536: infinity
    if (a < 0x38800000) {  // denormal half: adding 0.5 lets the float adder round at the right bit
      const float r = bit_cast<float>(a) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(r) - bit_cast<uint32_t>(0.5f)))};
    }
    return {static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13))};
  }
};

template <class Src, class F>
void convert_row(const void* base, int64_t offset, int64_t stride, int64_t n, F* dst) {
  const Src* src = static_cast<const Src*>(base) + offset;
  if (stride == 1) {
    if constexpr (std::is_same_v<Src, F>) {
      int64_t i = 0;
      for (; i + kLanes<F> <= n; i += kLanes<F>) store(dst + i, load(src + i));
      for (; i < n; ++i) dst[i] = src[i];
      return;
    }
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<F>(to_f32(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<F>(to_f32(src[i * stride]));
  }
}

// call(T{}) for the type T of a tensor's elements.
template <class Call>
void with_element(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::f32:
      return call(float{});
    case Dtype::f64:
      return call(double{});
    case Dtype::bf16:
      return call(Bf16{});
    case Dtype::f16:
      return call(F16{});
  }
}

template <class F>
void load_row(const View& v, int64_t offset, int64_t stride, int64_t n, F* dst) {
  with_element(v.dtype, [&](auto of) { convert_row<decltype(of)>(v.data, offset, stride, n, dst); });
}

template <class Dst, class F>
void narrow_row(void* base, int64_t offset, int64_t stride, int64_t n, const F* src, F scale = 1) {
  Dst* dst = static_cast<Dst*>(base) + offset;
  if (stride == 1) {
    int64_t i = 0;
    if constexpr (std::is_same_v<Dst, F>)
      for (; i + kLanes<F> <= n; i += kLanes<F>) store(dst + i, load(src + i) * scale);
    for (; i < n; ++i) dst[i] = Narrow<Dst, F>::from(src[i] * scale);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i * stride] = Narrow<Dst, F>::from(src[i] * scale);
  }
}

template <class F>
void store_row(const View& v, int64_t offset, int64_t stride, int64_t n, const F* src) {
  with_element(v.dtype, [&](auto of) { narrow_row<decltype(of)>(v.data, offset, stride, n, src); });
}

// Row i of one head's [N][C] block of a tensor [H,N,C] or [B,H,N,C] of any dtype.
inline int64_t row_offset(const View& v, int64_t b, int64_t h, int64_t i) {
  const int lead = v.ndim - 2;
  return (lead == 2 ? b * v.stride[0] : 0) + h * v.stride[lead - 1] + i * v.stride[lead];
}
template <class F>
void load_row_of(const View& v, int64_t b, int64_t h, int64_t i, F* dst) {
  load_row(v, row_offset(v, b, h, i), v.stride[v.ndim - 1], v.size[v.ndim - 1], dst);
}
template <class F>
void store_row_of(const View& v, int64_t b, int64_t h, int64_t i, const F* src) {
  store_row(v, row_offset(v, b, h, i), v.stride[v.ndim - 1], v.size[v.ndim - 1], src);
}

// The n rows of v that follow row0..row0+n.
inline Ahead ahead_of(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n) {
  const int64_t bytes = element_size(v.dtype), rows = std::min(n, v.size[2] - row0 - n);
  if (!v || v.stride[3] != 1 || rows <= 0) return {};
  const int64_t first = b * v.stride[0] + h * v.stride[1] + (row0 + n) * v.stride[2];
  return {static_cast<const char*>(v.data) + first * bytes, v.stride[2] * bytes, v.size[3] * bytes, rows};
}

// Rows row0..row0+n of v [B,H,N,C] to dst [n][ld], padded with zeros.  Rows with skip = −inf are not read: zeros.
template <class F>
void load_rows(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, const F* skip, F* dst, int64_t ld) {
  const int64_t C = v.size[3], base = b * v.stride[0] + h * v.stride[1];
  with_element(v.dtype, [=](auto of) mutable {
    for (int64_t i = 0; i < n; ++i, dst += ld) {
      const bool absent = skip && skip[i] == -kInf<F>;
      if (!absent) convert_row<decltype(of)>(v.data, base + (row0 + i) * v.stride[2], v.stride[3], C, dst);
      for (int64_t j = absent ? 0 : C; j < ld; ++j) dst[j] = 0;
    }
  });
}

// src [n][ld] times scale[i] (1 when null) to rows row0..row0+n of v [B,H,N,C].
template <class F>
void store_rows(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, const F* src, int64_t ld,
                const F* scale) {
  const int64_t C = v.size[3], base = b * v.stride[0] + h * v.stride[1];
  with_element(v.dtype, [=](auto of) mutable {
    for (int64_t i = 0; i < n; ++i, src += ld)
      narrow_row<decltype(of)>(v.data, base + (row0 + i) * v.stride[2], v.stride[3], C, src, scale ? scale[i] : F(1));
  });
}

// One head's [N][C] block of a tensor [H,N,C] or [B,H,N,C] of F, addressed by element.
template <class F>
struct Block {
  F* data = nullptr;
  int64_t row = 0, col = 0;
  Block() = default;
  Block(const View& v, int64_t h) : Block(v, 0, h) {}
  Block(const View& v, int64_t b, int64_t h) {
    if (!v) return;
    const int lead = v.ndim - 2;
    data = static_cast<F*>(v.data) + (lead == 2 ? b * v.stride[0] : 0) + h * v.stride[lead - 1];
    row = v.stride[lead];
    col = v.stride[lead + 1];
  }
  explicit operator bool() const { return data != nullptr; }
  F& operator()(int64_t i, int64_t j) const { return data[i * row + j * col]; }
};

// ‖x‖ of a row whose squares overflowed: the largest element is taken out.
template <class F>
double large_norm(const F* x, int64_t ld) {
  double largest = 0, sum = 0;
  for (int64_t j = 0; j < ld; ++j) largest = std::fmax(largest, std::fabs(static_cast<double>(x[j])));
  for (int64_t j = 0; j < ld; ++j) sum += (x[j] / largest) * (x[j] / largest);
  return largest * std::sqrt(sum);
}

// Rows of numbers, ld apart.
template <class F>
struct Rows {
  const F* at = nullptr;
  int64_t ld = 0;
  const F* operator[](int64_t i) const { return at + i * ld; }
};

template <class F>
constexpr Dtype kDtype = sizeof(F) == 8 ? Dtype::f64 : Dtype::f32;

// What `load_rows` gives: the rows where they lie, if they are whole vectors of F that may all be read; else a copy in
// room [n][ld].
template <class F>
Rows<F> rows_of(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, const F* skip, F* room, int64_t ld) {
  const bool in_place = v.dtype == kDtype<F> && v.stride[3] == 1 && v.size[3] == ld;
  if (in_place && !(skip && std::any_of(skip, skip + n, [](F x) { return x == -kInf<F>; }))) {
    const int64_t first = b * v.stride[0] + h * v.stride[1] + row0 * v.stride[2];
    return {static_cast<const F*>(v.data) + first, v.stride[2]};
  }
  load_rows<F>(v, b, h, row0, n, skip, room, ld);
  return {room, ld};
}

// Where rows of numbers are written, ld apart.
template <class F>
struct Place {
  F* at;
  int64_t ld;
};

// Rows row0.. of v, if whole vectors of F can be written there, else room [..][ld], of which `store_placed` makes them.
template <class F>
Place<F> place_of(const View& v, int64_t b, int64_t h, int64_t row0, F* room, int64_t ld) {
  if (!v || v.dtype != kDtype<F> || v.stride[3] != 1 || v.size[3] != ld) return {room, ld};
  return {static_cast<F*>(v.data) + b * v.stride[0] + h * v.stride[1] + row0 * v.stride[2], v.stride[2]};
}

// After rows row0..row0+n of v were written to `rows`, the place that they were given.
template <class F>
void store_placed(const View& v, int64_t b, int64_t h, int64_t row0, int64_t n, Place<F> rows, const F* room) {
  if (v && rows.at == room) store_rows<F>(v, b, h, row0, n, room, rows.ld, nullptr);
}

// 1/‖x_i‖ of n rows [n][width] (a multiple of the vector width), 0 where ‖x‖ <= 1e-12.
template <class F>
void inverse_norms(Rows<F> x, int64_t n, int64_t width, F* inv, F* norms = nullptr) {
  constexpr int64_t kGroup = 16;  // rows whose roots are taken together
  double square[kGroup], norm[kGroup];
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t rows = std::min(kGroup, n - first);
    for (int64_t i = 0; i < kGroup; ++i) square[i] = 1;
    for (int64_t i = 0; i < rows; ++i) {
      const F* row = x[first + i];
      Vec<F> acc{};
      for (int64_t j = 0; j < width; j += kLanes<F>) acc += load(row + j) * load(row + j);
      square[i] = reduce_add<F>(acc);
    }
    for (int64_t i = 0; i < kGroup; ++i) norm[i] = std::sqrt(square[i]);
    for (int64_t i = 0; i < rows; ++i)
      if (norm[i] == kInf<double>) norm[i] = large_norm(x[first + i], width);
    for (int64_t i = 0; i < kGroup; ++i) square[i] = norm[i] <= 1e-12 ? 0.0 : 1 / norm[i];
    for (int64_t i = 0; i < rows; ++i) inv[first + i] = static_cast<F>(square[i]);
    for (int64_t i = 0; norms && i < rows; ++i) norms[first + i] = norm[i] <= 1e-12 ? F(0) : static_cast<F>(norm[i]);
  }
}

}  // namespace
}  // namespace sfk
