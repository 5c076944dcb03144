#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "address.h"
#include "norm_arguments.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

void bind_small_ops(nb::module_& m) {
    m.def("heads",
          [](uintptr_t x, uintptr_t out, bool bf16, int64_t rows, int64_t row_stride, int64_t heads, int64_t head_stride, int64_t width, const NormArguments& norm,
             uintptr_t cos, uintptr_t sin, bool precise, int64_t pairs, bool interleaved) {
              const HeadsTask task = {at<const void>(x), at<void>(out), row_stride, head_stride, heads, width, nullptr, 0, at<const void>(cos), at<const void>(sin),
                                      precise, pairs, interleaved};
              perform(Gil::kept, [=, norm = norm_of(norm)](const Isa& isa) { run_heads(isa, task, norm, bf16, rows); });
          });
    m.def("sum",
          [](uintptr_t x, uintptr_t y, uintptr_t total, uintptr_t normed, bool bf16, int64_t rows, int64_t width, const NormArguments& of_y, const NormArguments& of_sum,
             uintptr_t scale, float factor) {
              const SumTask task = {at<const void>(x), at<const void>(y), at<void>(total), at<void>(normed), width, nullptr, nullptr, 0, 0, factor};
              perform(Gil::kept, [=, of_y = norm_of(of_y), of_sum = norm_of(of_sum)](const Isa& isa) { run_sum(isa, task, of_y, of_sum, at<const void>(scale), bf16, rows); });
          });
    m.def("cap", [](uintptr_t x, int64_t count, float cap) {
        perform(Gil::kept, [=](const Isa& isa) { run_cap(isa, at<float>(x), count, cap); });
    });
    m.def("append_rows", [](uintptr_t spans, int64_t num_spans, uintptr_t arena, int64_t page_bytes, int64_t table, int64_t row_bytes, int64_t rows_per_page, uintptr_t values,
                            int64_t stride_bytes) {
        perform(Gil::kept, {at<const StepSpan>(spans), num_spans}, [=](const Isa&, const StepSpans& step) {
            append_rows(at<uint8_t>(arena), page_bytes, step, {table, row_bytes, rows_per_page, at<const uint8_t>(values), stride_bytes});
        });
    });
}
