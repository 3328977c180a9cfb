#include "bindings.h"

#include "../arguments.h"
#include "cuda.h"

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

// Why some device of this machine cannot take a problem of this size; empty when all can.
std::string sinkhorn_refusal(int64_t N, int64_t M, bool backward) {
  std::string reason;
  for (int i = 0; i < cuda::device_count() && reason.empty(); ++i)
    reason = cuda::sinkhorn_refusal(cuda::device(i), N, M, backward);
  return reason;
}

py::list devices() {
  py::list found;
  for (int i = 0; i < cuda::device_count(); ++i) {
    const cuda::Device d = cuda::device(i);
    found.append(py::make_tuple(d.major, d.minor, d.processors, d.shared, d.clusters));
  }
  return found;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_sinkhorn", &sinkhorn);
  m.def("cuda_sinkhorn_refusal", &sinkhorn_refusal);
  m.def("cuda_devices", &devices,
        "(major, minor, multiprocessors, bytes of shared memory, blocks of a cluster) of each");
}

}  // namespace sfk
