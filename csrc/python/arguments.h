// Arguments from Python: tensors come as tuples (pointer, sizes, strides, dtype code).  Every size a kernel relies on
// is checked here, so that no kernel reads outside what the sizes and strides describe.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../causal_params.h"

namespace py = pybind11;

namespace sfk {

inline int64_t integer(PyObject* o) {
  const long long v = PyLong_AsLongLong(o);
  if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
  return v;
}

// `sizes` lists what each dimension must be.
inline View view(py::handle o, const char* name, std::initializer_list<int64_t> sizes) {
  View v;
  if (o.is_none()) return v;
  const std::string who = std::string("tensor '") + name + "': ";
  PyObject* t = o.ptr();
  if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 4) throw std::invalid_argument(who + "not a tuple of 4");
  PyObject *size = PyTuple_GET_ITEM(t, 1), *stride = PyTuple_GET_ITEM(t, 2);
  if (!PyTuple_Check(size) || !PyTuple_Check(stride)) throw std::invalid_argument(who + "sizes are not a tuple");
  v.ndim = static_cast<int32_t>(sizes.size());
  if (PyTuple_GET_SIZE(size) != v.ndim || PyTuple_GET_SIZE(stride) != v.ndim)
    throw std::invalid_argument(who + "has the wrong number of dimensions");
  int64_t count = 1;
  for (int i = 0; i < v.ndim; ++i) {
    v.size[i] = integer(PyTuple_GET_ITEM(size, i));
    v.stride[i] = integer(PyTuple_GET_ITEM(stride, i));
    if (v.size[i] != sizes.begin()[i])
      throw std::invalid_argument(who + "dimension " + std::to_string(i) + " is " + std::to_string(v.size[i]) +
                                  ", not " + std::to_string(sizes.begin()[i]));
    count *= v.size[i];
  }
  v.dtype = static_cast<Dtype>(integer(PyTuple_GET_ITEM(t, 3)));
  static char nothing;  // an empty tensor has no memory, yet is not absent
  v.data = count ? reinterpret_cast<void*>(integer(PyTuple_GET_ITEM(t, 0))) : &nothing;
  if (!v.data) throw std::invalid_argument(who + "has no memory");
  return v;
}

inline void need(const View& v, const char* name) {
  if (!v) throw std::invalid_argument(std::string("tensor '") + name + "' is missing");
}
inline void same_dtype(const View& v, Dtype d, const char* name) {
  if (v && v.dtype != d) throw std::invalid_argument(std::string("tensor '") + name + "' has the wrong dtype");
}
inline View view(py::handle o, const char* name, std::initializer_list<int64_t> sizes, Dtype dtype) {
  const View v = view(o, name, sizes);
  same_dtype(v, dtype, name);
  return v;
}

// A tuple of tensors; `names` says what stands at each place.
template <size_t N>
struct Tensors {
  const py::tuple& all;
  const char* const (&names)[N];

  Tensors(const py::tuple& all_, const char* const (&names_)[N]) : all(all_), names(names_) {
    if (all.size() != N)
      throw std::invalid_argument(std::to_string(N) + " tensors from '" + names[0] + "' to '" + names[N - 1] +
                                  "' are wanted, got " + std::to_string(all.size()));
  }
  bool has(int at) const { return !all[at].is_none(); }
  View view(int at, std::initializer_list<int64_t> sizes, Dtype dtype) const {
    return sfk::view(all[at], names[at], sizes, dtype);
  }
  View needed(int at, std::initializer_list<int64_t> sizes, Dtype dtype) const {
    need(at);
    return view(at, sizes, dtype);
  }
  void need(int at) const {
    if (!has(at)) throw std::invalid_argument(std::string("tensor '") + names[at] + "' is missing");
  }
  int64_t size(int at, int dim) const {
    PyObject* sizes = part(at, 1);
    if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) <= dim)
      throw std::invalid_argument(std::string("tensor '") + names[at] + "' has too few dimensions");
    return integer(PyTuple_GET_ITEM(sizes, dim));
  }
  Dtype dtype(int at) const {
    const int64_t code = integer(part(at, 3));
    if (code < 0 || code > static_cast<int64_t>(Dtype::f16))
      throw std::invalid_argument(std::string("tensor '") + names[at] + "' has no floating-point dtype");
    return static_cast<Dtype>(code);
  }

 private:
  PyObject* part(int at, int i) const {
    need(at);
    PyObject* t = PyTuple_GET_ITEM(all.ptr(), at);
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 4)
      throw std::invalid_argument(std::string("tensor '") + names[at] + "': not a tuple of 4");
    return PyTuple_GET_ITEM(t, i);
  }
};

inline Dtype compute_dtype(bool f64) { return f64 ? Dtype::f64 : Dtype::f32; }

// The fields of problem.Operands before the seed.  Python compares the names with its own when it loads the extension.
enum Operand {
  kQuery,
  kKey,
  kValue,
  kReferences,
  kLogA,
  kLogB,
  kHyper,  // the first of kNumHyper
  kQueryPosition = kHyper + kNumHyper,
  kKeyPosition,
  kReferencePosition,
  kNumOperands
};
constexpr const char* kOperands[kNumOperands] = {
    "query",          "key",
    "value",          "references",
    "log_a",          "log_b",
    "bandwidth",      "epsilon",
    "key_relaxation", "reference_relaxation",
    "position_scale", "query_position",
    "key_position",   "reference_position",
};

inline py::tuple operand_names() {
  py::tuple names(size_t{kNumOperands});
  for (int i = 0; i < kNumOperands; ++i) names[i] = kOperands[i];
  return names;
}

inline AttentionParams attention_params(const py::tuple& operands, const py::tuple& scalars, bool dot, int64_t T,
                                        double dropout_p, uint64_t seed, int threads) {
  const Tensors x(operands, kOperands);
  if (scalars.size() != kNumHyper) throw std::invalid_argument("wrong number of scalars");
  AttentionParams p;
  p.B = x.size(kKey, 0), p.H = x.size(kKey, 1), p.S = x.size(kKey, 2), p.D = x.size(kKey, 3);
  p.E = x.size(kValue, 3), p.M = x.size(kReferences, 1), p.T = T;
  p.L = x.has(kQuery) ? x.size(kQuery, 2) : 0;
  p.P = x.has(kReferencePosition) ? x.size(kReferencePosition, 2) : 0;
  if (p.M < 1 || p.D < 1 || p.E < 1 || T < 0)
    throw std::invalid_argument("M, D and E must be positive, T not negative");
  p.kernel = dot ? KernelKind::dot : KernelKind::rbf;
  p.dropout_p = dropout_p, p.seed = seed, p.threads = threads < 1 ? 1 : threads;
  const Dtype dtype = x.dtype(kKey);
  p.f64 = dtype == Dtype::f64;
  const Dtype compute = compute_dtype(p.f64);
  p.query = x.view(kQuery, {p.B, p.H, p.L, p.D}, dtype);
  p.key = x.needed(kKey, {p.B, p.H, p.S, p.D}, dtype);
  p.value = x.needed(kValue, {p.B, p.H, p.S, p.E}, dtype);
  p.references = x.needed(kReferences, {p.H, p.M, p.D}, compute);
  p.log_a = x.view(kLogA, {p.B, p.H, p.S}, compute);
  p.log_b = x.view(kLogB, {p.H, p.M}, compute);
  for (int i = 0; i < kNumHyper; ++i) {
    p.scalars[i] = scalars[i].cast<double>();
    p.hyper[i] = x.view(kHyper + i, {p.H}, compute);
  }
  p.query_pos = x.view(kQueryPosition, {p.B, p.H, p.L, p.P}, compute);
  p.key_pos = x.view(kKeyPosition, {p.B, p.H, p.S, p.P}, compute);
  p.ref_pos = x.view(kReferencePosition, {p.H, p.M, p.P}, compute);
  if (p.ref_pos) {
    x.need(kKeyPosition);
    if (p.query) x.need(kQueryPosition);
  }
  return p;
}

// `elements`: how many problems a head has, B but for packed batches.
inline void state(AttentionParams& p, const py::handle& z, const py::handle& c, bool required, int64_t elements) {
  const Dtype compute = compute_dtype(p.f64);
  p.z = view(z, "z", {elements, p.H, p.M, p.E}, compute);
  p.c = view(c, "c", {elements, p.H, p.T > 1 ? p.T : 1, p.M}, compute);
  if (required) need(p.z, "z"), need(p.c, "c");
}

inline void state(AttentionParams& p, const py::handle& z, const py::handle& c, bool required) {
  state(p, z, c, required, p.B);
}

// The parameters' gradients come in `parts`, for the caller to add up.
enum Gradient {
  kDO,
  kDZ,
  kDC,
  kDQuery,
  kDKey,
  kDValue,
  kDLogA,
  kDReferences,
  kDLogB,
  kDHyper,
  kDPosition,
  kNumGradients
};
constexpr const char* kGradients[kNumGradients] = {
    "d_o",
    "d_z",
    "d_c",
    "d_query",
    "d_key",
    "d_value",
    "d_log_a",
    "d_references",
    "d_log_b",
    "d_hyper",
    "d_reference_position",
};

inline void gradients(AttentionParams& p, const py::tuple& grads, int64_t parts, int64_t elements) {
  const Tensors x(grads, kGradients);
  const Dtype dtype = p.key.dtype, compute = compute_dtype(p.f64);
  p.d_o = x.view(kDO, {p.B, p.H, p.L, p.E}, dtype);
  p.d_z = x.view(kDZ, {elements, p.H, p.M, p.E}, compute);
  p.d_c = x.view(kDC, {elements, p.H, p.T > 1 ? p.T : 1, p.M}, compute);
  p.d_query = x.view(kDQuery, {p.B, p.H, p.L, p.D}, dtype);
  p.d_key = x.view(kDKey, {p.B, p.H, p.S, p.D}, dtype);
  p.d_value = x.view(kDValue, {p.B, p.H, p.S, p.E}, dtype);
  p.d_log_a = x.view(kDLogA, {p.B, p.H, p.S}, compute);
  p.d_references = x.view(kDReferences, {parts, p.H, p.M, p.D}, compute);
  p.d_log_b = x.view(kDLogB, {parts, p.H, p.M, 1}, compute);
  p.d_hyper = x.view(kDHyper, {parts, p.H, int64_t(kNumHyper), 1}, compute);
  p.d_ref_pos = x.view(kDPosition, {parts, p.H, p.M, p.P}, compute);
  if (p.d_o || p.d_query) need(p.query, kOperands[kQuery]), x.need(kDO);
}

// States of N sequences.
inline View state_view(const AttentionParams& p, int64_t N, const py::object& o, const char* name) {
  return view(o, name, {N, p.H, p.M, 2 * p.E + 3}, compute_dtype(p.f64));
}

inline View gates_view(const AttentionParams& p, const py::object& o, const char* name) {
  return view(o, name, {p.B, p.H, p.S}, compute_dtype(p.f64));
}

inline void stream_gradients(StreamViews& stream, const AttentionParams& p, int64_t N, const py::object& d_final,
                             const py::object& d_log_decay, const py::object& d_initial) {
  stream.d_final = state_view(p, N, d_final, "d_final_state");
  stream.d_log_decay = gates_view(p, d_log_decay, "d_log_decay");
  stream.d_initial = state_view(p, N, d_initial, "d_initial_state");
}

inline CausalParams causal_params(const AttentionParams& attention, const py::object& log_decay,
                                  const py::object& initial) {
  CausalParams p(attention);
  need(p.query, kOperands[kQuery]);
  if (p.L != p.S || p.T > 1) throw std::invalid_argument("causal needs L = S and T <= 1");
  p.log_decay = gates_view(p, log_decay, "log_decay");
  p.initial = state_view(p, p.B, initial, "initial_state");
  return p;
}

// All of a step but whose states they are.
inline StepParams step_params(const AttentionParams& attention, const py::object& log_decay, const py::tuple& states,
                              const py::object& o) {
  StepParams p(attention);
  need(p.query, kOperands[kQuery]);
  if (p.S != 1 || p.T > 1) throw std::invalid_argument("a step takes one token, and T <= 1");
  p.log_decay = gates_view(p, log_decay, "log_decay");
  const char* const names[] = {"state"};
  const py::tuple one = py::make_tuple(states);
  p.states = view(states, "state", {Tensors(one, names).size(0, 0), p.H, p.M, 2 * p.E + 3}, compute_dtype(p.f64));
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  need(p.o, "o");
  if (p.states.stride[3] != 1 || p.states.stride[2] != p.states.size[3])
    throw std::invalid_argument("tensor 'state' has gaps between its rows");
  return p;
}

inline void own_states(const StepParams& p) {
  if (p.states.size[0] != p.B) throw std::invalid_argument("a state for each batch element is wanted");
}

inline void gradients(AttentionParams& p, const py::tuple& grads, int64_t parts) { gradients(p, grads, parts, p.B); }

// Offsets of N segments within `rows`.
inline const int64_t* offsets(const py::handle& o, const char* name, int64_t N, int64_t rows) {
  const View v = view(o, name, {N + 1}, kInt64);
  if (!v) return nullptr;
  const int64_t* at = static_cast<const int64_t*>(v.data);
  bool fits = (N == 0 || v.stride[0] == 1) && at[0] >= 0 && at[N] <= rows;
  for (int64_t n = 0; n < N; ++n) fits = fits && at[n] <= at[n + 1];
  if (!fits) throw std::invalid_argument(std::string("tensor '") + name + "' does not hold offsets of the tokens");
  return at;
}

inline PackedStreamParams packed_params(const AttentionParams& attention, const py::object& cu_q, const py::tuple& cu_k,
                                        bool causal, const py::object& log_decay, const py::object& initial) {
  PackedStreamParams p;
  static_cast<AttentionParams&>(p) = attention;
  if (p.B != 1) throw std::invalid_argument("a packed batch has B = 1");
  const py::tuple sizes = cu_k[1].cast<py::tuple>();
  p.N = sizes.size() == 1 ? integer(sizes[0].ptr()) - 1 : -1;
  if (p.N < 0) throw std::invalid_argument("tensor 'cu_k' has the wrong number of dimensions");
  p.cu_q = offsets(cu_q, "cu_q", p.N, p.L), p.cu_k = offsets(cu_k, "cu_k", p.N, p.S), p.causal = causal;
  if (p.query && !p.cu_q) throw std::invalid_argument("tensor 'cu_q' is missing");
  if (causal && (p.cu_q != p.cu_k || p.L != p.S || p.T > 1))
    throw std::invalid_argument("causal needs segments of L = S and T <= 1");
  p.log_decay = gates_view(p, log_decay, "log_decay");
  p.initial = state_view(p, p.N, initial, "initial_state");
  return p;
}

// A mask [B or 1, H or 1, L, S] as a view [B, H, L, S].
inline View mask_view(const MaskedParams& p, const py::object& o, const char* name) {
  if (o.is_none()) return {};
  const char* const names[] = {name};
  const py::tuple one = py::make_tuple(o);
  const Tensors x(one, names);
  const int64_t B = x.size(0, 0) == 1 ? 1 : p.B, H = x.size(0, 1) == 1 ? 1 : p.H;
  View v = view(o, name, {B, H, p.L, p.S});
  if (v.dtype != kBool) same_dtype(v, compute_dtype(p.f64), name);
  if (B == 1) v.stride[0] = 0;
  if (H == 1) v.stride[1] = 0;
  return v;
}

inline MaskedParams masked_params(const AttentionParams& attention, const py::object& mask, bool causal) {
  MaskedParams p;
  static_cast<AttentionParams&>(p) = attention;
  need(p.query, kOperands[kQuery]);
  p.mask = mask_view(p, mask, "mask"), p.causal = causal;
  return p;
}

enum SinkhornTensor {
  kLogKernel,
  kRows,
  kColumns,
  kLamA,
  kLamB,
  kF,
  kG,
  kC,
  kIters,
  kDF,
  kDG,
  kDLogKernel,
  kDRows,
  kDColumns,
  kDLam,
  kNumSinkhorn
};
constexpr const char* kSinkhorn[kNumSinkhorn] = {
    "log_kernel", "log_a", "log_b", "lam_a",        "lam_b",   "f",       "g",     "c",
    "iters",      "d_f",   "d_g",   "d_log_kernel", "d_log_a", "d_log_b", "d_lam",
};

inline SinkhornParams sinkhorn_params(const py::tuple& tensors, const py::tuple& scalars, int64_t T, double tol,
                                      int threads, bool backward) {
  const Tensors x(tensors, kSinkhorn);
  if (scalars.size() != 2) throw std::invalid_argument("wrong number of scalars");
  SinkhornParams p;
  p.G = x.size(kLogKernel, 0), p.N = x.size(kLogKernel, 1), p.M = x.size(kLogKernel, 2), p.T = T;
  if (p.M < 1 || T < 0) throw std::invalid_argument("M must be positive, T not negative");
  p.scalars[0] = scalars[0].cast<double>(), p.scalars[1] = scalars[1].cast<double>();
  p.tol = tol, p.threads = threads < 1 ? 1 : threads;
  p.f64 = x.dtype(kLogKernel) == Dtype::f64;
  const Dtype compute = compute_dtype(p.f64);
  p.log_kernel = x.needed(kLogKernel, {p.G, p.N, p.M}, compute);
  p.log_a = x.view(kRows, {p.G, p.N}, compute);
  p.log_b = x.view(kColumns, {p.G, p.M}, compute);
  p.lam_a = x.view(kLamA, {p.G}, compute);
  p.lam_b = x.view(kLamB, {p.G}, compute);
  p.f = x.view(kF, {p.G, p.N}, compute);
  p.g = x.view(kG, {p.G, p.M}, compute);
  p.c = x.needed(kC, {p.G, T > 1 ? T : 1, p.M}, compute);
  const View iters = x.needed(kIters, {p.G}, kInt64);
  if (p.G > 1 && iters.stride[0] != 1) throw std::invalid_argument("tensor 'iters' is not contiguous");
  p.iters = static_cast<int64_t*>(iters.data);
  p.d_f = x.view(kDF, {p.G, p.N}, compute);
  p.d_g = x.view(kDG, {p.G, p.M}, compute);
  p.d_log_kernel = x.view(kDLogKernel, {p.G, p.N, p.M}, compute);
  p.d_log_a = x.view(kDRows, {p.G, p.N}, compute);
  p.d_log_b = x.view(kDColumns, {p.G, p.M}, compute);
  p.d_lam = x.view(kDLam, {p.G, 2}, compute);
  if (backward)
    x.need(kDF), x.need(kDG);
  else
    x.need(kF), x.need(kG);
  return p;
}

}  // namespace sfk
