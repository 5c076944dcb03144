// What Python sees. Tensors are passed as addresses: their owners (kvshare.kernels) check dtypes and shapes, and keep them alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <stdexcept>
#include <tuple>

#include "address.h"
#include "kernels.h"
#include "program.h"
#include "quantized_weight.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

void bind_blocks(nb::module_& m);
void bind_paged_attention(nb::module_& m);
void bind_tile_attention(nb::module_& m);
void bind_row_selection(nb::module_& m);
void bind_small_ops(nb::module_& m);
void bind_streams(nb::module_& m);
void bind_recurrent(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_program(nb::module_& m);
void bind_read_memory(nb::module_& m);
void bind_sampling(nb::module_& m);

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // a model that a script still holds when it ends is no leak
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

    m.def("isa", [] { return active_isa().name; });
    m.def("use_isa", [](const char* name) { return use_isa(name); });
    m.def("num_threads", [] {  // that a parallel region of this module gets
        int count = 0;
#pragma omp parallel
#pragma omp single
        count = omp_get_num_threads();
        return count;
    });
    nb::class_<QuantizedWeight>(m, "QuantizedWeight")
        .def("__init__",
             [](QuantizedWeight* self, const std::vector<std::tuple<uintptr_t, int64_t, BlockType, bool>>& segments, int64_t in_features, int activation_bytes) {
                 std::vector<Segment> all;
                 for (const auto& [address, count, type, interleaved] : segments) all.push_back({at<const uint8_t>(address), count, type, interleaved});
                 new (self) QuantizedWeight(std::move(all), in_features, activation_bytes);
             }, "segments"_a, "in_features"_a, "activation_bytes"_a)
        .def_prop_ro("in_features", &QuantizedWeight::in_features)
        .def_prop_ro("out_features", &QuantizedWeight::out_features)
        .def_prop_ro("bytes", &QuantizedWeight::bytes)
        .def("multiply",
             [](nb::pointer_and_handle<QuantizedWeight> self, uintptr_t x, bool x_bf16, uintptr_t out, bool out_bf16, int64_t rows, int64_t begin, int64_t end) {
                 perform(Gil::released, [weight = self.p, kept = nb::borrow(self.h), x, x_bf16, out, out_bf16, rows, begin, end](const Isa& isa) {
                     weight->multiply(isa, at<const void>(x), x_bf16, at<void>(out), out_bf16, rows, begin, end);
                 }, Work::product, {{}, [weight = self.p, begin, end](int thread, int threads) { return weight->first_read(begin, end, thread, threads); }});
             })
        .def("decode", [](nb::pointer_and_handle<QuantizedWeight> self, int64_t begin, int64_t end, uintptr_t to, bool bf16) {
            perform(Gil::released, [weight = self.p, kept = nb::borrow(self.h), begin, end, to, bf16](const Isa& isa) {
                weight->decode(isa, begin, end, at<void>(to), bf16);
            }, Work::product);
        });
    bind_blocks(m);
    bind_paged_attention(m);
    bind_tile_attention(m);
    bind_row_selection(m);
    bind_small_ops(m);
    bind_streams(m);
    bind_recurrent(m);
    bind_experts(m);
    bind_program(m);
    bind_read_memory(m);
    bind_sampling(m);
}
