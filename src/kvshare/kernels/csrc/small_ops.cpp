#include "small_ops_calls.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "over.h"

namespace kvshare {

static float widened(uint16_t number) {
    const uint32_t bits = uint32_t(number) << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

const float* factors(const Norm& norm, int64_t width, std::vector<float>& kept) {
    if (norm.eps < 0) return nullptr;
    kept.assign(size_t(width), 1.0f);
    if (!norm.weight) return kept.data();
    for (int64_t i = 0; i < width; i++) {
        kept[size_t(i)] = norm.offset + (norm.bf16 ? widened(static_cast<const uint16_t*>(norm.weight)[i]) : static_cast<const float*>(norm.weight)[i]);
    }
    return kept.data();
}

static thread_local std::vector<float> first_factors, second_factors;

void run_heads(const Isa& isa, HeadsTask task, const Norm& norm, bool bf16, int64_t rows) {
    task.weight = factors(norm, task.width, first_factors);
    task.eps = norm.eps;
    over(rows, task.heads * task.width, [&](int64_t begin, int64_t end) { isa.small.heads(task, bf16, begin, end); });
}

void run_sum(const Isa& isa, SumTask task, const Norm& of_y, const Norm& of_sum, const void* scale, bool bf16, int64_t rows) {
    task.y_weight = factors(of_y, task.width, first_factors);
    task.weight = factors(of_sum, task.width, second_factors);
    task.y_eps = of_y.eps;
    task.eps = of_sum.eps;
    if (scale) task.scale = bf16 ? widened(*static_cast<const uint16_t*>(scale)) : *static_cast<const float*>(scale);
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.sum(task, bf16, begin, end); });
}

void run_gate(const Isa& isa, const GateTask& task, bool bf16, int64_t rows) {
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.gate(task, bf16, begin, end); });
}

void run_cap(const Isa& isa, float* x, int64_t count, float cap) {
    over(count, 1, [&](int64_t begin, int64_t end) { isa.small.cap(x + begin, end - begin, cap); });
}

void run_softplus(const Isa& isa, const SoftplusTask& task, bool bf16, int64_t rows) {
    over(rows, task.heads * task.width, [&](int64_t begin, int64_t end) { isa.small.softplus(task, bf16, begin, end); });
}

void run_route(const Isa& isa, const RouteTask& task, int64_t rows) { isa.small.route(task, 0, rows); }

void append_rows(uint8_t* arena, int64_t page_bytes, const StepSpans& step, const RowsToAppend& rows) {
    const uint8_t* from = rows.values;
    for (const StepSpan& span : step) {
        const PageRun& run = span.runs[rows.table];
        run.check(span.first, span.first + span.count, rows.rows_per_page);
        for (int64_t row = span.first; row < span.first + span.count; row++, from += rows.stride_bytes) {
            const int64_t page = run.pages[row / rows.rows_per_page - run.first_page];
            memcpy(arena + page * page_bytes + row % rows.rows_per_page * rows.row_bytes, from, size_t(rows.row_bytes));
        }
    }
}

}  // namespace kvshare
