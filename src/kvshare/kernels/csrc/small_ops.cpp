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

void run_affine(const Isa& isa, const AffineTask& task, bool bf16, int64_t rows) {
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.affine(task, bf16, begin, end); });
}

void run_turn(const Isa& isa, const TurnTask& task, bool bf16, int64_t rows) {
    over(rows, 8 * task.pairs, [&](int64_t begin, int64_t end) { isa.small.edges.turn(task, bf16, begin, end); });
}

void check_rows(const int64_t* rows, int64_t count, int64_t entries) {
    for (int64_t i = 0; i < count; i++)
        if (rows[i] < 0 || rows[i] >= entries) throw std::out_of_range("row " + std::to_string(rows[i]) + " of a table of " + std::to_string(entries));
}

void run_gather(const Isa& isa, const GatherTask& task, bool bf16, int64_t rows, int64_t entries) {
    if (task.rows) check_rows(task.rows, rows, entries);
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.edges.gather(task, bf16, begin, end); });
}

int64_t argmax(const Isa& isa, const float* x, int64_t count) {
    constexpr int64_t PART = 4096;
    static thread_local std::vector<float> of_parts;  // the largest of each
    of_parts.resize(size_t((count + PART - 1) / PART));
    float* most = of_parts.data();
    const int64_t parts = int64_t(of_parts.size());
    over(parts, PART, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) most[i] = isa.small.edges.largest(x + i * PART, std::min(PART, count - i * PART));
    });
    const int64_t part = std::max_element(most, most + parts) - most, first = part * PART;
    return first + isa.small.edges.first_of(x + first, std::min(PART, count - first), most[part]);
}

void run_softplus(const Isa& isa, const SoftplusTask& task, bool bf16, int64_t rows) {
    over(rows, task.heads * task.width, [&](int64_t begin, int64_t end) { isa.small.softplus(task, bf16, begin, end); });
}

void run_route(const Isa& isa, const RouteTask& task, int64_t rows) { isa.small.route(task, 0, rows); }

void append_rows(uint8_t* arena, int64_t page_bytes, const StepSpans& step, const RowsToAppend& rows) {
    const uint8_t* from = rows.values;
    for (const StepSpan& span : step) {
        const PageRun& run = span.runs[rows.table];
        const int64_t per_row = rows.tokens_per_row;
        run.check(span.first / per_row, (span.first + span.count) / per_row, rows.rows_per_page);
        for (int64_t token = span.first; token < span.first + span.count; token++, from += rows.stride_bytes) {
            if ((token + 1) % per_row) continue;
            const int64_t row = token / per_row;
            const int64_t page = run.pages[row / rows.rows_per_page - run.first_page];
            memcpy(arena + page * page_bytes + row % rows.rows_per_page * rows.row_bytes, from, size_t(rows.row_bytes));
        }
    }
}

}  // namespace kvshare
