#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "address.h"
#include "experts.h"
#include "program.h"
#include "small_ops_calls.h"

namespace nb = nanobind;
using namespace kvshare;

using ActivationArguments = std::tuple<bool, float, float>;  // as in Activation

static Activation activation_of(const ActivationArguments& given) { return {std::get<0>(given), std::get<1>(given), std::get<2>(given)}; }

void bind_experts(nb::module_& m) {
    nb::enum_<Scoring>(m, "Scoring").value("SOFTMAX", Scoring::SOFTMAX).value("SIGMOID", Scoring::SIGMOID).value("SQRT_SOFTPLUS", Scoring::SQRT_SOFTPLUS);
    m.attr("MAX_EXPERTS") = MAX_EXPERTS;
    m.attr("MAX_EXPERT_GROUPS") = MAX_EXPERT_GROUPS;
    m.def("gate", [](uintptr_t gate, uintptr_t up, uintptr_t out, bool bf16, int64_t rows, int64_t gate_stride, int64_t up_stride, int64_t width,
                     const ActivationArguments& activation) {
        const GateTask task = {at<const void>(gate), at<const void>(up), at<void>(out), gate_stride, up_stride, width, activation_of(activation)};
        perform(Gil::kept, [=](const Isa& isa) { run_gate(isa, task, bf16, rows); }, Work::small, {{run_of(task.up, rows == 1 ? task.width : 0, bf16)}, {}});
    });
    m.def("softplus_gate", [](uintptr_t x, uintptr_t gate, uintptr_t out, bool bf16, int64_t rows, int64_t heads, int64_t width, bool per_head) {
        const SoftplusTask task = {at<const void>(x), at<const void>(gate), at<void>(out), heads, width, per_head};
        perform(Gil::kept, [=](const Isa& isa) { run_softplus(isa, task, bf16, rows); });
    });
    m.def("route", [](uintptr_t scores, bool scores_bf16, int64_t rows, int64_t experts, int64_t k, Scoring scoring, float softcap, uintptr_t bias, int64_t groups, int64_t kept,
                      uintptr_t table, uintptr_t ids, float tiny, float scale, uintptr_t expert_scale, bool expert_scale_bf16, uintptr_t chosen, uintptr_t weights,
                      bool weights_bf16) {
        const RouteTask task = {at<const void>(scores), scores_bf16, experts, k, scoring, softcap, at<const float>(bias), groups, kept, at<const int64_t>(table),
                                at<const int64_t>(ids), tiny, scale, at<const void>(expert_scale), expert_scale_bf16, at<int64_t>(chosen), at<void>(weights), weights_bf16};
        perform(Gil::kept, [=](const Isa& isa) { run_route(isa, task, rows); });
    });
    m.def("experts", [](nb::pointer_and_handle<QuantizedWeight> gate_up, nb::pointer_and_handle<QuantizedWeight> down, uintptr_t x, bool bf16, int64_t rows, int64_t k, int64_t num_experts, uintptr_t chosen,
                        uintptr_t weights, bool weights_bf16, const ActivationArguments& activation, float scale, uintptr_t beside, uintptr_t out) {
        const ExpertsTask task = {at<const void>(x), bf16, rows, k, num_experts, at<const int64_t>(chosen), at<const void>(weights), weights_bf16, activation_of(activation), scale,
                                  at<const void>(beside), at<void>(out)};
        perform(Gil::released, [task, gate_up = gate_up.p, down = down.p, kept = nb::make_tuple(gate_up.h, down.h)](const Isa& isa) { run_experts(isa, *gate_up, *down, task); });
    });
}
