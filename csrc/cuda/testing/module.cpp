// The CUDA kernels as a Python module that runs them on the CPU, on CPU tensors: the shim in place of the GPU.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../../python/cuda_bindings.h"
#include "probes.h"
#include "races.h"
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
}
