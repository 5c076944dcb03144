// Attention of one query a sequence straight from the arena's pages: no row is copied.
#pragma once
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rotation.h"
#include "step_spans.h"

namespace kvshare {

// Rows of one stream: row i is row i % rows_per_page of page table[i / rows_per_page - first_page].
struct StreamShape {
    RowKind kind;
    int width;  // numbers a head
    int64_t row_bytes, rows_per_page;
    std::optional<Rotation> rotation;  // what was done to the heads before they were stored,
    std::vector<float> balance;        // and before that: [kv_heads, width] that keys were divided by; empty: nothing
};

struct Query {
    int64_t row;         // of q and out
    int64_t first, end;  // rows of the cache that it sees
    const int32_t* k_pages;
    int64_t k_first_page;
    const int32_t* v_pages;
    int64_t v_first_page;
    int kind;  // of rows
    int64_t sequence;  // counted without those that are left out
};

// One kind of row: keys in one stream, values in another or the same, and which of a sequence's rows its query sees.
struct AttendedRows {
    StreamShape k, v;
    int64_t k_table, v_table;  // which of a sequence's page runs
    int64_t window;            // the newest rows, the query's own included; 0: all
    int64_t behind;            // but not the newest of these
};

class PagedAttention {
  public:
    // All kinds have the same widths, and heads that are rotated and balanced alike.
    PagedAttention(const uint8_t* arena, int64_t page_bytes, std::vector<AttendedRows> kinds, int kv_heads, bool bf16)
        : arena_(arena), page_bytes_(page_bytes), kinds_(std::move(kinds)), kv_heads_(kv_heads), key_width_(kinds_[0].k.width), value_width_(kinds_[0].v.width), bf16_(bf16) {}

    // out[row] = softmax(scale * q[row] . k) v over the rows of all kinds, for each span of one token, `row` being its row; others are left out.
    // q is [tokens, query_heads, key width] and out [tokens, query_heads, value width], bfloat16
    // or float32; sinks [query_heads] float32 or null. A sequence is cut the same way whatever else runs beside it, and whatever the number of threads.
    void attend(const Isa& isa, const void* q, void* out, int query_heads, const StepSpans& step, float scale, float softcap, const float* sinks) const;

  private:
    struct Part;
    struct Sequence;
    struct Places;
    struct Block;
    void attend_rows(const Isa& isa, const Part& part, const Part* following, const AttendState& state) const;
    void read_first_rows(const Part& part) const;
    void find(const Part& part, int64_t from, Block* block) const;
    void find(const StreamShape& stream, const int32_t* pages, int64_t first_page, int64_t from, int64_t end, Places* places) const;
    void spell(const Isa& isa, const Query& query, const void* q, int query_heads, uint8_t* to) const;  // [query_heads, query_bytes]
    void merge(const Isa& isa, const AttendedParts& parts, const float* sinks, int query_heads, void* out) const;  // [query_heads, value width]
    RowKind numbers() const { return bf16_ ? RowKind::BF16 : RowKind::FP32; }  // q and out as rows

    const uint8_t* arena_;
    int64_t page_bytes_;
    std::vector<AttendedRows> kinds_;
    int kv_heads_, key_width_, value_width_;
    bool bf16_;
};

}  // namespace kvshare
