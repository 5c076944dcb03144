// Quantizing weights: rows of numbers as blocks.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

void bind_encode(nb::module_& m) {
    m.def("encode", [](BlockType type, uintptr_t numbers, bool bf16, int64_t rows, int64_t k, uintptr_t to) {
        const BlockShape shape = shape_of(type);
        if (type != BlockType::Q8_0 && type != BlockType::Q4_1 && type != BlockType::Q4_K) throw std::invalid_argument("nothing encodes this type");
        if (k % shape.weights) throw std::invalid_argument("the numbers of a row are not whole blocks");
        nb::gil_scoped_release released;
        const Isa& isa = active_isa();
#pragma omp parallel for schedule(dynamic)
        for (int64_t r = 0; r < rows; r++)
            isa.encode(type, reinterpret_cast<const uint8_t*>(numbers) + r * k * (bf16 ? 2 : 4), bf16, k,
                       reinterpret_cast<uint8_t*>(to) + r * (k / shape.weights * shape.bytes));
    }, "type"_a, "numbers"_a, "bf16"_a, "rows"_a, "k"_a, "to"_a);
}
