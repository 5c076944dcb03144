#include "paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "team.h"

namespace kvshare {

static constexpr int64_t MOST_PARTS = 64;  // of one sequence
static constexpr int64_t LEAST_ROWS = 128;  // of a part
static constexpr int WIDEST = 2048;  // numbers of a head
static constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;
static constexpr int64_t NEAR_BYTES = 16 << 10;

static int64_t rows_of_part(int64_t rows) {
    const int64_t even = (rows + MOST_PARTS - 1) / MOST_PARTS;
    return std::max(LEAST_ROWS, (even + ATTEND_ROWS - 1) / ATTEND_ROWS * ATTEND_ROWS);
}

static float number(const void* numbers, bool bf16, int64_t i) {
    if (!bf16) return static_cast<const float*>(numbers)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(numbers)[i]) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Where up to ATTEND_ROWS rows of one stream are, one by one and page by page.
struct PagedAttention::Places {
    const uint8_t* rows[ATTEND_ROWS];
    Run runs[ATTEND_ROWS];
    int count = 0;  // of runs
};

void PagedAttention::find(const StreamShape& stream, const int32_t* pages, int64_t first_page, int64_t from, int64_t end, Places* places) const {
    const int64_t count = std::min(ATTEND_ROWS, end - from);
    int64_t page = from / stream.rows_per_page, place = from % stream.rows_per_page;
    places->count = 0;
    for (int64_t done = 0; done < count; page++, place = 0) {
        const int64_t here = std::min(count - done, stream.rows_per_page - place);
        const uint8_t* at = arena_ + pages[page - first_page] * page_bytes_ + place * stream.row_bytes;
        places->runs[places->count++] = {at, at + here * stream.row_bytes};
        for (int64_t i = 0; i < here; i++) places->rows[done + i] = at + i * stream.row_bytes;
        done += here;
    }
    for (int64_t i = std::max(count, int64_t(0)); i < ATTEND_ROWS; i++) places->rows[i] = places->rows[i ? i - 1 : 0];
}

struct PagedAttention::Part {
    const Query* query;
    int64_t begin, end;
};

// Where the rows of one call of a kernel are, keys and values.
struct PagedAttention::Block {
    Places k, v;
};

void PagedAttention::find(const Part& part, int64_t from, Block* block) const {
    const Query& query = *part.query;
    const AttendedRows& rows = kinds_[size_t(query.kind)];
    find(rows.k, query.k_pages, query.k_first_page, from, part.end, &block->k);
    find(rows.v, query.v_pages, query.v_first_page, from, part.end, &block->v);
}

// What a thread begins with has been asked for by nobody. Reading it from end to end is many times faster than meeting it row by row.
void PagedAttention::read_first_rows(const Part& part) const {
    Block block;
    find(part, part.begin, &block);
    for (const Places* places : {&block.k, &block.v})
        for (int i = 0; i < places->count; i++)
            for (const uint8_t* at = places->runs[i].at; at < places->runs[i].end; at += 64) *static_cast<const volatile uint8_t*>(at);
}

// While rows are worked on, those that come next are asked for, behind the last ones the `following` part's if there is one, far enough ahead for them
// to arrive and near enough for the first cache to keep them: with one KV head that is much, these rows' values and the next ones' keys; otherwise the
// next keys and values.
void PagedAttention::attend_rows(const Isa& isa, const Part& part, const Part* following, const AttendState& state) const {
    Block blocks[2];
    find(part, part.begin, blocks);
    const AttendedRows& kind = kinds_[size_t(part.query->kind)];
    const bool near = kv_heads_ == 1 && ATTEND_ROWS * (kind.k.row_bytes + kind.v.row_bytes) >= NEAR_BYTES;
    AttendRows rows;
    int now = 0;
    for (int64_t from = part.begin; from < part.end; from += ATTEND_ROWS, now ^= 1) {
        const Block& block = blocks[now];
        Block& next = blocks[now ^ 1];
        if (from + ATTEND_ROWS >= part.end && following) find(*following, following->begin, &next);
        else find(part, from + ATTEND_ROWS, &next);
        rows.k = block.k.rows;
        rows.v = block.v.rows;
        rows.count = int(std::min(ATTEND_ROWS, part.end - from));
        const Places &first = near ? block.v : next.k, &second = near ? next.k : next.v;
        std::copy(second.runs, second.runs + second.count, std::copy(first.runs, first.runs + first.count, rows.ahead));
        rows.runs = first.count + second.count;
        isa.attention.attend(rows, state);
    }
    isa.attention.settle(state);
}

void PagedAttention::spell(const Isa& isa, const StreamShape& keys, const void* q, int64_t row, int query_heads, int head, uint8_t* to) const {
    const int group = query_heads / kv_heads_, kv_head = head / group;
    float numbers[WIDEST];
    for (int i = 0; i < keys.width; i++) numbers[i] = number(q, bf16_, (row * query_heads + head) * keys.width + i);
    if (!keys.balance.empty())
        for (int i = 0; i < keys.width; i++) numbers[i] *= keys.balance[size_t(kv_head * keys.width + i)];
    if (keys.rotation) keys.rotation->apply(numbers);  // keys stay as they are: rotating both keeps their products
    isa.attention.spell(keys.kind, keys.width, group, head % group, numbers, to + kv_head * group * query_bytes(keys.width));
}

void PagedAttention::finish(float* numbers, float factor, void* out, int64_t head) const {
    for (int i = 0; i < value_width_; i++) numbers[i] *= factor;
    if (kinds_[0].v.rotation) kinds_[0].v.rotation->undo(numbers);
    for (int i = 0; i < value_width_; i++) {
        if (bf16_) {
            uint32_t bits;
            memcpy(&bits, numbers + i, 4);
            static_cast<uint16_t*>(out)[head * value_width_ + i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        } else {
            static_cast<float*>(out)[head * value_width_ + i] = numbers[i];
        }
    }
}

void PagedAttention::attend(
    const Isa& isa, const void* q, void* out, int query_heads, const StepSpans& step, float scale, float softcap, const float* sinks
) const {
    std::vector<Query> queries;
    for (const StepSpan& span : step) {
        if (span.count != 1) continue;
        for (size_t kind = 0; kind < kinds_.size(); kind++) {
            const AttendedRows& rows = kinds_[kind];
            const PageRun &k = span.runs[rows.k_table], &v = span.runs[rows.v_table];
            const int64_t newest = span.first + 1, first = rows.window ? std::max<int64_t>(0, newest - rows.window) : 0;
            const int64_t end = std::max(first, newest - rows.behind);
            k.check(first, end, rows.k.rows_per_page);
            v.check(first, end, rows.v.rows_per_page);
            queries.push_back({span.row, first, end, k.pages, k.first_page, v.pages, v.first_page, int(kind)});
        }
    }
    std::vector<Part> parts;
    std::vector<int64_t> rows, first_part;  // of q and out, and where the parts of each begin
    int64_t total_bytes = 0;
    for (const Query& query : queries) {
        if (rows.empty() || rows.back() != query.row) {
            rows.push_back(query.row);
            first_part.push_back(int64_t(parts.size()));
        }
        const int64_t step = rows_of_part(query.end - query.first);
        for (int64_t begin = query.first; begin < query.end; begin += step) parts.push_back({&query, begin, std::min(begin + step, query.end)});
        const StreamShape &k = kinds_[size_t(query.kind)].k, &v = kinds_[size_t(query.kind)].v;
        total_bytes += (query.end - query.first) * (k.row_bytes + v.row_bytes);
    }
    first_part.push_back(int64_t(parts.size()));

    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    // of each part: sums [query_heads, value_width], maxima and weights [query_heads]; two lines apart, because they are written all the time, by
    // different threads, and processors fetch lines in pairs
    constexpr int64_t apart = 2 * sizeof(Line) / sizeof(float);
    const int64_t value_width = value_width_, floats = (query_heads * (value_width + 2) + apart - 1) / apart * apart;
    static thread_local std::vector<Line> kept;
    kept.resize(parts.size() * size_t(floats) * sizeof(float) / sizeof(Line));
    float* partial = reinterpret_cast<float*>(kept.data());
    const int64_t head_bytes = query_bytes(key_width_), heads = int64_t(queries.size()) * query_heads;
    static thread_local std::vector<Line> kept_queries;  // [queries, query_heads, head_bytes]
    kept_queries.resize(size_t(heads * head_bytes / 64));
    uint8_t* spelled = kept_queries.data()->bytes;
    std::atomic<int64_t> next{0};
    const bool alone = total_bytes < SINGLE_THREAD_BYTES;

    in_parallel(alone ? 1 : most_threads(), [&](const Share& thread) {
        const auto take = [&] {
            const int64_t i = next++;
            return i < int64_t(parts.size()) ? &parts[size_t(i)] : nullptr;
        };
        const Part* part = take();
        if (part) read_first_rows(*part);
        thread.each(heads, [&](int64_t i) {
            const int64_t s = i / query_heads;
            const Query& query = queries[size_t(s)];
            spell(isa, kinds_[size_t(query.kind)].k, q, query.row, query_heads, int(i % query_heads), spelled + s * query_heads * head_bytes);
        });
        thread.wait_for_all();
        for (const Part* following; part; part = following) {
            following = take();
            float* sums = partial + (part - parts.data()) * floats;
            float *maxima = sums + query_heads * value_width, *weights = maxima + query_heads;
            std::fill(sums, maxima, 0.0f);
            std::fill(maxima, weights, -INFINITY);
            std::fill(weights, weights + query_heads, 0.0f);
            const uint8_t* spelled_query = spelled + (part->query - queries.data()) * query_heads * head_bytes;
            const StreamShape &k = kinds_[size_t(part->query->kind)].k, &v = kinds_[size_t(part->query->kind)].v;
            attend_rows(
                isa, *part, following,
                {spelled_query, maxima, weights, sums, k.kind, v.kind, kv_heads_, query_heads / kv_heads_, k.width, v.width, head_bytes, scale, softcap}
            );
        }
        thread.wait_for_all();
        thread.each(int64_t(rows.size()) * query_heads, [&](int64_t i) {
            const int64_t s = i / query_heads, head = i % query_heads;
            float maximum = sinks ? sinks[head] : -INFINITY, weight = 0;
            for (int64_t p = first_part[size_t(s)]; p < first_part[size_t(s) + 1]; p++) maximum = std::max(maximum, partial[p * floats + query_heads * value_width + head]);
            if (sinks) weight = expf(sinks[head] - maximum);
            float sums[WIDEST] = {};
            for (int64_t p = first_part[size_t(s)]; p < first_part[size_t(s) + 1]; p++) {
                const float* at = partial + p * floats;
                const float share = expf(at[query_heads * value_width + head] - maximum);
                weight += share * at[query_heads * (value_width + 1) + head];
                for (int64_t c = 0; c < value_width; c++) sums[c] += share * at[head * value_width + c];
            }
            finish(sums, weight > 0 ? 1.0f / weight : 0.0f, out, rows[size_t(s)] * query_heads + head);
        });
    });
}

}  // namespace kvshare
