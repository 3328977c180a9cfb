// Python's view of the kernels.
#include "../cpu/isa/table.h"
#include "../cpu/probe_threads.h"
#include "arguments.h"
#include "cuda_bindings.h"

using namespace sfk;

namespace {

void attention(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
               int threads, const py::object& o, const py::object& z, const py::object& c, bool causal) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E});
  same_dtype(p.o, p.key.dtype, "o");
  if (p.o) need(p.query, "query");
  state(p, z, c, !causal);
  if (causal && (p.L != p.S || T > 1 || !p.o)) throw std::invalid_argument("causal needs L = S and T <= 1");
  py::gil_scoped_release nogil;
  causal ? kernels().causal(p) : kernels().attention(p);
}

void attention_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p,
                        uint64_t seed, int threads, const py::object& z, const py::object& c, const py::tuple& grads,
                        bool causal) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  state(p, z, c, !causal);
  gradients(p, grads, p.B);
  if (causal && (p.L != p.S || T > 1 || !p.d_o)) throw std::invalid_argument("causal needs L = S and T <= 1");
  py::gil_scoped_release nogil;
  causal ? kernels().causal_backward(p) : kernels().attention_backward(p);
}

// tensors: x, landmarks, bandwidths, whitening, psi, d_psi, d_x, d_landmarks, d_bandwidth, d_whitening.
void features(const py::tuple& t, double bandwidth, int threads, bool backward) {
  if (t.size() != 10) throw std::invalid_argument("wrong number of tensors");
  FeatureParams p;
  p.B = size_of(t[0], 0), p.H = size_of(t[0], 1), p.N = size_of(t[0], 2), p.D = size_of(t[0], 3);
  p.R = size_of(t[1], 1);
  if (p.R < 1 || p.D < 1) throw std::invalid_argument("R and D must be positive");
  p.bandwidth = bandwidth, p.threads = threads < 1 ? 1 : threads;
  p.x = view(t[0], "x", {p.B, p.H, p.N, p.D});
  p.landmarks = view(t[1], "landmarks", {p.H, p.R, p.D});
  p.bandwidths = view(t[2], "bandwidth", {p.H});
  p.whitening = view(t[3], "whitening", {p.H, p.R, p.R});
  p.psi = view(t[4], "psi", {p.B, p.H, p.N, p.R});
  p.d_psi = view(t[5], "d_psi", {p.B, p.H, p.N, p.R});
  p.d_x = view(t[6], "d_x", {p.B, p.H, p.N, p.D});
  p.d_landmarks = view(t[7], "d_landmarks", {p.B, p.H, p.R, p.D});
  p.d_bandwidth = view(t[8], "d_bandwidth", {p.B, p.H, 1, 1});
  p.d_whitening = view(t[9], "d_whitening", {p.B, p.H, p.R, p.R});
  need(p.x, "x"), need(p.landmarks, "landmarks"), need(p.whitening, "whitening");
  backward ? need(p.d_psi, "d_psi") : need(p.psi, "psi");
  p.f64 = p.x.dtype == Dtype::f64;
  const Dtype compute = p.f64 ? Dtype::f64 : Dtype::f32;
  for (const View* v : {&p.psi, &p.d_psi, &p.d_x}) same_dtype(*v, p.x.dtype, "features");
  for (const View* v : {&p.landmarks, &p.bandwidths, &p.whitening, &p.d_landmarks, &p.d_bandwidth, &p.d_whitening})
    same_dtype(*v, compute, "parameter");
  py::gil_scoped_release nogil;
  backward ? kernels().features_backward(p) : kernels().features(p);
}

void sinkhorn(const py::tuple& t, const py::tuple& scalars, int64_t T, double tol, int threads, bool backward) {
  const SinkhornParams p = sinkhorn_params(t, scalars, T, tol, threads, backward);
  py::gil_scoped_release nogil;
  backward ? kernels().sinkhorn_backward(p) : kernels().sinkhorn(p);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
  m.def("features", &features);
  m.def("sinkhorn", &sinkhorn);
  m.def("cpu_isa", [] { return kernels().isa; }, "the instruction set in use");
  m.def("has_cpu_isa", [](const std::string& isa) { return has_isa(isa.c_str()); });
  m.def("set_cpu_isa", [](const std::string& isa) { return set_isa(isa.c_str()); });
  m.def("has_openmp", &has_openmp);
  m.def("fma_peak", &fma_peak, py::arg("seconds"), py::arg("threads"), "float32 FLOP/s of all threads together",
        py::call_guard<py::gil_scoped_release>());
  m.def("exp_rate", &exp_peak, py::arg("seconds"), py::arg("threads"), "float32 exponentials/s",
        py::call_guard<py::gil_scoped_release>());
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("seconds"), py::arg("threads"), py::arg("bytes"),
        "bytes read plus written per second", py::call_guard<py::gil_scoped_release>());
#ifdef SFK_CUDA
  bind_cuda(m);
#endif
}
