// An indexer's choice of rows, as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "address.h"
#include "program.h"
#include "row_selection.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

void bind_row_selection(nb::module_& m) {
    nb::class_<RowSelection>(m, "RowSelection")
        .def("__init__",
             [](RowSelection* self, uintptr_t arena, int64_t page_bytes, const StreamShape& keys, int64_t tokens_per_row) {
                 new (self) RowSelection(at<const uint8_t>(arena), page_bytes, keys, tokens_per_row);
             }, "arena"_a, "page_bytes"_a, "keys"_a, "tokens_per_row"_a)
        .def("select",
             [](const RowSelection& self, uintptr_t q, uintptr_t weights, uintptr_t positions, int heads,
                const std::vector<std::tuple<int64_t, int64_t, uintptr_t, int64_t>>& spans, int64_t top_k, uintptr_t to) {
                 std::vector<SelectionSpan> all;
                 for (const auto& [start, count, pages, first_page] : spans) all.push_back({start, count, at<const int32_t>(pages), first_page});
                 not_recorded("an indexer's choice of rows");
                 nb::gil_scoped_release released;
                 self.select(active_isa(), at<const uint16_t>(q), at<const float>(weights), at<const int64_t>(positions), heads, all, top_k, at<int64_t>(to));
             })
        .def("select_singles", [](nb::pointer_and_handle<RowSelection> self, uintptr_t spans, int64_t num_spans, uintptr_t q, uintptr_t weights, bool weights_bf16, float scale, int heads,
                                  int64_t table, int64_t top_k, uintptr_t to) {
            perform(Gil::released, {at<const StepSpan>(spans), num_spans}, [=, kernel = self.p, kept = nb::borrow(self.h)](const Isa& isa, const StepSpans& step) {
                kernel->select_singles(isa, at<const uint16_t>(q), at<const void>(weights), weights_bf16, scale, heads, step, table, top_k, at<int64_t>(to));
            }, Work::attention);
        });
}
