// Attention of many queries a sequence (prompts; many heads on one row) straight from the arena's pages.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "paged_attention.h"
#include "step_spans.h"

namespace kvshare {

// One kind of row that queries attend to: keys in one stream, values in another or the same.
struct TileStream {
    StreamShape k, v;
    bool same;               // values are the first numbers of the keys
    int64_t tokens_per_row;  // row i is complete at position (i + 1) * tokens_per_row - 1, and seen from there on
    int64_t window;          // a query sees the newest `window` rows; 0: all
    int64_t behind;          // but not the newest `behind` of them
};

// Where a sequence's rows lie: row i is row i % rows_per_page of page pages[i / rows_per_page - first_page].
struct TileRows {
    const int32_t* k_pages;
    int64_t k_first_page;
    const int32_t* v_pages;
    int64_t v_first_page;
    const int64_t* chosen;  // [queries, num_chosen] the rows that each query sees, ascending, -1 behind the last; where num_chosen >= 0
    int64_t num_chosen;     // below 0: all rows that a position sees

    TileRows of_query(int64_t query) const {  // what one of the queries sees: as many rows as there are
        TileRows one = *this;
        if (num_chosen < 0) return one;
        for (one.chosen += query * num_chosen; one.num_chosen > 0 && one.chosen[one.num_chosen - 1] < 0;) one.num_chosen--;
        return one;
    }
};

// The queries of one sequence: rows `start ... start + count` of q, at ascending positions.
struct TileSpan {
    int64_t start, count;
    std::vector<TileRows> rows;  // of each stream

    bool selects() const { return std::any_of(rows.begin(), rows.end(), [](const TileRows& each) { return each.num_chosen >= 0; }); }
};

// One head of bfloat16, from there to here: rotated keys stay as they are and the queries are rotated; results are rotated back.
void rotate_bf16(const Isa& isa, int width, const uint16_t* from, uint16_t* to, const Rotation& rotation, void (Rotation::*way)(const Isa&, float*) const);

class TileAttention {
  public:
    // All streams have the same widths, and heads that are rotated alike. `rebuilds`: keys follow from the values, and the stream of keys is the
    // values' own, or holds the rotated part of the keys.
    TileAttention(const uint8_t* arena, int64_t page_bytes, std::vector<TileStream> streams, int kv_heads, bool rebuilds)
        : arena_(arena), page_bytes_(page_bytes), streams_(std::move(streams)), kv_heads_(kv_heads), rebuilds_(rebuilds), key_width_(rebuilds ? streams_[0].v.width : streams_[0].k.width), value_width_(streams_[0].v.width) {}

    // out[t] = softmax(scale * q[t] . k) v over the rows of all streams that position[t] sees. bfloat16: q [tokens, query_heads, key_width] and
    // out [tokens, query_heads, value_width]; positions [tokens]; sinks [query_heads] or null. Only rows of the spans are written. A sequence is
    // cut the same way whatever else runs beside it, and whatever the number of threads.
    void attend(const Isa& isa, const uint16_t* q, uint16_t* out, const int64_t* positions, int query_heads, const std::vector<TileSpan>& spans, float scale,
                float softcap, const float* sinks, const KeyRebuild& rebuild) const;

    // The same for the single queries of a step's sequences. `kinds`: of each stream, which of a sequence's tables hold keys and values, and what each query chose.
    struct Tables {
        int64_t keys, values;
        const int64_t* chosen;  // as in TileRows, of all queries
        int64_t num_chosen;
    };
    void attend_singles(const Isa& isa, const uint16_t* q, uint16_t* out, int query_heads, const StepSpans& step, const std::vector<Tables>& kinds, float scale, float softcap,
                        const float* sinks, const KeyRebuild& rebuild) const;

  private:
    struct Item;
    struct Work;
    std::vector<Item> cut(const Work& work) const;
    void run(const Work& work, const Item& item, float* kept) const;
    void write(const Work& work, const Item& item, const TileQueries* subs) const;
    void cut_block(const Work& work, const TileSpan& span, int kv_head, int64_t lane, int64_t lanes, int64_t blocks, std::vector<Item>& items) const;
    void pack(const Work& work, const Item& item, int64_t lane, const TileQueries& queries) const;
    int bind(const Work& work, const Item& item, float* packed, float* sums, const int32_t* first, const int32_t* end, TileQueries* subs) const;
    void find_rows(const TileStream& stream, const TileRows& rows, int64_t first, int begin, int end, int kv_head, Tile& tile) const;
    void decode_rows(const Isa& isa, const TileStream& stream, int begin, int end, uint16_t* decoded, Tile& tile) const;
    void rebuild_keys(const Isa& isa, const KeyRebuild& rebuild, const TileStream& stream, int begin, int end, uint16_t* keys, Tile& tile) const;
    int64_t sum_floats() const;  // that one block of queries sums up

    const uint8_t* arena_;
    int64_t page_bytes_;
    std::vector<TileStream> streams_;
    int kv_heads_;
    bool rebuilds_;
    int key_width_, value_width_;
};

}  // namespace kvshare
