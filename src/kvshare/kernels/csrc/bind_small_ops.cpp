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
              const Norm own = norm_of(norm);
              const Reads reads = {{run_of(own, width), run_of(task.cos, rows * pairs, bf16 && !precise), run_of(task.sin, rows * pairs, bf16 && !precise)}, {}};
              perform(Gil::kept, [=](const Isa& isa) { run_heads(isa, task, own, bf16, rows); }, Work::small, reads);
          });
    m.def("sum",
          [](uintptr_t x, uintptr_t y, uintptr_t total, uintptr_t normed, bool bf16, int64_t rows, int64_t width, const NormArguments& of_y, const NormArguments& of_sum,
             uintptr_t scale, float factor) {
              const SumTask task = {at<const void>(x), at<const void>(y), at<void>(total), at<void>(normed), width, nullptr, nullptr, 0, 0, factor};
              const Norm y_norm = norm_of(of_y), norm = norm_of(of_sum);
              const Reads reads = {{run_of(y_norm, width), run_of(norm, width), run_of(at<const void>(scale), 1, bf16)}, {}};
              perform(Gil::kept, [=](const Isa& isa) { run_sum(isa, task, y_norm, norm, at<const void>(scale), bf16, rows); }, Work::small, reads);
          });
    m.def("affine", [](uintptr_t x, bool bf16, int64_t rows, int64_t width, uintptr_t bias, float factor) {
        const AffineTask task = {at<void>(x), at<const void>(bias), width, factor};
        perform(Gil::kept, [=](const Isa& isa) { run_affine(isa, task, bf16, rows); });
    });
    m.def("turns", [](uintptr_t positions, int64_t rows, uintptr_t inverse, int64_t pairs, float factor, uintptr_t cos, uintptr_t sin, bool bf16) {
        const TurnTask task = {at<const int64_t>(positions), at<const float>(inverse), pairs, factor, at<void>(cos), at<void>(sin)};
        perform(Gil::kept, [=](const Isa& isa) { run_turn(isa, task, bf16, rows); });
    });
    m.def("gather_rows", [](uintptr_t table, bool table_bf16, int64_t entries, int64_t stride, int64_t begin, int64_t width, uintptr_t rows, int64_t count, uintptr_t out, bool bf16,
                            float scale) {
        const GatherTask task = {at<const uint8_t>(table) + begin * (table_bf16 ? 2 : 4), table_bf16, stride, width, at<const int64_t>(rows), at<void>(out), scale};
        perform(Gil::released, [=](const Isa& isa) { run_gather(isa, task, bf16, count, entries); });  // a mapped table may have to be read from disk
    });
    m.def("rows_or_first", [](uintptr_t rows, uintptr_t out, int64_t count, int64_t entries) {
        perform(Gil::kept, [=](const Isa&) {
            for (int64_t i = 0; i < count; i++) at<int64_t>(out)[i] = at<const int64_t>(rows)[i] < entries ? at<const int64_t>(rows)[i] : 0;
        });
    });
    m.def("argmax", [](uintptr_t x, int64_t count) {
        not_recorded("an index that depends on what tensors contain");
        return argmax(active_isa(), at<const float>(x), count);
    });
    m.def("cap", [](uintptr_t x, int64_t count, float cap) {
        perform(Gil::kept, [=](const Isa& isa) { run_cap(isa, at<float>(x), count, cap); });
    });
    m.def("append_rows", [](uintptr_t spans, int64_t num_spans, uintptr_t arena, int64_t page_bytes, int64_t table, int64_t row_bytes, int64_t rows_per_page, uintptr_t values,
                            int64_t stride_bytes, int64_t tokens_per_row) {
        perform(Gil::kept, {at<const StepSpan>(spans), num_spans}, [=](const Isa&, const StepSpans& step) {
            append_rows(at<uint8_t>(arena), page_bytes, step, {table, row_bytes, rows_per_page, at<const uint8_t>(values), stride_bytes, tokens_per_row});
        });
    });
}
