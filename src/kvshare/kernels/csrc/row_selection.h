// The rows that an indexer selects for each query, straight from the arena's pages.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "paged_attention.h"
#include "step_spans.h"

namespace kvshare {

// The queries of one sequence: rows `start ... start + count` of q. Row i of its keys is row i % rows_per_page of page pages[i / rows_per_page - first_page].
struct SelectionSpan {
    int64_t start, count;
    const int32_t* pages;
    int64_t first_page;
};

class RowSelection {
  public:
    // Keys of one head; row i is complete at position (i + 1) * tokens_per_row - 1, and seen from there on.
    RowSelection(const uint8_t* arena, int64_t page_bytes, StreamShape keys, int64_t tokens_per_row)
        : arena_(arena), page_bytes_(page_bytes), keys_(std::move(keys)), tokens_per_row_(tokens_per_row) {}

    // to[t] [top_k] = the rows that query t sees with the highest score, sum over heads of weight[t] * max(0, q[t] . key); of equal ones the earlier row;
    // ascending, -1 behind the last. q [tokens, heads, width] bfloat16, weights [tokens, heads], positions [tokens].
    void select(const Isa& isa, const uint16_t* q, const float* weights, const int64_t* positions, int heads, const std::vector<SelectionSpan>& spans, int64_t top_k,
                int64_t* to) const;

    // The same for the single queries of a step's sequences, whose keys are in their tables number `table`. Weights are `scale` times those given, bfloat16 or float32.
    void select_singles(const Isa& isa, const uint16_t* q, const void* weights, bool weights_bf16, float scale, int heads, const StepSpans& step, int64_t table, int64_t top_k,
                        int64_t* to) const;

  private:
    struct Slice;
    struct Round;
    int64_t seen(int64_t position) const { return (position + 1) / tokens_per_row_; }  // rows
    std::vector<Round> cut(const int64_t* positions, const std::vector<SelectionSpan>& spans, int64_t top_k) const;
    void pack(const Isa& isa, const uint16_t* q, const float* weights, int heads, int vectors, uint32_t* packed, float* lane_weights) const;
    void score(const Isa& isa, const Slice& slice, const int64_t* positions, int64_t tile, int vectors, const uint32_t* packed, const float* weights, float* scores) const;

    const uint8_t* arena_;
    int64_t page_bytes_;
    StreamShape keys_;
    int64_t tokens_per_row_;
};

}  // namespace kvshare
