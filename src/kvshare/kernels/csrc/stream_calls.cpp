#include "stream_calls.h"

#include <algorithm>

#include "over.h"

namespace kvshare {

void run_predict(const Isa& isa, const AltUpTask& task, bool bf16, int64_t rows) {
    over(rows, task.streams * task.width, [&](int64_t begin, int64_t end) { isa.small.streams.predict(task, bf16, begin, end); });
}

void run_correct(const Isa& isa, const AltUpTask& task, bool bf16, int64_t rows) {
    over(rows, task.streams * task.width, [&](int64_t begin, int64_t end) { isa.small.streams.correct(task, bf16, begin, end); });
}

static thread_local std::vector<float> kept_factors, kept_products;

void run_stream_sum(const Isa& isa, StreamSumTask task, const Norm& norm, bool bf16, int64_t rows) {
    task.weight = factors(norm, task.width, kept_factors);
    task.eps = norm.eps;
    over(rows, task.streams * task.width, [&](int64_t begin, int64_t end) { isa.small.streams.add(task, bf16, begin, end); });
}

void run_magnitude(const Isa& isa, const MagnitudeTask& task, bool bf16, int64_t rows) {
    over(rows, task.streams * task.width, [&](int64_t begin, int64_t end) { isa.small.streams.magnitude(task, bf16, begin, end); });
}

void run_hyper_read(const Isa& isa, HyperTask task, const float* fn, const Norm& norm, bool bf16, int64_t rows) {
    const int64_t n = task.streams, weights = task.comb ? (2 + n) * n : n, length = n * task.width, size = bf16 ? 2 : 4;
    kept_products.resize(size_t(rows * (weights + 1)));
    float* products = kept_products.data();
    task.weight = factors(norm, task.width, kept_factors);
    task.norm_eps = norm.eps;
    task.projected = products;
    over(weights + 1, rows * length, [&](int64_t begin, int64_t end) {
        constexpr int64_t CACHED = 4;  // weights that stay in a thread's cache while all rows pass
        for (int64_t first = begin; first < end; first += CACHED)
            for (int64_t row = 0; row < rows; row++) {
                const void* x = static_cast<const uint8_t*>(task.x) + row * length * size;
                isa.small.streams.project(x, bf16, fn, weights, length, products + row * (weights + 1), first, std::min(first + CACHED, end));
            }
    });
    over(rows, length, [&](int64_t begin, int64_t end) { isa.small.streams.read(task, bf16, begin, end); });
}

void run_hyper_write(const Isa& isa, const HyperWriteTask& task, bool bf16, int64_t rows) {
    over(rows, task.streams * task.width, [&](int64_t begin, int64_t end) { isa.small.streams.write(task, bf16, begin, end); });
}

}  // namespace kvshare
