// The CUDA kernels as a Python module that runs them on the CPU, on CPU tensors: the shim in place of the GPU.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../python/arguments.h"
#include "../../python/cuda_bindings.h"
#include "../layout.cuh"
#include "probes.h"
#include "races.h"
#include "runtime.h"
#include "shim.h"

namespace {

template <class Named>
const Named& named(const std::vector<Named>& all, const std::string& name) {
  for (const Named& one : all)
    if (name == one.name) return one;
  throw std::invalid_argument("nothing is called " + name);
}

template <class Named>
std::vector<std::string> names(const std::vector<Named>& all) {
  std::vector<std::string> found;
  for (const Named& one : all) found.push_back(one.name);
  return found;
}

// A device as (processors, bytes of shared memory, clusters of 2, 4 and 8 blocks at once), and whether it has a
// context.
using Described = std::tuple<int, int64_t, std::array<int, 3>, bool>;

void set_devices(const std::vector<Described>& all) {
  sfk::shim::Runtime& to = sfk::shim::runtime();
  to = {};
  for (const auto& [processors, shared, at_once, context] : all) {
    sfk::cuda::Device d = {9, 0, processors, shared, sfk::cuda::kLargestCluster};
    std::copy(at_once.begin(), at_once.end(), d.at_once);
    to.devices.push_back(d), to.contexts.push_back(context);
  }
}

// (blocks of a cluster, warps of a block) of a problem on the first device; None where it does not fit.
std::optional<std::pair<int, int>> layout(const sfk::AttentionSizes& sizes, int dtype, bool backward) {
  const auto l = sfk::cuda::layout(sfk::cuda::device(0), sfk::attention_sizes(sizes, dtype), backward);
  if (l.cluster == 0) return std::nullopt;
  return std::make_pair(l.cluster, l.warps);
}

// Whether a launch of the forward finds a layout for these operands.
bool forward_fits(const py::tuple& operands, const py::tuple& scalars, int64_t T) {
  const auto p = sfk::attention_params(operands, scalars, false, T, 0, 0, 1);
  return sfk::cuda::layout(sfk::cuda::device(0), p, false).cluster > 0;
}

// What is done to the runtime by making a device the current one for a while, from another; what was done before is
// forgotten.
std::vector<std::string> visit(int from, int to) {
  sfk::shim::runtime().current = from, sfk::shim::runtime().done.clear();
  {
    const sfk::cuda::OnDevice guard(to);
  }
  return sfk::shim::runtime().done;
}

}  // namespace

PYBIND11_MODULE(cuda_shim, m) {
  namespace shim = sfk::shim;
  sfk::bind_cuda(m);
  m.attr("SCHEDULES") = names(shim::schedules());
  m.attr("PROBES") = names(shim::probes());
  m.def("set_schedule", [](const std::string& name) { shim::set_schedule(named(shim::schedules(), name)); });
  m.def("watch_races", &shim::races::watch);
  m.def("found_race", &shim::races::found);
  m.def("probe",
        [](const std::string& name, bool barrier) { return shim::found(named(shim::probes(), name), barrier); });
  m.def("set_devices", &set_devices);
  m.def("visit", &visit);
  m.def("layout", &layout);
  m.def("forward_fits", &forward_fits);
  m.def("done", [] { return shim::runtime().done; });
}
