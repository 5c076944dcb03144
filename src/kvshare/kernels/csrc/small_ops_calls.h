// The operations between the products over all rows, shared among the threads where there are enough; and new rows to their pages.
#pragma once
#include <vector>

#include "kernels.h"
#include "step_spans.h"

namespace kvshare {

struct Norm {
    const void* weight;  // [width], bfloat16 or float32, or nullptr for a norm without one
    bool bf16;
    float offset;  // added to the weight
    float eps;     // negative: no norm
};

inline Run run_of(const void* numbers, int64_t count, bool bf16) {
    const uint8_t* at = static_cast<const uint8_t*>(numbers);
    return {at, at + (at ? count * (bf16 ? 2 : 4) : 0)};
}
inline Run run_of(const Norm& norm, int64_t width) { return run_of(norm.weight, width, norm.bf16); }

// The weight of a norm as floats, in `kept`; nullptr where nothing is normed.
const float* factors(const Norm& norm, int64_t width, std::vector<float>& kept);

// `task` without what `norm` says.
void run_heads(const Isa& isa, HeadsTask task, const Norm& norm, bool bf16, int64_t rows);
void run_sum(const Isa& isa, SumTask task, const Norm& of_y, const Norm& of_sum, const void* scale, bool bf16, int64_t rows);  // scale: [1] or nullptr
void run_gate(const Isa& isa, const GateTask& task, bool bf16, int64_t rows);
void run_softplus(const Isa& isa, const SoftplusTask& task, bool bf16, int64_t rows);
void run_route(const Isa& isa, const RouteTask& task, int64_t rows);
void run_affine(const Isa& isa, const AffineTask& task, bool bf16, int64_t rows);
void run_turn(const Isa& isa, const TurnTask& task, bool bf16, int64_t rows);
void check_rows(const int64_t* rows, int64_t count, int64_t entries);  // throws std::out_of_range
void run_gather(const Isa& isa, const GatherTask& task, bool bf16, int64_t rows, int64_t entries);  // checks them first
int64_t argmax(const Isa& isa, const float* x, int64_t count);  // the first of equals; a NaN counts as infinity
void run_cap(const Isa& isa, float* x, int64_t count, float cap);

struct RowsToAppend {
    int64_t table;  // which of a sequence's runs
    int64_t row_bytes, rows_per_page;
    const uint8_t* values;  // the rows of all sequences behind one another
    int64_t stride_bytes;
    int64_t tokens_per_row;  // a token whose row is not complete has values all the same, which are not stored
};

// The rows of all tokens that complete one to their pages. Throws std::out_of_range, and has then written some of them, where a sequence lacks the pages.
void append_rows(uint8_t* arena, int64_t page_bytes, const StepSpans& step, const RowsToAppend& rows);

}  // namespace kvshare
