// Attention of many queries over pages, as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "address.h"
#include "program.h"
#include "tile_attention.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

using Stream = std::tuple<StreamShape, StreamShape, bool, int64_t, int64_t, int64_t>;              // keys, values, same, tokens a row, window, behind
using Rows = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t>;               // pages and first page of keys and of values, chosen rows
using Tables = std::tuple<int64_t, int64_t, uintptr_t, int64_t>;  // of keys and of values, chosen rows
using Span = std::tuple<int64_t, int64_t, std::vector<Rows>>;                                      // start, count

void bind_tile_attention(nb::module_& m) {
    nb::class_<TileAttention>(m, "TileAttention")
        .def("__init__",
             [](TileAttention* self, uintptr_t arena, int64_t page_bytes, const std::vector<Stream>& streams, int kv_heads, bool rebuilds) {
                 std::vector<TileStream> all;
                 for (const auto& [k, v, same, tokens_per_row, window, behind] : streams) all.push_back({k, v, same, tokens_per_row, window, behind});
                 new (self) TileAttention(at<const uint8_t>(arena), page_bytes, std::move(all), kv_heads, rebuilds);
             }, "arena"_a, "page_bytes"_a, "streams"_a, "kv_heads"_a, "rebuilds"_a)
        .def("attend",
             [](const TileAttention& self, uintptr_t q, uintptr_t out, uintptr_t positions, int query_heads, const std::vector<Span>& spans, float scale, float softcap,
                uintptr_t sinks, const std::tuple<uintptr_t, uintptr_t, uintptr_t, int>& rebuild) {
                 std::vector<TileSpan> all;
                 for (const auto& [start, count, rows] : spans) {
                     all.push_back({start, count, {}});
                     for (const auto& [k, k_first, v, v_first, chosen, num_chosen] : rows)
                         all.back().rows.push_back({at<const int32_t>(k), k_first, at<const int32_t>(v), v_first, at<const int64_t>(chosen), num_chosen});
                 }
                 const auto& [weight, cos, sin, moving] = rebuild;
                 not_recorded("attention by tiles");
                 nb::gil_scoped_release released;
                 const Timed timer(Work::attention);
                 self.attend(active_isa(), at<const uint16_t>(q), at<uint16_t>(out), at<const int64_t>(positions), query_heads, all, scale, softcap,
                             at<const float>(sinks), {at<const uint16_t>(weight), at<const uint16_t>(cos), at<const uint16_t>(sin), moving});
             })
        .def("attend_singles", [](nb::pointer_and_handle<TileAttention> self, uintptr_t spans, int64_t num_spans, uintptr_t q, uintptr_t out, int query_heads,
                                  const std::vector<Tables>& kinds, float scale, float softcap, uintptr_t sinks, const std::tuple<uintptr_t, uintptr_t, uintptr_t, int>& rebuild) {
            std::vector<TileAttention::Tables> all;
            for (const auto& [keys, values, chosen, num_chosen] : kinds) all.push_back({keys, values, at<const int64_t>(chosen), num_chosen});
            const auto& [weight, cos, sin, moving] = rebuild;
            const KeyRebuild keys = {at<const uint16_t>(weight), at<const uint16_t>(cos), at<const uint16_t>(sin), moving};
            perform(Gil::released, {at<const StepSpan>(spans), num_spans},
                    [kernel = self.p, kept = nb::borrow(self.h), q, out, query_heads, all, scale, softcap, sinks, keys](const Isa& isa, const StepSpans& step) {
                        kernel->attend_singles(isa, at<const uint16_t>(q), at<uint16_t>(out), query_heads, step, all, scale, softcap, at<const float>(sinks), keys);
                    }, Work::attention);
        });
}
