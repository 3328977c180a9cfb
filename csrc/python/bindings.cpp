// Python's view of the kernels.
#include "../cpu/isa/table.h"
#include "../cpu/probe_threads.h"
#include "arguments.h"
#include "cuda_bindings.h"
#include "prepared.h"

using namespace sfk;

namespace {

void attention(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
               int threads, const py::object& o, const py::object& z, const py::object& c) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  if (p.o) need(p.query, "query");
  state(p, z, c, !p.o || !z.is_none() || !c.is_none());  // of o alone nothing else is kept
  py::gil_scoped_release nogil;
  kernels().attention(p);
}

// The two halves of attention: z, c and g of the keys; o of the queries from z and g.
void transport(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
               int threads, const py::object& z, const py::object& c, const py::object& g) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  state(p, z, c, true);
  p.g = view(g, "g", {p.B, p.H, p.M}, compute_dtype(p.f64));
  need(p.g, "g");
  py::gil_scoped_release nogil;
  kernels().attention(p);
}

AttentionParams memory_params(const py::tuple& x, const py::tuple& scalars, bool dot, double dropout_p, uint64_t seed,
                              int threads, const py::object& z, const py::object& g) {
  AttentionParams p = attention_params(x, scalars, dot, 1, dropout_p, seed, threads);
  need(p.query, "query");
  if (p.S) throw std::invalid_argument("a memory is read without keys");
  p.reading = true;
  p.z = view(z, "z", {p.B, p.H, p.M, p.E}, compute_dtype(p.f64));
  p.g = view(g, "g", {p.B, p.H, p.M}, compute_dtype(p.f64));
  need(p.z, "z"), need(p.g, "g");
  return p;
}

void read_memory(const py::tuple& x, const py::tuple& scalars, bool dot, double dropout_p, uint64_t seed, int threads,
                 const py::object& z, const py::object& g, const py::object& o) {
  AttentionParams p = memory_params(x, scalars, dot, dropout_p, seed, threads, z, g);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  need(p.o, "o");
  py::gil_scoped_release nogil;
  kernels().attention(p);
}

// The second of `grads`, dz, is a result here, and so is d_g.
void read_memory_backward(const py::tuple& x, const py::tuple& scalars, bool dot, double dropout_p, uint64_t seed,
                          int threads, const py::object& z, const py::object& g, const py::tuple& grads,
                          const py::object& d_g) {
  AttentionParams p = memory_params(x, scalars, dot, dropout_p, seed, threads, z, g);
  gradients(p, grads, p.B);
  need(p.d_o, "d_o");
  p.d_g = view(d_g, "d_g", {p.B, p.H, p.M}, compute_dtype(p.f64));
  py::gil_scoped_release nogil;
  kernels().attention_backward(p);
}

void attention_weights(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p,
                       uint64_t seed, int threads, const py::object& o, const py::object& z, const py::object& c,
                       const py::object& w_q, const py::object& w_k) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  p.w_q = view(w_q, "w_q", {p.B, p.H, p.L, p.M}, compute_dtype(p.f64));
  p.w_k = view(w_k, "w_k", {p.B, p.H, p.S, p.M}, compute_dtype(p.f64));
  need(p.query, "query"), need(p.o, "o"), need(p.w_q, "w_q"), need(p.w_k, "w_k");
  state(p, z, c, !z.is_none() || !c.is_none());
  py::gil_scoped_release nogil;
  kernels().attention(p);
}

void attention_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p,
                        uint64_t seed, int threads, const py::object& z, const py::object& c, const py::tuple& grads) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, seed, threads);
  state(p, z, c, true);
  gradients(p, grads, p.B);
  py::gil_scoped_release nogil;
  kernels().attention_backward(p);
}

void causal(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
            int threads, const py::object& log_decay, const py::object& initial, const py::object& o,
            const py::object& final_state) {
  CausalParams p = causal_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), log_decay, initial);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  need(p.o, "o");
  p.final_state = state_view(p, p.B, final_state, "final_state");
  py::gil_scoped_release nogil;
  kernels().causal(p);
}

void causal_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
                     int threads, const py::object& log_decay, const py::object& initial, const py::tuple& grads,
                     const py::object& d_final, const py::object& d_log_decay, const py::object& d_initial) {
  CausalParams p = causal_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), log_decay, initial);
  gradients(p, grads, p.B);
  need(p.d_o, "d_o");
  stream_gradients(p, p, p.B, d_final, d_log_decay, d_initial);
  py::gil_scoped_release nogil;
  kernels().causal_backward(p);
}

void step(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
          int threads, const py::object& log_decay, const py::tuple& states, uintptr_t rows, const py::object& o) {
  StepParams p = step_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), log_decay, states, o);
  p.rows = reinterpret_cast<const int32_t*>(rows);
  if (!p.rows) own_states(p);
  py::gil_scoped_release nogil;
  kernels().step(p);
}

void masked(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
            int threads, const py::object& mask, bool causal, const py::object& o) {
  MaskedParams p = masked_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), mask, causal);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  need(p.o, "o");
  py::gil_scoped_release nogil;
  kernels().masked(p);
}

void masked_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
                     int threads, const py::object& mask, bool causal, const py::tuple& grads,
                     const py::object& d_mask) {
  MaskedParams p = masked_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), mask, causal);
  gradients(p, grads, p.B);
  need(p.d_o, "d_o");
  p.d_mask = mask_view(p, d_mask, "d_mask");
  if (p.d_mask && (!p.mask || p.mask.dtype == kBool || p.d_mask.dtype == kBool))
    throw std::invalid_argument("only a float mask has a gradient");
  py::gil_scoped_release nogil;
  kernels().masked_backward(p);
}

void packed(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
            int threads, const py::object& cu_q, const py::tuple& cu_k, const py::object& o, const py::object& z,
            const py::object& c, bool causal, const py::object& log_decay, const py::object& initial,
            const py::object& final_state) {
  PackedStreamParams p = packed_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), cu_q, cu_k,
                                       causal, log_decay, initial);
  p.final_state = state_view(p, p.N, final_state, "final_state");
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  if (p.o || causal) need(p.query, "query"), need(p.o, "o");
  state(p, z, c, !causal, p.N);
  py::gil_scoped_release nogil;
  kernels().packed(p);
}

void packed_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uint64_t seed,
                     int threads, const py::object& cu_q, const py::tuple& cu_k, const py::object& z,
                     const py::object& c, const py::tuple& grads, bool causal, const py::object& log_decay,
                     const py::object& initial, const py::object& d_final, const py::object& d_log_decay,
                     const py::object& d_initial) {
  PackedStreamParams p = packed_params(attention_params(x, scalars, dot, T, dropout_p, seed, threads), cu_q, cu_k,
                                       causal, log_decay, initial);
  stream_gradients(p, p, p.N, d_final, d_log_decay, d_initial);
  state(p, z, c, !causal, p.N);
  gradients(p, grads, p.N, p.N);
  if (causal) need(p.d_o, "d_o");
  py::gil_scoped_release nogil;
  kernels().packed_backward(p);
}

enum FeatureTensor {
  kX,
  kLandmarks,
  kBandwidths,
  kWhitening,
  kCentring,
  kPsi,
  kDPsi,
  kDX,
  kDLandmarks,
  kDBandwidth,
  kDWhitening,
  kNumFeatures
};
constexpr const char* kFeatures[kNumFeatures] = {
    "x",     "landmarks", "bandwidth",   "whitening",   "centring",    "psi",
    "d_psi", "d_x",       "d_landmarks", "d_bandwidth", "d_whitening",
};

void features(const py::tuple& tensors, double bandwidth, int threads, bool backward) {
  const Tensors x(tensors, kFeatures);
  FeatureParams p;
  p.B = x.size(kX, 0), p.H = x.size(kX, 1), p.N = x.size(kX, 2), p.D = x.size(kX, 3);
  p.R = x.size(kLandmarks, 1);
  if (p.R < 1 || p.D < 1) throw std::invalid_argument("R and D must be positive");
  p.bandwidth = bandwidth, p.threads = threads < 1 ? 1 : threads;
  const Dtype dtype = x.dtype(kX);
  p.f64 = dtype == Dtype::f64;
  const Dtype compute = compute_dtype(p.f64);
  p.x = x.needed(kX, {p.B, p.H, p.N, p.D}, dtype);
  p.landmarks = x.needed(kLandmarks, {p.H, p.R, p.D}, compute);
  p.bandwidths = x.view(kBandwidths, {p.H}, compute);
  p.whitening = x.needed(kWhitening, {p.H, p.R, p.R}, compute);
  p.centring = x.view(kCentring, {p.H, 1, kNumCentring}, compute);
  p.psi = x.view(kPsi, {p.B, p.H, p.N, p.R}, dtype);
  p.d_psi = x.view(kDPsi, {p.B, p.H, p.N, p.R}, dtype);
  p.d_x = x.view(kDX, {p.B, p.H, p.N, p.D}, dtype);
  p.d_landmarks = x.view(kDLandmarks, {p.B, p.H, p.R, p.D}, compute);
  p.d_bandwidth = x.view(kDBandwidth, {p.B, p.H, 1, 1}, compute);
  p.d_whitening = x.view(kDWhitening, {p.B, p.H, p.R, p.R}, compute);
  x.need(backward ? kDPsi : kPsi);
  py::gil_scoped_release nogil;
  backward ? kernels().features_backward(p) : kernels().features(p);
}

void sinkhorn(const py::tuple& t, const py::tuple& scalars, int64_t T, double tol, int threads, bool backward) {
  const SinkhornParams p = sinkhorn_params(t, scalars, T, tol, threads, backward);
  py::gil_scoped_release nogil;
  backward ? kernels().sinkhorn_backward(p) : kernels().sinkhorn(p);
}

void started(const py::tuple& t, const py::tuple& scalars, int64_t T, double tol, int threads,
             const py::object& start) {
  StartedParams p{sinkhorn_params(t, scalars, T, tol, threads, false)};
  p.start = view(start, "start", {p.G, p.M}, compute_dtype(p.f64));
  py::gil_scoped_release nogil;
  kernels().started(p);
}

enum LinearisedTensor { kOfKernel, kOfRows, kRate, kPotential, kS, kOfF, kOfC, kMass, kGram, kOfX, kNumLinearised };
constexpr const char* kLinearised[kNumLinearised] = {"log_kernel", "log_a", "lam_a", "g",    "s",
                                                     "f",          "c",     "mass",  "gram", "rows"};

void linearised(const py::tuple& tensors, int threads) {
  const Tensors x(tensors, kLinearised);
  LinearisedParams p;
  p.G = x.size(kOfKernel, 0), p.N = x.size(kOfKernel, 1), p.M = x.size(kOfKernel, 2);
  if (p.M < 1) throw std::invalid_argument("M must be positive");
  p.threads = threads < 1 ? 1 : threads, p.f64 = x.dtype(kOfKernel) == Dtype::f64;
  const Dtype compute = compute_dtype(p.f64);
  p.log_kernel = x.needed(kOfKernel, {p.G, p.N, p.M}, compute);
  p.log_a = x.needed(kOfRows, {p.G, p.N}, compute);
  p.lam_a = x.needed(kRate, {p.G}, compute);
  p.g = x.needed(kPotential, {p.G, p.M}, compute);
  p.s = x.needed(kS, {p.G, p.N}, compute);
  p.f = x.needed(kOfF, {p.G, p.N}, compute);
  p.c = x.needed(kOfC, {p.G, p.M}, compute);
  p.mass = x.needed(kMass, {p.G, p.M}, compute);
  p.gram = x.view(kGram, {p.G, p.M, p.M}, compute);
  p.rows = x.view(kOfX, {p.G, p.N, p.M}, compute);
  if (bool(p.gram) == bool(p.rows)) throw std::invalid_argument("either 'gram' or 'rows' is wanted");
  for (const View* v : {&p.gram, &p.rows})
    if (*v && p.G * p.N > 0 && (v->stride[2] != 1 || v->stride[1] != p.M))
      throw std::invalid_argument("tensors 'gram' and 'rows' must be contiguous");
  py::gil_scoped_release nogil;
  kernels().linearised(p);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("OPERANDS") = operand_names();
  m.def("attention", &attention);
  m.def("attention_weights", &attention_weights);
  m.def("transport", &transport);
  m.def("read", &read_memory);
  m.def("read_backward", &read_memory_backward);
  m.def("attention_backward", &attention_backward);
  m.def("causal", &causal);
  m.def("causal_backward", &causal_backward);
  m.def("step", &step);
  py::class_<PreparedAttention>(m, "PreparedAttention")
      .def(py::init<const py::tuple&, const py::tuple&, bool, int64_t, double, uint64_t, int, const py::object&>())
      .def("run", &PreparedAttention::run);
  py::class_<PreparedStep>(m, "PreparedStep")
      .def(py::init<const py::tuple&, const py::tuple&, bool, int64_t, double, uint64_t, int, const py::object&,
                    const py::object&, const py::tuple&, bool, const py::object&>())
      .def("run", &PreparedStep::run);
  m.def("masked", &masked);
  m.def("masked_backward", &masked_backward);
  m.def("packed", &packed);
  m.def("packed_backward", &packed_backward);
  m.def("features", &features);
  m.def("sinkhorn", &sinkhorn);
  m.def("started", &started);
  m.def("linearised", &linearised);
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
