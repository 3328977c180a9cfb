#include "cuda_bindings.h"

#include <pybind11/stl.h>

#include "../cuda/cuda.h"
#include "arguments.h"

namespace sfk {
namespace {

// Runs `call(device)` on a device, without Python's lock.
template <class Call>
void on_device(int index, Call call) {
  py::gil_scoped_release nogil;
  const cuda::OnDevice guard(index);
  call(cuda::device(index));
}

void sinkhorn(const py::tuple& t, const py::tuple& scalars, int64_t T, double tol, bool backward, int device,
              uintptr_t stream) {
  const SinkhornParams p = sinkhorn_params(t, scalars, T, tol, 1, backward);
  if (p.f64) throw std::invalid_argument("tensor 'log_kernel' has the wrong dtype");
  void* on = reinterpret_cast<void*>(stream);
  on_device(device,
            [&](const cuda::Device& d) { backward ? cuda::sinkhorn_backward(p, d, on) : cuda::sinkhorn(p, d, on); });
}

// seed: where the device keeps it, 0 for none; allocate(n): a tensor of n floats on the device.
void attention(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p, uintptr_t seed,
               const py::object& o, const py::object& z, const py::object& c, int device, uintptr_t stream,
               const py::function& allocate) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, 0, 1);
  p.seed_at = reinterpret_cast<const int64_t*>(seed);
  p.o = view(o, "o", {p.B, p.H, p.L, p.E}, p.key.dtype);
  if (p.o) need(p.query, "query");
  state(p, z, c, true);
  py::object memory;  // until the launch: what is freed then is used again after it, in the order of the stream
  const auto taken = [&](int64_t numbers) {
    const py::gil_scoped_acquire python;
    memory = allocate(numbers);
    return reinterpret_cast<float*>(memory.attr("data_ptr")().cast<uintptr_t>());
  };
  on_device(device, [&](const cuda::Device& d) { cuda::attention(p, d, reinterpret_cast<void*>(stream), taken); });
}

void attention_backward(const py::tuple& x, const py::tuple& scalars, bool dot, int64_t T, double dropout_p,
                        uintptr_t seed, const py::object& z, const py::object& c, const py::tuple& grads, int device,
                        uintptr_t stream) {
  AttentionParams p = attention_params(x, scalars, dot, T, dropout_p, 0, 1);
  p.seed_at = reinterpret_cast<const int64_t*>(seed);
  state(p, z, c, true);
  gradients(p, grads, cuda::gradient_parts(cuda::device(device), p));
  on_device(device, [&](const cuda::Device& d) { cuda::attention_backward(p, d, reinterpret_cast<void*>(stream)); });
}

// Why some device of this machine cannot take a problem; empty when all can.
template <class Refusal>
std::string refusal(Refusal of) {
  std::string reason;
  for (int i = 0; i < cuda::device_count() && reason.empty(); ++i) reason = of(cuda::device(i));
  return reason;
}

std::string sinkhorn_refusal(int64_t N, int64_t M, bool backward) {
  return refusal([&](const cuda::Device& d) { return cuda::sinkhorn_refusal(d, N, M, backward); });
}

int64_t gradient_parts(const py::tuple& x, const py::tuple& scalars, int64_t T, int device) {
  return cuda::gradient_parts(cuda::device(device), attention_params(x, scalars, false, T, 0, 0, 1));
}

std::string attention_refusal(const AttentionSizes& sizes, int dtype, bool backward) {
  const AttentionParams p = attention_sizes(sizes, dtype);
  return refusal([&](const cuda::Device& d) { return cuda::attention_refusal(d, p, backward); });
}

bool attention_leaves_idle(const AttentionSizes& sizes, int dtype) {
  const AttentionParams p = attention_sizes(sizes, dtype);
  for (int i = 0; i < cuda::device_count(); ++i)
    if (cuda::attention_leaves_idle(cuda::device(i), p)) return true;
  return false;
}

py::list devices() {
  py::list found;
  for (int i = 0; i < cuda::device_count(); ++i) {
    const cuda::Device d = cuda::device(i);
    py::list at_once;
    for (int cluster = 1; cluster <= d.clusters; cluster *= 2) at_once.append(d.clusters_at_once(cluster));
    found.append(py::make_tuple(d.major, d.minor, d.processors, d.shared, d.clusters, py::tuple(at_once)));
  }
  return found;
}

}  // namespace

AttentionParams attention_sizes(const AttentionSizes& sizes, int dtype) {
  AttentionParams p;
  int64_t* const to[] = {&p.B, &p.H, &p.L, &p.S, &p.M, &p.D, &p.E, &p.P, &p.T};
  for (size_t i = 0; i < sizes.size(); ++i) *to[i] = sizes[i];
  static char nothing;
  p.key.dtype = static_cast<Dtype>(dtype);
  p.ref_pos.data = p.P ? &nothing : nullptr;
  return p;
}

void bind_cuda(py::module_& m) {
  m.def("cuda_sinkhorn", &sinkhorn);
  m.def("cuda_sinkhorn_refusal", &sinkhorn_refusal);
  m.def("cuda_attention", &attention);
  m.def("cuda_attention_backward", &attention_backward);
  m.def("cuda_gradient_parts", &gradient_parts);
  m.def("cuda_attention_refusal", &attention_refusal);
  m.def("cuda_attention_leaves_idle", &attention_leaves_idle);
  m.def("cuda_devices", &devices,
        "(major, minor, multiprocessors, bytes of shared memory, blocks of a cluster, clusters of 1, 2, .. at once) of "
        "each");
}

}  // namespace sfk
