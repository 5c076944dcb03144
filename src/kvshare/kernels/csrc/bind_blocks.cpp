// Blocks of weights: rows of numbers encoded, and rows decoded that lie far from each other.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "address.h"
#include "kernels.h"
#include "program.h"
#include "small_ops_calls.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvshare;

namespace {

#include "interleave.h"

int64_t blocks_in(BlockType type, int64_t numbers) {
    const int64_t each = shape_of(type).weights;
    if (numbers < 0 || numbers % each) throw std::invalid_argument("the numbers are not whole blocks");
    return numbers / each;
}

}  // namespace

void bind_blocks(nb::module_& m) {
    m.def("encode", [](BlockType type, uintptr_t numbers, bool bf16, int64_t rows, int64_t k, uintptr_t to) {
        if (type != BlockType::Q8_0 && type != BlockType::Q4_1 && type != BlockType::Q4_K) throw std::invalid_argument("nothing encodes this type");
        const int64_t row_bytes = blocks_in(type, k) * shape_of(type).bytes;
        not_recorded("encoding weights");
        nb::gil_scoped_release released;
        const Isa& isa = active_isa();
        in_turn(rows, [&](int64_t r) {
            isa.products.encode(type, reinterpret_cast<const uint8_t*>(numbers) + r * k * (bf16 ? 2 : 4), bf16, k, reinterpret_cast<uint8_t*>(to) + r * row_bytes);
        });
    }, "type"_a, "numbers"_a, "bf16"_a, "rows"_a, "k"_a, "to"_a);

    // Rows of the file interleaved by sixteens; those behind the last whole strip are copied as they are.
    m.def("interleave", [](BlockType type, uintptr_t from, int64_t rows, int64_t k, uintptr_t to) {
        not_recorded("weights interleaved");
        const int64_t blocks = blocks_in(type, k), row_bytes = blocks * shape_of(type).bytes, strips = rows / STRIP;
        const uint8_t* source = reinterpret_cast<const uint8_t*>(from);
        uint8_t* strip = reinterpret_cast<uint8_t*>(to);
        nb::gil_scoped_release released;
        with_format(type, [&]<BlockType T>() {
            in_turn(strips, [&](int64_t i) { strip_of_rows<T>(source + i * STRIP * row_bytes, blocks, strip + i * STRIP * row_bytes); });
        });
        const int64_t done = strips * STRIP * row_bytes;
        memcpy(strip + done, source + done, size_t(rows * row_bytes - done));
    }, "type"_a, "from"_a, "rows"_a, "k"_a, "to"_a);

    // Numbers begin ... end - 1 of the rows of a table of `entries` rows of k numbers that `indices` name, times `scale`.
    m.def("decode_block_rows", [](BlockType type, uintptr_t table, bool interleaved, int64_t entries, int64_t k, uintptr_t indices, int64_t count, int64_t begin,
                            int64_t end, uintptr_t to, bool bf16, float scale) {
        const int64_t bytes = shape_of(type).bytes, blocks = blocks_in(type, k), row_bytes = blocks * bytes, offset = blocks_in(type, begin) * bytes;
        const int64_t width = end - begin, in_strips = interleaved ? entries / STRIP * STRIP : 0;
        if (blocks_in(type, width) * bytes + offset > row_bytes) throw std::invalid_argument("the columns reach behind the row");
        perform(Gil::released, [=](const Isa& isa) {
            const auto* row = reinterpret_cast<const int64_t*>(indices);
            check_rows(row, count, entries);
            const GatherTask scaled = {at<const void>(to), bf16, width, width, nullptr, at<void>(to), scale};
            const auto decode_row = [&](int64_t i) {
                static thread_local Scratch scratch;
                const uint8_t* from = reinterpret_cast<const uint8_t*>(table) + row[i] * row_bytes;
                if (row[i] < in_strips) {
                    const int64_t lane = row[i] % STRIP;
                    uint8_t* room = scratch.room(row_bytes);
                    with_format(type, [&]<BlockType T>() { rows_of_strip<T>(from - lane * row_bytes, blocks, lane, lane + 1, room); });
                    from = room;
                }
                isa.products.decode({type, false, from + offset, 0, 1}, width, reinterpret_cast<uint8_t*>(to) + i * width * (bf16 ? 2 : 4), bf16);
                if (scale != 1) isa.small.edges.gather(scaled, bf16, i, i + 1);
            };
            in_parallel(count > 8 ? most_threads() : 1, [&](const Share& share) { share.each(count, decode_row); });
        });
    }, "type"_a, "table"_a, "interleaved"_a, "entries"_a, "k"_a, "indices"_a, "count"_a, "begin"_a, "end"_a, "to"_a, "bf16"_a, "scale"_a);

    // Ask the system for the pages of some rows of a mapped table, without waiting for them.
    m.def("prefetch_rows", [](uintptr_t table, int64_t row_bytes, uintptr_t indices, int64_t count) {
        perform(Gil::released, [=](const Isa&) {
#ifdef MADV_WILLNEED
            const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
            for (int64_t i = 0; i < count; i++) {
                const uintptr_t row = table + uintptr_t(at<const int64_t>(indices)[i] * row_bytes), begin = row / page * page;
                madvise(at<void>(begin), row + uintptr_t(row_bytes) - begin, MADV_WILLNEED);  // only advice: whether it is taken is not looked at
            }
#else
            (void)table, (void)row_bytes, (void)indices, (void)count;
#endif
        });
    }, "table"_a, "row_bytes"_a, "indices"_a, "count"_a);
}
