#include "tile_attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "team.h"

namespace kvshare {

static constexpr int64_t BLOCK_LANES = 256;   // queries for which a tile's values are packed once
// A part, where the rows of few queries are shared among threads: its sums must be merged, so more queries want more tiles, and threads be worth it.
static constexpr int64_t LEAST_TILES = 2;             // for every 64 queries
static constexpr int64_t LEAST_NUMBERS = 2 << 16;     // of keys and values by queries, of all its tiles' first rows
static constexpr int64_t ENOUGH_ITEMS = 32;   // of one sequence, for any number of threads
static constexpr int64_t SUB_LANES = MOST_VECTORS * LANES, SUBS = BLOCK_LANES / SUB_LANES;

// Queries of one KV head that run together, over part of the tiles that they see. Lane l is query head l % group of token l / group.
struct TileAttention::Item {
    const TileSpan* span;
    int kv_head;
    int64_t lane, lanes;
    int64_t tile, end_tile;       // of all streams' tiles, one stream behind the other
    int part, parts;              // of this block
    int64_t kept;                 // where its sums are kept for merging, in floats
};

struct TileAttention::Work {
    const Isa& isa;
    const uint16_t* q;
    uint16_t* out;
    const int64_t* positions;
    int query_heads, group;
    const std::vector<TileSpan>& spans;
    float scale, softcap;
    const float* sinks;
    const KeyRebuild& rebuild;

    int64_t query(const Item& item, int64_t lane) const {  // which of q [tokens * query_heads] stands in a lane of an item
        lane += item.lane;
        return (item.span->start + lane / group) * query_heads + item.kv_head * group + lane % group;
    }
};

namespace {

// Rows of a stream that a query at `position` sees.
struct Seen {
    int64_t first, end;
    Seen(const TileStream& stream, const TileRows& rows, int64_t position) {
        end = rows.num_chosen >= 0 ? rows.num_chosen : (position + 1) / stream.tokens_per_row;
        first = stream.window && rows.num_chosen < 0 ? std::max<int64_t>(0, end - stream.window) : 0;
        if (rows.num_chosen < 0) end = std::max(first, end - stream.behind);
    }
};

struct Tiles {  // that rows `first ... end` touch; they begin at the same rows for every query
    int64_t low, high;
    Tiles(int64_t first, int64_t end) : low(first / TILE_ROWS), high(end > first ? (end + TILE_ROWS - 1) / TILE_ROWS : low) {}
    int64_t count() const { return high - low; }
};

class Scratch {  // of one thread: aligned memory that grows
  public:
    float* floats(int64_t count) {
        if (count > count_) {
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_t((count * 4 + 63) / 64 * 64))));
            count_ = count;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t count_ = 0;
};

}  // namespace

int64_t TileAttention::sum_floats() const { return BLOCK_LANES * (padded(value_width_) + 2); }

// One block of queries, in parts where it alone would not occupy the threads.
void TileAttention::cut_block(const Work& work, const TileSpan& span, int kv_head, int64_t lane, int64_t lanes, int64_t blocks, std::vector<Item>& items) const {
    const int64_t *positions = work.positions + span.start, oldest = positions[lane / work.group], newest = positions[(lane + lanes - 1) / work.group];
    Item item{&span, kv_head, lane, lanes, 0, 0, 0, 1, 0};
    int64_t tiles = 0;
    for (size_t s = 0; s < streams_.size(); s++) {
        const TileRows rows = span.rows[s].of_query(lane / work.group);
        tiles += Tiles(Seen(streams_[s], rows, oldest).first, Seen(streams_[s], rows, newest).end).count();
    }
    const int64_t numbers = lanes * (key_width_ + value_width_);
    const int64_t least = std::max(LEAST_TILES * ((lanes + SUB_LANES - 1) / SUB_LANES), (LEAST_NUMBERS + numbers - 1) / numbers);
    item.parts = int(std::clamp<int64_t>(std::min((ENOUGH_ITEMS + blocks - 1) / blocks, tiles / least), 1, ENOUGH_ITEMS));
    int64_t kept = items.empty() ? 0 : items.back().kept + (items.back().parts > 1 ? sum_floats() : 0);
    for (item.part = 0; item.part < item.parts; item.part++) {
        item.tile = tiles * item.part / item.parts;
        item.end_tile = tiles * (item.part + 1) / item.parts;
        item.kept = kept;
        if (item.parts > 1) kept += sum_floats();
        items.push_back(item);
    }
}

std::vector<TileAttention::Item> TileAttention::cut(const Work& work) const {
    std::vector<Item> items;
    for (const TileSpan& span : work.spans) {
        // queries that select rows have nothing in common but their token's other heads
        const int64_t lanes = span.count * work.group, together = span.selects() ? work.group : lanes, blocks_of = (together + BLOCK_LANES - 1) / BLOCK_LANES;
        const int64_t blocks = kv_heads_ * (lanes / together) * blocks_of;
        for (int kv_head = 0; kv_head < kv_heads_; kv_head++)
            for (int64_t first = lanes - together; first >= 0; first -= together)  // the longest first
                for (int64_t lane = (blocks_of - 1) * BLOCK_LANES; lane >= 0; lane -= BLOCK_LANES)
                    cut_block(work, span, kv_head, first + lane, std::min(BLOCK_LANES, together - lane), blocks, items);
    }
    return items;
}

// Points the tile at its rows `begin ... end`; row 0 of it is row `first` of the stream.
void TileAttention::find_rows(const TileStream& stream, const TileRows& rows, int64_t first, int begin, int end, int kv_head, Tile& tile) const {
    const auto find = [&](const uint8_t** to, const StreamShape& shape, const int32_t* pages, int64_t first_page) {
        const int64_t rows_per_page = shape.rows_per_page, row_bytes = shape.row_bytes;
        const uint8_t* base = arena_ + kv_head * head_bytes(shape.kind, shape.width);
        int64_t page = (first + begin) / rows_per_page - first_page, row = (first + begin) % rows_per_page;
        if (rows.num_chosen >= 0) {
            for (int i = begin; i < end; i++) {
                const int64_t index = rows.chosen[first + i];
                to[i] = base + pages[index / rows_per_page - first_page] * page_bytes_ + index % rows_per_page * row_bytes;
            }
        } else {
            for (int i = begin; i < end; page++, row = 0) {
                const uint8_t* at = base + pages[page] * page_bytes_ + row * row_bytes;
                for (const int stop = int(std::min<int64_t>(end, i + rows_per_page - row)); i < stop; i++, at += row_bytes) to[i] = at;
            }
        }
        std::fill(to, to + begin, to[begin]);  // rows that nobody sees may have no page, but a kernel takes some at once
        std::fill(to + end, to + TILE_ROWS, to[end - 1]);
    };
    tile.first = int(first);
    find(tile.k, stream.k, rows.k_pages, rows.k_first_page);
    if (stream.same) std::copy(tile.k, tile.k + TILE_ROWS, tile.v);
    else find(tile.v, stream.v, rows.v_pages, rows.v_first_page);
}

// Encoded rows `begin ... end` of the tile as numbers in `decoded` [2, TILE_ROWS, widths], and the tile pointed at them.
void TileAttention::decode_rows(const Isa& isa, const TileStream& stream, int begin, int end, uint16_t* decoded, Tile& tile) const {
    const auto decode = [&](const uint8_t** rows, const StreamShape& shape) {
        if (shape.kind == RowKind::BF16) return;
        isa.rows.decode_heads(shape.kind, shape.width, rows + begin, end - begin, decoded, shape.width, true);
        for (int i = 0; i < TILE_ROWS; i++) rows[i] = reinterpret_cast<const uint8_t*>(decoded + (std::clamp(i, begin, end - 1) - begin) * shape.width);
        decoded += TILE_ROWS * shape.width;
    };
    decode(tile.k, stream.k);
    if (stream.same) std::copy(tile.k, tile.k + TILE_ROWS, tile.v);
    else decode(tile.v, stream.v);
}

// Keys of rows `begin ... end`, whose values and rotated parts are bfloat16 by now, in `keys` [TILE_ROWS, key width].
void TileAttention::rebuild_keys(const Isa& isa, const KeyRebuild& rebuild, const TileStream& stream, int begin, int end, uint16_t* keys, Tile& tile) const {
    for (int i = begin; i < end; i++) {
        const auto *v = reinterpret_cast<const uint16_t*>(tile.v[i]), *rotated = stream.same ? nullptr : reinterpret_cast<const uint16_t*>(tile.k[i]);
        isa.rows.rebuild_key(rebuild, key_width_, tile.first + i, v, rotated, keys + (i - begin) * key_width_);
    }
    for (int i = 0; i < TILE_ROWS; i++) tile.k[i] = reinterpret_cast<const uint8_t*>(keys + (std::clamp(i, begin, end - 1) - begin) * key_width_);
}

void rotate_bf16(const Isa& isa, int width, const uint16_t* from, uint16_t* to, const Rotation& rotation, void (Rotation::*way)(const Isa&, float*) const) {
    static thread_local std::vector<float> kept;
    kept.resize(size_t(width));
    float* numbers = kept.data();
    const auto* plain = reinterpret_cast<const uint8_t*>(from);
    isa.rows.decode_heads(RowKind::BF16, width, &plain, 1, numbers, width, false);
    (rotation.*way)(isa, numbers);
    plain = reinterpret_cast<const uint8_t*>(numbers);
    isa.rows.decode_heads(RowKind::FP32, width, &plain, 1, to, width, true);
}

// The 64 queries from `lane` of an item on.
void TileAttention::pack(const Work& work, const Item& item, int64_t lane, const TileQueries& queries) const {
    const uint16_t* rows[SUB_LANES];
    for (int64_t l = 0; l < SUB_LANES; l++) rows[l] = work.q + work.query(item, std::min(lane + l, item.lanes - 1)) * key_width_;
    const auto& rotation = streams_[0].k.rotation;
    std::vector<uint16_t> rotated(rotation ? size_t(SUB_LANES * key_width_) : 0);
    for (int64_t l = 0; rotation && l < SUB_LANES; l++) {
        rotate_bf16(work.isa, key_width_, rows[l], rotated.data() + l * key_width_, *rotation, &Rotation::apply);
        rows[l] = rotated.data() + l * key_width_;
    }
    work.isa.tile.pack_queries(queries, rows);
}

// Views of an item's queries, 64 at a time: `sums` holds what is summed up, `packed` the queries (where they are needed still).
int TileAttention::bind(const Work& work, const Item& item, float* packed, float* sums, const int32_t* first, const int32_t* end, TileQueries* subs) const {
    const int64_t out_floats = SUB_LANES * padded(value_width_);
    int count = 0;
    for (int64_t lane = 0; lane < item.lanes; lane += SUB_LANES, sums += out_floats + 2 * SUB_LANES) {
        const int vectors = int((std::min(SUB_LANES, item.lanes - lane) + LANES - 1) / LANES);
        subs[count++] = {vectors, key_width_, value_width_, work.scale, work.softcap, reinterpret_cast<uint32_t*>(packed) + lane * key_width_ / 2,
                         sums + out_floats, sums + out_floats + SUB_LANES, sums, first + lane, end + lane};
    }
    return count;
}

void TileAttention::write(const Work& work, const Item& item, const TileQueries* subs) const {
    for (int64_t lane = 0; lane < item.lanes; lane += SUB_LANES, subs++) {
        uint16_t* rows[SUB_LANES];
        alignas(64) float sinks[SUB_LANES] = {};
        for (int64_t l = 0; l < SUB_LANES; l++) {
            const bool real = lane + l < item.lanes;
            rows[l] = real ? work.out + work.query(item, lane + l) * value_width_ : nullptr;
            if (real && work.sinks) sinks[l] = work.sinks[work.query(item, lane + l) % work.query_heads];
        }
        work.isa.tile.write(*subs, work.sinks ? sinks : nullptr, rows);
        for (uint16_t* row : rows)
            if (row && streams_[0].v.rotation) rotate_bf16(work.isa, value_width_, row, row, *streams_[0].v.rotation, &Rotation::undo);
    }
}

void TileAttention::run(const Work& work, const Item& item, float* kept) const {
    static thread_local Scratch scratch;
    const int64_t values = padded(value_width_) * TILE_ROWS / 2, packed = BLOCK_LANES * key_width_ / 2;
    float* memory = scratch.floats(values + packed + sum_floats() + TILE_ROWS * (2 * key_width_ + value_width_) / 2);
    uint16_t* decoded = reinterpret_cast<uint16_t*>(memory + values + packed + sum_floats());
    Tile both[2];
    for (Tile& tile : both) tile.values = reinterpret_cast<uint32_t*>(memory);
    alignas(64) int32_t first[BLOCK_LANES], end[BLOCK_LANES];
    TileQueries subs[SUBS];
    const int num_subs = bind(work, item, memory + values, item.parts > 1 ? kept + item.kept : memory + values + packed, first, end, subs);
    for (int s = 0; s < num_subs; s++) pack(work, item, s * SUB_LANES, subs[s]);

    const int64_t* positions = work.positions + item.span->start;
    int64_t before = 0;  // tiles of the streams in front
    for (size_t s = 0; s < streams_.size(); s++) {
        const TileRows rows = item.span->rows[s].of_query(item.lane / work.group);
        for (int64_t l = 0; l < num_subs * SUB_LANES; l++) {
            const Seen seen(streams_[s], rows, positions[(item.lane + std::min(l, item.lanes - 1)) / work.group]);
            first[l] = int32_t(seen.first);
            end[l] = int32_t(seen.end);
        }
        const int64_t last_end = end[item.lanes - 1];
        const Tiles tiles(first[0], last_end);
        const int64_t begin_tile = std::max(tiles.low, tiles.low + item.tile - before), end_tile = std::min(tiles.high, tiles.low + item.end_tile - before);
        const auto unseen = [&](int64_t t) { return int(std::max<int64_t>(0, first[0] - t * TILE_ROWS)); };  // rows of a tile in front of all windows
        const auto count = [&](int64_t t) { return int(std::min<int64_t>(TILE_ROWS, last_end - t * TILE_ROWS)); };
        const auto find = [&](int64_t t) { find_rows(streams_[s], rows, t * TILE_ROWS, unseen(t), count(t), item.kv_head, both[t & 1]); };
        if (begin_tile < end_tile) find(begin_tile);
        for (int64_t t = begin_tile; t < end_tile; t++) {
            Tile& tile = both[t & 1];
            if (t + 1 < end_tile) find(t + 1);
            decode_rows(work.isa, streams_[s], unseen(t), count(t), decoded, tile);
            if (rebuilds_) rebuild_keys(work.isa, work.rebuild, streams_[s], unseen(t), count(t), decoded + TILE_ROWS * (key_width_ + value_width_), tile);
            tile.next = t + 1 < end_tile ? &both[(t + 1) & 1] : nullptr;
            work.isa.tile.pack_values(tile, unseen(t) & ~1, count(t), value_width_);
            for (int i = 0; i < num_subs; i++) {
                const int64_t oldest = i * SUB_LANES, newest = std::min(oldest + SUB_LANES, item.lanes) - 1, start = tile.first;
                const int from = int(std::max<int64_t>(0, first[oldest] - start)) & ~1, to = int(std::min<int64_t>(count(t), end[newest] - start));
                if (from >= to) continue;
                work.isa.tile.attend(tile, from, to, first[newest] > start + from || end[oldest] < start + to, subs[i]);
                tile.next = nullptr;
            }
        }
        before += tiles.count();
    }
    if (item.parts == 1) write(work, item, subs);
}

void TileAttention::attend(const Isa& isa, const uint16_t* q, uint16_t* out, const int64_t* positions, int query_heads, const std::vector<TileSpan>& spans, float scale,
                           float softcap, const float* sinks, const KeyRebuild& rebuild) const {
    const Work work{isa, q, out, positions, query_heads, query_heads / kv_heads_, spans, scale, softcap, sinks, rebuild};
    const std::vector<Item> items = cut(work);
    if (items.empty()) return;
    static thread_local Scratch scratch;
    float* kept = items.back().kept || items.back().parts > 1 ? scratch.floats(items.back().kept + sum_floats()) : nullptr;
    std::atomic<size_t> next{0}, next_merge{0};
    in_parallel(items.size() == 1 ? 1 : most_threads(), [&](const Share& thread) {
        for (size_t i = next++; i < items.size(); i = next++) run(work, items[i], kept);
        thread.wait_for_all();
        for (size_t i = next_merge++; i < items.size(); i = next_merge++) {
            if (items[i].parts == 1 || items[i].part) continue;
            TileQueries into[SUBS], from[SUBS];
            const int num_subs = bind(work, items[i], nullptr, kept + items[i].kept, nullptr, nullptr, into);
            for (int part = 1; part < items[i].parts; part++) {
                bind(work, items[i], nullptr, kept + items[i + part].kept, nullptr, nullptr, from);
                for (int s = 0; s < num_subs; s++) work.isa.tile.merge(into[s], from[s]);
            }
            write(work, items[i], into);
        }
    });
}

void TileAttention::attend_singles(const Isa& isa, const uint16_t* q, uint16_t* out, int query_heads, const StepSpans& step, const std::vector<Tables>& kinds, float scale,
                                   float softcap, const float* sinks, const KeyRebuild& rebuild) const {
    std::vector<TileSpan> spans;
    std::vector<int64_t> positions;
    for (const StepSpan& span : step) {
        if (span.count != 1) continue;
        if (int64_t(positions.size()) <= span.row) positions.resize(size_t(span.row + 1));
        positions[size_t(span.row)] = span.first;
        TileSpan all{span.row, 1, {}};
        for (size_t s = 0; s < kinds.size(); s++) {
            const auto& [keys, values, chosen, num_chosen] = kinds[s];
            const PageRun &k = span.runs[keys], &v = span.runs[values];
            all.rows.push_back({k.pages, k.first_page, v.pages, v.first_page, chosen ? chosen + span.row * num_chosen : nullptr, chosen ? num_chosen : -1});
            const TileRows rows = all.rows.back().of_query(0);
            const bool any = !chosen || rows.num_chosen > 0;
            const Seen seen(streams_[s], rows, span.first);
            const int64_t first = chosen && any ? rows.chosen[0] : seen.first, end = chosen && any ? rows.chosen[rows.num_chosen - 1] + 1 : seen.end;
            k.check(first, end, streams_[s].k.rows_per_page);
            v.check(first, end, streams_[s].v.rows_per_page);
        }
        spans.push_back(std::move(all));
    }
    attend(isa, q, out, positions.data(), query_heads, spans, scale, softcap, sinks, rebuild);
}

}  // namespace kvshare
