// Attention over pages, and the rows of pages as numbers, as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "address.h"
#include "kernels.h"
#include "paged_attention.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

using Kind = std::tuple<StreamShape, StreamShape, int64_t, int64_t, int64_t, int64_t>;  // keys, values, table of each, window, behind

static constexpr int64_t PARALLEL_HEADS = 64;  // from so many on, threads share them

// One head of a row: what is stored is the head over its balance, rotated.
static void encode(const Isa& isa, const StreamShape& shape, int64_t head, const void* from, bool bf16, uint8_t* to) {
    float x[WIDEST_HEAD], unit = 1;
    for (int i = 0; i < shape.width; i++) {
        const uint32_t bits = bf16 ? uint32_t(static_cast<const uint16_t*>(from)[i]) << 16 : 0;
        if (bf16) memcpy(x + i, &bits, 4);
        else x[i] = static_cast<const float*>(from)[i];
    }
    if (!shape.balance.empty())
        for (int i = 0; i < shape.width; i++) x[i] /= shape.balance[size_t(head * shape.width + i)];
    if (is_leveled(shape.kind)) {  // squares of what is divided by its largest number neither overflow nor vanish
        float largest = 0;
        for (int i = 0; i < shape.width; i++) largest = std::max(largest, std::fabs(x[i]));
        if (largest > 0) unit = largest;
        for (int i = 0; i < shape.width; i++) x[i] /= unit;
    }
    if (shape.rotation) shape.rotation->apply(isa, x);
    isa.rows.encode_head(shape.kind, shape.width, x, unit, to);
}

void bind_paged_attention(nb::module_& m) {
    nb::enum_<RowKind>(m, "RowKind")
        .value("BF16", RowKind::BF16)
        .value("FP32", RowKind::FP32)
        .value("INT8", RowKind::INT8)
        .value("INT9", RowKind::INT9)
        .value("FP8", RowKind::FP8)
        .value("INT4", RowKind::INT4)
        .value("LEVELS4", RowKind::LEVELS4)
        .value("LEVELS3", RowKind::LEVELS3)
        .value("LEVELS2", RowKind::LEVELS2);

    // kinds are passed as numbers from here on: `block_kind` has more of them than the enumeration
    m.def("block_kind", [](int bits, int group, int scale_bytes, int exact, int align) {
        if (group > MOST_GROUP || exact > MOST_EXACT || align > MOST_ALIGN) throw std::invalid_argument("no kernel reads rows of such a form");
        return int(kind_of({bits, group, scale_bytes, exact, align}));
    });
    m.def("head_bytes", [](int kind, int width) { return head_bytes(RowKind(kind), width); });

    // [count, heads] heads of `width` numbers, each row `row_bytes` behind the one before, as numbers to[count, heads, width]
    m.def("decode_rows", [](int number, uintptr_t rows, int64_t row_bytes, int64_t count, int heads, int width, uintptr_t to, bool bf16) {
        not_recorded("rows decoded outside of attention");
        nb::gil_scoped_release released;
        const Isa& isa = active_isa();
        const RowKind kind{number};
        const int64_t size = bf16 ? 2 : 4;
        const auto decode_row = [&](int64_t row) {
            for (int head = 0; head < heads; head++) {
                const uint8_t* from = at<const uint8_t>(rows) + row * row_bytes + head * head_bytes(kind, width);
                isa.rows.decode_heads(kind, width, &from, 1, at<uint8_t>(to) + (row * heads + head) * width * size, width, bf16);
            }
        };
        in_parallel(count * row_bytes > 1 << 16 ? most_threads() : 1, [&](const Share& share) { share.each(count, decode_row); });
    });

    nb::class_<Rotation>(m, "Rotation").def(nb::init<std::vector<float>, std::vector<float>>(), "signs"_a, "matrix"_a);
    nb::class_<StreamShape>(m, "StreamShape")
        .def("__init__",
             [](StreamShape* self, int kind, int width, int64_t row_bytes, int64_t rows_per_page, const Rotation* rotation, std::vector<float> balance) {
                 new (self) StreamShape{RowKind(kind), width, row_bytes, rows_per_page, rotation ? std::optional<Rotation>(*rotation) : std::nullopt, std::move(balance)};
             }, "kind"_a, "width"_a, "row_bytes"_a, "rows_per_page"_a, "rotation"_a.none(), "balance"_a);
    // [count, heads] heads of numbers, bfloat16 or float32, strides in numbers, as the bytes of rows to[count, row_bytes]
    m.def("encode_rows",
          [](nb::pointer_and_handle<StreamShape> given, uintptr_t values, bool bf16, int64_t row_stride, int64_t head_stride, int64_t count, int heads, uintptr_t to) {
              if (given.p->width > WIDEST_HEAD) throw std::invalid_argument("heads of " + std::to_string(given.p->width) + " numbers");
              perform(Gil::released, [shape = given.p, kept = nb::borrow(given.h), values, bf16, row_stride, head_stride, count, heads, to](const Isa& isa) {
                  const int64_t bytes = head_bytes(shape->kind, shape->width);
                  const auto encode_head = [&](int64_t i) {
                      const int64_t place = i / heads * row_stride + i % heads * head_stride;
                      const void* from = bf16 ? static_cast<const void*>(at<const uint16_t>(values) + place) : at<const float>(values) + place;
                      encode(isa, *shape, i % heads, from, bf16, at<uint8_t>(to) + i * bytes);
                  };
                  in_parallel(count * heads >= PARALLEL_HEADS ? most_threads() : 1, [&](const Share& share) { share.each(count * heads, encode_head); });
              });
          });

    nb::class_<PagedAttention>(m, "PagedAttention")
        .def("__init__",
             [](PagedAttention* self, uintptr_t arena, int64_t page_bytes, const std::vector<Kind>& kinds, int kv_heads, bool bf16) {
                 std::vector<AttendedRows> all;
                 for (const auto& [k, v, k_table, v_table, window, behind] : kinds) all.push_back({k, v, k_table, v_table, window, behind});
                 new (self) PagedAttention(at<const uint8_t>(arena), page_bytes, std::move(all), kv_heads, bf16);
             }, "arena"_a, "page_bytes"_a, "kinds"_a, "kv_heads"_a, "bf16"_a)
        .def("attend", [](nb::pointer_and_handle<PagedAttention> self, uintptr_t spans, int64_t num_spans, uintptr_t q, uintptr_t out, int query_heads, float scale,
                          float softcap, uintptr_t sinks) {
            perform(Gil::released, {at<const StepSpan>(spans), num_spans},
                    [kernel = self.p, kept = nb::borrow(self.h), q, out, query_heads, scale, softcap, sinks](const Isa& isa, const StepSpans& step) {
                        kernel->attend(isa, at<const void>(q), at<void>(out), query_heads, step, scale, softcap, at<const float>(sinks));
                    }, Work::attention);
        });
}
