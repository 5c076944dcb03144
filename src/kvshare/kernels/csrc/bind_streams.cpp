#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "address.h"
#include "norm_arguments.h"
#include "program.h"
#include "stream_calls.h"

namespace nb = nanobind;
using namespace kvshare;

void bind_streams(nb::module_& m) {
    m.attr("MAX_STREAMS") = MAX_STREAMS;
    m.def("altup_predict", [](uintptr_t x, uintptr_t routed, uintptr_t matrix, uintptr_t out, bool bf16, int64_t rows, int64_t streams, int64_t width, float scale) {
        const AltUpTask task = {at<const void>(x), at<const void>(routed), at<const void>(matrix), nullptr, nullptr, at<void>(out), nullptr, streams, width, scale};
        perform(Gil::kept, [=](const Isa& isa) { run_predict(isa, task, bf16, rows); });
    });
    m.def("altup_correct", [](uintptr_t x, uintptr_t routed, uintptr_t matrix, uintptr_t active, uintptr_t gain, uintptr_t out, uintptr_t seen, bool bf16, int64_t rows,
                              int64_t streams, int64_t width, float scale) {
        const AltUpTask task = {at<const void>(x), at<const void>(routed), at<const void>(matrix), at<const void>(active), at<const void>(gain), at<void>(out), at<void>(seen),
                                streams, width, scale};
        perform(Gil::kept, [=](const Isa& isa) { run_correct(isa, task, bf16, rows); });
    });
    m.def("add_to_streams", [](uintptr_t x, uintptr_t y, bool bf16, int64_t rows, int64_t streams, int64_t width, const NormArguments& norm) {
        const StreamSumTask task = {at<void>(x), at<const void>(y), nullptr, 0, streams, width};
        perform(Gil::kept, [=, norm = norm_of(norm)](const Isa& isa) { run_stream_sum(isa, task, norm, bf16, rows); });
    });
    m.def("at_magnitude", [](uintptr_t first, int64_t first_stride, const std::vector<uintptr_t>& others, int64_t others_stride, uintptr_t out, bool bf16, int64_t rows,
                             int64_t width, bool mean) {
        MagnitudeTask task = {at<const void>(first), first_stride, {}, others_stride, at<void>(out), int64_t(others.size()) + 1, width, mean};
        if (task.streams > MAX_STREAMS) throw std::invalid_argument("too many streams");
        std::transform(others.begin(), others.end(), task.others + 1, at<const void>);
        perform(Gil::kept, [=](const Isa& isa) { run_magnitude(isa, task, bf16, rows); });
    });
    m.def("hyper_read", [](uintptr_t x, uintptr_t fn, uintptr_t base, uintptr_t scale, const NormArguments& norm, uintptr_t out, uintptr_t post, uintptr_t comb, bool bf16,
                           int64_t rows, int64_t streams, int64_t width, int64_t iterations, float rms_eps, float eps) {
        const HyperTask task = {at<const void>(x), nullptr, at<const float>(base), at<const float>(scale), nullptr, 0, at<void>(out), at<float>(post), at<float>(comb), streams,
                                width, iterations, rms_eps, eps};
        perform(Gil::kept, [=, norm = norm_of(norm)](const Isa& isa) { run_hyper_read(isa, task, at<const float>(fn), norm, bf16, rows); });
    });
    m.def("hyper_write", [](uintptr_t x, uintptr_t y, uintptr_t post, uintptr_t comb, uintptr_t out, bool bf16, int64_t rows, int64_t streams, int64_t width) {
        const HyperWriteTask task = {at<const void>(x), at<const void>(y), at<const float>(post), at<const float>(comb), at<void>(out), streams, width};
        perform(Gil::kept, [=](const Isa& isa) { run_hyper_write(isa, task, bf16, rows); });
    });
}
