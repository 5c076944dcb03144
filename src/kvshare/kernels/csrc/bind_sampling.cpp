#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "address.h"
#include "program.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace kvshare;

constexpr const char* CHOICE = "a token that depends on what tensors contain";

void bind_sampling(nb::module_& m) {
    m.def("draw", [](uintptr_t logits, int64_t count, float inverse, int64_t top_k, int64_t least_weight, double top_p, double place) {
        not_recorded(CHOICE);
        return draw(active_isa(), {at<const float>(logits), count}, {inverse, top_k, least_weight, top_p, place});
    });
    m.def("leading", [](uintptr_t logits, int64_t vocabulary, int64_t token, int64_t count) {
        not_recorded(CHOICE);
        const Leading found = leading(active_isa(), {at<const float>(logits), vocabulary}, token, count);
        return std::tuple(found.most, found.weight, found.rank, found.tokens, found.logits);
    });
    m.def("penalise", [](uintptr_t logits, int64_t vocabulary, uintptr_t tokens, uintptr_t times, int64_t count, float repetition, float presence, float frequency) {
        not_recorded("penalties for what was chosen so far");
        penalise(at<float>(logits), vocabulary, at<const int64_t>(tokens), at<const int64_t>(times), count, {repetition, presence, frequency});
    });
}
