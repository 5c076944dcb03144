// Layers with states, and products by groups, as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "address.h"
#include "norm_arguments.h"
#include "program.h"
#include "recurrent_calls.h"

namespace nb = nanobind;
using namespace kvshare;

using Place = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;      // arena, page bytes, run, begin, end
using Rows = std::tuple<uintptr_t, int64_t>;                                  // address, stride in numbers
using Turn = std::tuple<uintptr_t, uintptr_t, int64_t>;                       // cosines, sines, pairs
using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;               // address, strides of rows and heads in numbers, width
using Pair = std::tuple<uintptr_t, uintptr_t>;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // half, taps, grouped taps, query heads, KV heads, width

static StatePlace place_of(const Place& given) {
    const auto& [arena, page_bytes, run, begin, end] = given;
    return {at<uint8_t>(arena), page_bytes, run, begin, end};
}

void bind_recurrent(nb::module_& m) {
    m.attr("WIDEST_UNIT") = WIDEST_UNIT;
    m.def("compressor", [](uintptr_t spans, int64_t num_spans, const Place& values, const Place& gates, bool bf16, const Rows& x, const Rows& gate, uintptr_t place_bias,
                           int64_t ratio, int64_t width, bool overlap, const NormArguments& norm, const Turn& turn, uintptr_t out) {
        const CompressorTask task = {place_of(values), place_of(gates), at<const void>(std::get<0>(x)), at<const void>(std::get<0>(gate)), std::get<1>(x), std::get<1>(gate),
                                     at<const float>(place_bias), ratio, width, overlap, at<const void>(std::get<0>(turn)), at<const void>(std::get<1>(turn)), std::get<2>(turn), at<void>(out)};
        perform(Gil::kept, {at<const StepSpan>(spans), num_spans}, [=, norm = norm_of(norm)](const Isa& isa, const StepSpans& step) { run_compressor(isa, step, task, norm, bf16); });
    });
    m.def("cca", [](uintptr_t spans, int64_t num_spans, const Place& conv, const Place& delayed, bool state_bf16, bool bf16, uintptr_t x, const Shape& shape, const Pair& depthwise,
                    const Pair& grouped, uintptr_t temperature, uintptr_t first_delayed, uintptr_t heads, uintptr_t values) {
        const auto& [half, taps, grouped_taps, query_heads, kv_heads, width] = shape;
        const CcaTask task = {place_of(conv), place_of(delayed), state_bf16, at<const void>(x), half, taps, grouped_taps, query_heads, kv_heads, width,
                              at<const void>(std::get<0>(depthwise)), at<const void>(std::get<1>(depthwise)), at<const void>(std::get<0>(grouped)), at<const void>(std::get<1>(grouped)),
                              at<const void>(temperature), at<const void>(first_delayed), at<void>(heads), at<void>(values)};
        perform(Gil::kept, {at<const StepSpan>(spans), num_spans}, [=](const Isa& isa, const StepSpans& step) { run_cca(isa, step, task, bf16); });
    });
    m.def("spread", [](uintptr_t x, int64_t x_row, int64_t x_group, uintptr_t weights, int64_t weights_group, uintptr_t out, int64_t out_row, int64_t out_group, bool bf16, int64_t rows,
                       int64_t groups, int64_t inputs, int64_t outputs) {
        const SpreadTask task = {at<const void>(x), x_row, x_group, at<const void>(weights), weights_group, nullptr, at<void>(out), out_row, out_group, rows, inputs, outputs};
        perform(Gil::kept, [=](const Isa& isa) { run_spread(isa, task, groups, bf16); }, Work::product);
    });
    m.def("multiply_groups", [](nb::pointer_and_handle<QuantizedWeight> weight, uintptr_t x, int64_t x_row, int64_t x_group, bool bf16, int64_t rows, int64_t groups, int64_t first,
                                int64_t step, int64_t outputs, uintptr_t out) {
        const GroupsTask task = {at<const void>(x), x_row, x_group, rows, groups, first, step, outputs, at<void>(out)};
        perform(Gil::kept, [=, weight = weight.p, kept = nb::borrow(weight.h)](const Isa& isa) { run_groups(isa, *weight, task, bf16); }, Work::product);
    });
    m.def("channels", [](uintptr_t x, bool gelu, uintptr_t weight, float factor, uintptr_t y, uintptr_t out, bool bf16, int64_t rows, int64_t width) {
        const ChannelsTask task = {at<const void>(x), at<const void>(weight), at<const void>(y), at<void>(out), width, factor, gelu};
        perform(Gil::kept, [=](const Isa& isa) { run_channels(isa, task, bf16, rows); });
    });
    m.def("block_starts", [](uintptr_t positions, int64_t count, int64_t ratio, uintptr_t out) {
        perform(Gil::kept, [=](const Isa&) {
            for (int64_t i = 0; i < count; i++) at<int64_t>(out)[i] = at<const int64_t>(positions)[i] / ratio * ratio;
        });
    });
    m.def("join", [](const std::vector<Heads>& parts, uintptr_t out, int64_t size, int64_t rows, int64_t heads) {
        perform(Gil::kept, [=](const Isa&) {
            uint8_t* to = at<uint8_t>(out);
            for (int64_t i = 0; i < rows * heads; i++)
                for (const auto& [x, row, head, width] : parts) {
                    memcpy(to, at<const uint8_t>(x) + (i / heads * row + i % heads * head) * size, size_t(width * size));
                    to += width * size;
                }
        });
    });
    m.def("layer_norm", [](const Rows& x, uintptr_t weight, uintptr_t bias, float eps, uintptr_t out, bool bf16, int64_t rows, int64_t width) {
        const LayerNormTask task = {at<const void>(std::get<0>(x)), at<const void>(weight), at<const void>(bias), std::get<1>(x), at<void>(out), width, eps};
        perform(Gil::kept, [=](const Isa& isa) { run_layer_norm(isa, task, bf16, rows); });
    });
    m.def("scaled_residual", [](uintptr_t x, uintptr_t residual, const Pair& of_x, const Pair& of_residual, uintptr_t total, uintptr_t rounded, bool bf16, int64_t rows, int64_t width) {
        const ResidualTask task = {at<const void>(x), at<const float>(residual), at<const float>(std::get<0>(of_x)), at<const float>(std::get<1>(of_x)),
                                   at<const float>(std::get<0>(of_residual)), at<const float>(std::get<1>(of_residual)), at<float>(total), at<void>(rounded), width};
        perform(Gil::kept, [=](const Isa& isa) { run_residual(isa, task, bf16, rows); });
    });
}
