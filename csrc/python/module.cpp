#include "python/array.h"

#include <string>
#include <vector>

namespace fastseq::python_door {
namespace {

std::string isa() {
  if (const char* const error = core::choice().error) door::fail("isa", error);
  return core::kernels().name;
}

std::vector<std::string> isas() {
  const core::Kernels* found[core::kMostSets];
  const int count = core::supported(found);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(found[i]->name);
  return names;
}

}  // namespace
}  // namespace fastseq::python_door

PYBIND11_MODULE(_core, m) {
  namespace door = fastseq::python_door;
  m.doc() = "The kernels of fastseq on numpy arrays.";
  m.def("isa", &door::isa, "The instruction set that runs.");
  m.def("isas", &door::isas, "The instruction sets that are built and that this machine supports, best last.");
  door::bind_adt(m);
  door::bind_ensemble_stats(m);
  door::bind_gemm(m);
  door::bind_lstm(m);
  door::bind_lstm_lowrank(m);
  door::bind_mimo(m);
  door::bind_mimo_nll(m);
  door::bind_packed(m);
  door::bind_deploy(m);
  door::bind_vq(m);
  door::bind_vq_codes(m);
  door::bind_vq_residual(m);
}
