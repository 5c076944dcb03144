// What Python sees. Tensors are passed as addresses: their owners (kvshare.kernels) check dtypes and shapes, and keep them alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <stdexcept>
#include <tuple>

#include "kernels.h"
#include "paged_attention.h"
#include "quantized_weight.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

static const Isa* active = best_isa();

template <typename T>
static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

NB_MODULE(_kernels, m) {
    nb::enum_<BlockType>(m, "BlockType")
        .value("BF16", BlockType::BF16)
        .value("Q4_0", BlockType::Q4_0)
        .value("Q4_1", BlockType::Q4_1)
        .value("Q5_0", BlockType::Q5_0)
        .value("Q5_1", BlockType::Q5_1)
        .value("Q8_0", BlockType::Q8_0)
        .value("Q4_K", BlockType::Q4_K)
        .value("Q5_K", BlockType::Q5_K)
        .value("Q6_K", BlockType::Q6_K);

    m.def("isa", [] { return active->name; });
    m.def("use_isa", [](const char* name) {
        const Isa* isa = isa_named(name);
        if (isa) active = isa;
        return isa != nullptr;
    });
    m.def("num_threads", [] {  // that a parallel region of this module gets
        int count = 0;
#pragma omp parallel
#pragma omp single
        count = omp_get_num_threads();
        return count;
    });
    nb::class_<QuantizedWeight>(m, "QuantizedWeight")
        .def("__init__",
             [](QuantizedWeight* self, const std::vector<std::tuple<uintptr_t, int64_t, BlockType>>& segments, int64_t in_features) {
                 std::vector<Segment> all;
                 for (const auto& [address, count, type] : segments) all.push_back({at<const uint8_t>(address), count, type});
                 new (self) QuantizedWeight(std::move(all), in_features);
             }, "segments"_a, "in_features"_a)
        .def_prop_ro("in_features", &QuantizedWeight::in_features)
        .def_prop_ro("out_features", &QuantizedWeight::out_features)
        .def_prop_ro("bytes", &QuantizedWeight::bytes)
        .def("multiply",
             [](const QuantizedWeight& self, uintptr_t x, uintptr_t out, bool bf16, int64_t rows, int64_t begin, int64_t end) {
                 nb::gil_scoped_release released;
                 self.multiply(*active, at<const void>(x), at<void>(out), bf16, rows, begin, end);
             })
        .def("decode", [](const QuantizedWeight& self, int64_t begin, int64_t end, uintptr_t to, bool bf16) {
            nb::gil_scoped_release released;
            self.decode(*active, begin, end, at<void>(to), bf16);
        });

    nb::class_<PagedAttention>(m, "PagedAttention")
        .def("__init__",
             [](PagedAttention* self, uintptr_t arena, int64_t page_bytes, std::tuple<int64_t, int64_t, int> k, std::tuple<int64_t, int64_t, int> v, int kv_heads,
                bool bf16) {
                 new (self) PagedAttention(at<const uint8_t>(arena), page_bytes, {std::get<0>(k), std::get<1>(k), std::get<2>(k)},
                                           {std::get<0>(v), std::get<1>(v), std::get<2>(v)}, kv_heads, bf16);
             }, "arena"_a, "page_bytes"_a, "k"_a, "v"_a, "kv_heads"_a, "bf16"_a)
        .def("attend",
             [](const PagedAttention& self, uintptr_t q, uintptr_t out, int query_heads,
                const std::vector<std::tuple<int64_t, int64_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t>>& queries, float scale, float softcap, uintptr_t sinks) {
                 std::vector<Query> all;
                 for (const auto& [row, first, end, k, k_first, v, v_first] : queries)
                     all.push_back({row, first, end, at<const int32_t>(k), k_first, at<const int32_t>(v), v_first});
                 nb::gil_scoped_release released;
                 self.attend(*active, at<const void>(q), at<void>(out), query_heads, all, scale, softcap, at<const float>(sinks));
             });
}
