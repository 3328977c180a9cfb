// Arguments from Python: tensors come as tuples (pointer, sizes, strides, dtype code).  Every size a kernel relies on
// is checked here, so that no kernel reads outside what the sizes and strides describe.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../params.h"

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

inline int64_t size_of(py::handle o, int dim) {
  if (!PyTuple_Check(o.ptr()) || PyTuple_GET_SIZE(o.ptr()) != 4) throw std::invalid_argument("not a tensor tuple");
  PyObject* size = PyTuple_GET_ITEM(o.ptr(), 1);
  if (!PyTuple_Check(size) || PyTuple_GET_SIZE(size) <= dim)
    throw std::invalid_argument("tensor has too few dimensions");
  return integer(PyTuple_GET_ITEM(size, dim));
}

// x: the 14 tensors of problem.Operands before the seed.
inline AttentionParams attention_params(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T,
                                        double dropout_p, uint64_t seed, int threads) {
  if (x.size() != 14 || scalars.size() != kNumHyper) throw std::invalid_argument("wrong number of operands");
  AttentionParams p;
  p.B = size_of(x[1], 0), p.H = size_of(x[1], 1), p.S = size_of(x[1], 2), p.D = size_of(x[1], 3);
  p.E = size_of(x[2], 3), p.M = size_of(x[3], 1), p.T = T;
  p.L = x[0].is_none() ? 0 : size_of(x[0], 2);
  p.P = x[13].is_none() ? 0 : size_of(x[13], 2);
  if (p.M < 1 || p.D < 1 || p.E < 1 || T < 0)
    throw std::invalid_argument("M, D and E must be positive, T not negative");
  p.kernel = dot ? KernelKind::dot : KernelKind::rbf;
  p.dropout_p = dropout_p, p.seed = seed, p.threads = threads < 1 ? 1 : threads;
  p.query = view(x[0], "query", {p.B, p.H, p.L, p.D});
  p.key = view(x[1], "key", {p.B, p.H, p.S, p.D});
  p.value = view(x[2], "value", {p.B, p.H, p.S, p.E});
  p.references = view(x[3], "references", {p.H, p.M, p.D});
  p.log_a = view(x[4], "log_a", {p.B, p.H, p.S});
  p.log_b = view(x[5], "log_b", {p.H, p.M});
  for (int i = 0; i < kNumHyper; ++i) {
    p.scalars[i] = scalars[i].cast<double>();
    p.hyper[i] = view(x[6 + i], "hyperparameter", {p.H});
  }
  p.query_pos = view(x[11], "query_position", {p.B, p.H, p.L, p.P});
  p.key_pos = view(x[12], "key_position", {p.B, p.H, p.S, p.P});
  p.ref_pos = view(x[13], "reference_position", {p.H, p.M, p.P});
  need(p.key, "key"), need(p.value, "value"), need(p.references, "references");
  if (p.ref_pos) {
    need(p.key_pos, "key_position");
    if (p.query) need(p.query_pos, "query_position");
  }
  p.f64 = p.key.dtype == Dtype::f64;
  const Dtype compute = p.f64 ? Dtype::f64 : Dtype::f32;
  same_dtype(p.query, p.key.dtype, "query"), same_dtype(p.value, p.key.dtype, "value");
  for (const View* v : {&p.references, &p.log_a, &p.log_b, &p.query_pos, &p.key_pos, &p.ref_pos, &p.hyper[0],
                        &p.hyper[1], &p.hyper[2], &p.hyper[3], &p.hyper[4]})
    same_dtype(*v, compute, "parameter");
  return p;
}

inline void state(AttentionParams& p, const py::handle& z, const py::handle& c, bool required) {
  const Dtype compute = p.f64 ? Dtype::f64 : Dtype::f32;
  p.z = view(z, "z", {p.B, p.H, p.M, p.E});
  p.c = view(c, "c", {p.B, p.H, p.T > 1 ? p.T : 1, p.M});
  if (required) need(p.z, "z"), need(p.c, "c");
  same_dtype(p.z, compute, "z"), same_dtype(p.c, compute, "c");
}

// grads: d_o, d_z, d_c, d_query, d_key, d_value, d_log_a, d_references, d_log_b, d_hyper, d_ref_pos.
// The parameters' gradients come in `parts`, for the caller to add up.
inline void gradients(AttentionParams& p, const py::tuple& grads, int64_t parts) {
  if (grads.size() != 11) throw std::invalid_argument("wrong number of gradients");
  const Dtype compute = p.f64 ? Dtype::f64 : Dtype::f32;
  p.d_o = view(grads[0], "d_o", {p.B, p.H, p.L, p.E});
  p.d_z = view(grads[1], "d_z", {p.B, p.H, p.M, p.E});
  p.d_c = view(grads[2], "d_c", {p.B, p.H, p.T > 1 ? p.T : 1, p.M});
  p.d_query = view(grads[3], "d_query", {p.B, p.H, p.L, p.D});
  p.d_key = view(grads[4], "d_key", {p.B, p.H, p.S, p.D});
  p.d_value = view(grads[5], "d_value", {p.B, p.H, p.S, p.E});
  p.d_log_a = view(grads[6], "d_log_a", {p.B, p.H, p.S});
  p.d_references = view(grads[7], "d_references", {parts, p.H, p.M, p.D});
  p.d_log_b = view(grads[8], "d_log_b", {parts, p.H, p.M, 1});
  p.d_hyper = view(grads[9], "d_hyper", {parts, p.H, int64_t(kNumHyper), 1});
  p.d_ref_pos = view(grads[10], "d_ref_pos", {parts, p.H, p.M, p.P});
  if (p.d_o || p.d_query) need(p.query, "query"), need(p.d_o, "d_o");
  for (const View* v : {&p.d_o, &p.d_query, &p.d_key, &p.d_value}) same_dtype(*v, p.key.dtype, "gradient");
  for (const View* v : {&p.d_z, &p.d_c, &p.d_log_a, &p.d_references, &p.d_log_b, &p.d_hyper, &p.d_ref_pos})
    same_dtype(*v, compute, "parameter gradient");
}

// tensors: log_kernel, log_a, log_b, lam_a, lam_b, f, g, c, iters, d_f, d_g, d_log_kernel, d_log_a, d_log_b, d_lam.
inline SinkhornParams sinkhorn_params(const py::tuple& t, const py::tuple& scalars, int64_t T, double tol, int threads,
                                      bool backward) {
  if (t.size() != 15 || scalars.size() != 2) throw std::invalid_argument("wrong number of tensors");
  SinkhornParams p;
  p.G = size_of(t[0], 0), p.N = size_of(t[0], 1), p.M = size_of(t[0], 2), p.T = T;
  if (p.M < 1 || T < 0) throw std::invalid_argument("M must be positive, T not negative");
  p.scalars[0] = scalars[0].cast<double>(), p.scalars[1] = scalars[1].cast<double>();
  p.tol = tol, p.threads = threads < 1 ? 1 : threads;
  p.log_kernel = view(t[0], "log_kernel", {p.G, p.N, p.M});
  p.log_a = view(t[1], "log_a", {p.G, p.N});
  p.log_b = view(t[2], "log_b", {p.G, p.M});
  p.lam_a = view(t[3], "lam_a", {p.G});
  p.lam_b = view(t[4], "lam_b", {p.G});
  p.f = view(t[5], "f", {p.G, p.N});
  p.g = view(t[6], "g", {p.G, p.M});
  p.c = view(t[7], "c", {p.G, T > 1 ? T : 1, p.M});
  const View iters = view(t[8], "iters", {p.G});
  if (iters && p.G > 1 && iters.stride[0] != 1) throw std::invalid_argument("tensor 'iters' is not contiguous");
  p.iters = static_cast<int64_t*>(iters.data);
  p.d_f = view(t[9], "d_f", {p.G, p.N});
  p.d_g = view(t[10], "d_g", {p.G, p.M});
  p.d_log_kernel = view(t[11], "d_log_kernel", {p.G, p.N, p.M});
  p.d_log_a = view(t[12], "d_log_a", {p.G, p.N});
  p.d_log_b = view(t[13], "d_log_b", {p.G, p.M});
  p.d_lam = view(t[14], "d_lam", {p.G, 2});
  need(p.log_kernel, "log_kernel"), need(p.c, "c"), need(iters, "iters");
  if (backward)
    need(p.d_f, "d_f"), need(p.d_g, "d_g");
  else
    need(p.f, "f"), need(p.g, "g");
  p.f64 = p.log_kernel.dtype == Dtype::f64;
  const Dtype compute = p.f64 ? Dtype::f64 : Dtype::f32;
  for (const View* v : {&p.log_kernel, &p.log_a, &p.log_b, &p.lam_a, &p.lam_b, &p.f, &p.g, &p.c, &p.d_f, &p.d_g,
                        &p.d_log_kernel, &p.d_log_a, &p.d_log_b, &p.d_lam})
    same_dtype(*v, compute, "argument");
  return p;
}

}  // namespace sfk
