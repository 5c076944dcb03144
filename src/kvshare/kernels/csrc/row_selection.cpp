#include "row_selection.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "team.h"
#include "tile_attention.h"

namespace kvshare {

static constexpr int64_t SLICE_TOKENS = 8;       // queries for which a tile of keys is found and decoded once
static constexpr int64_t MOST_SCORES = 4 << 20;  // numbers that exist at once, unless one slice alone has more
static constexpr int64_t ITEM_TILES = 8;         // that a thread takes at once

// A few queries of one sequence.
struct RowSelection::Slice {
    const SelectionSpan* span;
    int64_t first, count;  // of q
    int64_t rows;          // that the last of them sees
    int64_t token, score;  // where its queries and its scores [count, padded()] lie in the round

    int64_t tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t padded() const { return tiles() * TILE_ROWS; }
};

// Slices that run together.
struct RowSelection::Round {
    std::vector<Slice> slices;
    int64_t tokens = 0, scores = 0;
};

// Numbers as integers in their order; -0 and 0 are equal.
static uint32_t ordered(float score) {
    score += 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `top_k` best of `count` scores: the least of them is found digit by digit.
static void best_rows(const float* scores, int64_t count, int64_t top_k, int64_t* to) {
    int64_t found = 0;
    if (count <= top_k) {
        for (; found < count; found++) to[found] = found;
    } else {
        uint32_t least = 0, known = 0, of_digit[2048];
        int64_t missing = top_k;  // of the scores that begin with the digits known
        for (const auto& [shift, size] : {std::pair(21, 2048), std::pair(10, 2048), std::pair(0, 1024)}) {
            memset(of_digit, 0, sizeof of_digit);
            for (int64_t i = 0; i < count; i++) {
                const uint32_t bits = ordered(scores[i]);
                if ((bits & known) == least) of_digit[bits >> shift & uint32_t(size - 1)]++;
            }
            uint32_t digit = uint32_t(size - 1);
            for (; missing > of_digit[digit]; digit--) missing -= of_digit[digit];
            least |= digit << shift;
            known |= uint32_t(size - 1) << shift;
        }
        for (int64_t i = 0; found < top_k; i++) {
            const uint32_t bits = ordered(scores[i]);
            if (bits > least || (bits == least && missing-- > 0)) to[found++] = i;
        }
    }
    std::fill(to + found, to + top_k, -1);
}

// The scores of one tile of keys for all queries of a slice, which `packed` and `weights` hold.
void RowSelection::score(const Isa& isa, const Slice& slice, const int64_t* positions, int64_t tile, int vectors, const uint32_t* packed, const float* weights, float* scores) const {
    const uint8_t* rows[TILE_ROWS];
    const int64_t first = tile * TILE_ROWS, count = std::min<int64_t>(TILE_ROWS, slice.rows - first), lanes = vectors * LANES;
    for (int64_t i = 0; i < TILE_ROWS; i++) {
        const int64_t row = first + std::min(i, count - 1);
        rows[i] = arena_ + slice.span->pages[row / keys_.rows_per_page - slice.span->first_page] * page_bytes_ + row % keys_.rows_per_page * keys_.row_bytes;
    }
    static thread_local std::vector<uint16_t> decoded;
    if (keys_.kind != RowKind::BF16) {
        decoded.resize(size_t(TILE_ROWS * keys_.width));
        isa.rows.decode_heads(keys_.kind, keys_.width, rows, int(count), decoded.data(), keys_.width, true);
        for (int64_t i = 0; i < TILE_ROWS; i++) rows[i] = reinterpret_cast<const uint8_t*>(decoded.data() + std::min(i, count - 1) * keys_.width);
    }
    for (int64_t t = 0; t < slice.count; t++)
        if (seen(positions[slice.first + t]) > first)
            isa.score_rows(rows, {vectors, keys_.width, packed + t * lanes * keys_.width / 2, weights + t * lanes}, scores + t * slice.padded() + first);
}

// A query's heads as lanes; those behind the last repeat it, with weight 0.
void RowSelection::pack(const Isa& isa, const uint16_t* q, const float* weights, int heads, int vectors, uint32_t* packed, float* lane_weights) const {
    const int lanes = vectors * LANES;
    std::vector<const uint16_t*> rows;
    std::vector<uint16_t> rotated(keys_.rotation ? size_t(heads * keys_.width) : 0);
    for (int l = 0; l < lanes; l++) {
        const int head = std::min(l, heads - 1);
        rows.push_back(keys_.rotation ? rotated.data() + head * keys_.width : q + head * keys_.width);
        if (keys_.rotation && l < heads) rotate_bf16(isa, keys_.width, q + l * keys_.width, rotated.data() + l * keys_.width, *keys_.rotation, &Rotation::apply);
        lane_weights[l] = l < heads ? weights[l] : 0.0f;
    }
    isa.tile.pack_pairs(rows.data(), keys_.width, vectors, packed);
}

std::vector<RowSelection::Round> RowSelection::cut(const int64_t* positions, const std::vector<SelectionSpan>& spans, int64_t top_k) const {
    std::vector<Round> rounds(1);
    for (const SelectionSpan& span : spans)
        for (int64_t first = span.start; first < span.start + span.count; first += SLICE_TOKENS) {
            const int64_t count = std::min(SLICE_TOKENS, span.start + span.count - first);
            Slice slice{&span, first, count, seen(positions[first + count - 1]), 0, 0};
            if (slice.rows <= top_k) slice.rows = 0;  // nothing to choose, and so nothing to score
            const int64_t scores = count * slice.padded();
            if (rounds.back().tokens && rounds.back().scores + scores > MOST_SCORES) rounds.emplace_back();
            Round& round = rounds.back();
            slice.token = round.tokens;
            slice.score = round.scores;
            round.slices.push_back(slice);
            round.tokens += count;
            round.scores += scores;
        }
    return rounds;
}

void RowSelection::select(const Isa& isa, const uint16_t* q, const float* weights, const int64_t* positions, int heads, const std::vector<SelectionSpan>& spans, int64_t top_k,
                          int64_t* to) const {
    const int vectors = (heads + LANES - 1) / LANES, lanes = vectors * LANES;
    struct Item {
        const Slice* slice;
        int64_t tile, end;
    };
    static thread_local std::vector<float> kept_scores, kept_weights;
    static thread_local std::vector<uint32_t> kept_packed;
    for (const Round& round : cut(positions, spans, top_k)) {
        kept_scores.resize(std::max(kept_scores.size(), size_t(round.scores)));
        kept_weights.resize(std::max(kept_weights.size(), size_t(round.tokens * lanes)));
        kept_packed.resize(std::max(kept_packed.size(), size_t(round.tokens * lanes * keys_.width / 2)));
        float *scores = kept_scores.data(), *lane_weights = kept_weights.data();
        uint32_t* packed = kept_packed.data();
        std::vector<Item> items;
        std::vector<std::pair<const Slice*, int64_t>> tokens;
        for (const Slice& slice : round.slices) {
            for (int64_t tile = 0; tile < slice.tiles(); tile += ITEM_TILES) items.push_back({&slice, tile, std::min(tile + ITEM_TILES, slice.tiles())});
            for (int64_t t = 0; t < slice.count; t++) tokens.push_back({&slice, t});
        }
        std::atomic<size_t> next_item{0}, next_token{0};
        in_parallel(most_threads(), [&](const Share& thread) {
            thread.each(int64_t(tokens.size()), [&](int64_t i) {
                const auto [slice, t] = tokens[size_t(i)];
                const int64_t token = slice->token + t, given = slice->first + t;
                pack(isa, q + given * heads * keys_.width, weights + given * heads, heads, vectors, packed + token * lanes * keys_.width / 2, lane_weights + token * lanes);
            });
            thread.wait_for_all();
            for (size_t i = next_item++; i < items.size(); i = next_item++)
                for (int64_t tile = items[i].tile; tile < items[i].end; tile++) {
                    const Slice& slice = *items[i].slice;
                    score(isa, slice, positions, tile, vectors, packed + slice.token * lanes * keys_.width / 2, lane_weights + slice.token * lanes, scores + slice.score);
                }
            thread.wait_for_all();
            for (size_t i = next_token++; i < tokens.size(); i = next_token++) {
                const auto [slice, t] = tokens[i];
                best_rows(scores + slice->score + t * slice->padded(), seen(positions[slice->first + t]), top_k, to + (slice->first + t) * top_k);
            }
        });
    }
}

void RowSelection::select_singles(const Isa& isa, const uint16_t* q, const void* weights, bool weights_bf16, float scale, int heads, const StepSpans& step, int64_t table, int64_t top_k,
                                  int64_t* to) const {
    std::vector<SelectionSpan> spans;
    std::vector<int64_t> positions(size_t(step.count));
    std::vector<float> scaled(size_t(step.count * heads));
    for (const StepSpan& span : step) {
        if (span.count != 1 || span.row >= step.count) throw std::out_of_range("a choice for more queries than sequences");
        const PageRun& run = span.runs[table];
        run.check(0, seen(span.first), keys_.rows_per_page);
        positions[size_t(span.row)] = span.first;
        spans.push_back({span.row, 1, run.pages, run.first_page});
    }
    for (size_t i = 0; i < scaled.size(); i++) {
        const uint32_t bits = weights_bf16 ? uint32_t(static_cast<const uint16_t*>(weights)[i]) << 16 : 0;
        if (weights_bf16) memcpy(&scaled[i], &bits, 4);
        else scaled[i] = static_cast<const float*>(weights)[i];
        scaled[i] *= scale;
    }
    select(isa, q, scaled.data(), positions.data(), heads, spans, top_k, to);
}

}  // namespace kvshare
