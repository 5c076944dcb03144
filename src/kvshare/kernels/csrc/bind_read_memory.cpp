#include <nanobind/nanobind.h>

#include <atomic>
#include <stdexcept>

#include "address.h"
#include "kernels.h"
#include "team.h"

namespace nb = nanobind;
using namespace kvshare;

// Every thread reads a piece of its own, of whole blocks.
void bind_read_memory(nb::module_& m) {
    m.def("read_memory", [](uintptr_t from, int64_t bytes, int streams, int64_t run, int64_t ahead) {
        if ((streams != 1 && streams != 4 && streams != 8 && streams != 16) || run <= 0 || run % 64) throw std::invalid_argument("no such pattern");
        nb::gil_scoped_release released;
        const int64_t blocks = bytes / (streams * run);
        if (blocks * streams * run != bytes) throw std::invalid_argument("the memory is not whole blocks");
        std::atomic<uint64_t> total{0};
        in_parallel(most_threads(), [&](const Share& share) {
            const int64_t first = blocks * share.index / share.count, last = blocks * (share.index + 1) / share.count;
            total += active_isa().read_memory(at<const uint8_t>(from) + first * streams * run, (last - first) * streams * run, streams, run, ahead);
        });
        return total.load();
    });
}
