#include "paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "team.h"

namespace kvshare {

static constexpr int64_t MOST_PARTS = 64;  // of one sequence
static constexpr int64_t TWO_PARTS = 128, FOUR_PARTS = 512;  // rows from which on they are cut so
static constexpr int WIDEST = 2048;  // numbers of a head
static constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;
static constexpr int64_t NEAR_BYTES = 24 << 10;

// In how many parts so many rows are cut: enough for threads to share, few enough that what a part costs by itself (sums of its own, and merging them)
// stays small beside its rows. Four of 512 rows, 64 of 128K.
static int64_t num_parts(int64_t rows) {
    if (rows < FOUR_PARTS) return rows < TWO_PARTS ? std::min<int64_t>(rows, 1) : 2;
    return std::min<int64_t>(MOST_PARTS, 4 * std::lround(std::sqrt(double(rows) / FOUR_PARTS)));
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

// What one row of q and out is made of, in its order.
struct PagedAttention::Sequence {
    int64_t row, first_part, parts;
    int left;  // of them, to be done
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
// to arrive and near enough for the first cache to keep them: with one KV head of codes that is much, these rows' values and the next ones' keys;
// otherwise the next keys and values.
void PagedAttention::attend_rows(const Isa& isa, const Part& part, const Part* following, const AttendState& state) const {
    Block blocks[2];
    find(part, part.begin, blocks);
    const AttendedRows& kind = kinds_[size_t(part.query->kind)];
    const bool codes = kind.k.kind != RowKind::BF16 || kind.v.kind != RowKind::BF16;
    const bool near = codes && kv_heads_ == 1 && ATTEND_ROWS * (kind.k.row_bytes + kind.v.row_bytes) >= NEAR_BYTES;
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

void PagedAttention::spell(const Isa& isa, const Query& query, const void* q, int query_heads, uint8_t* to) const {
    const StreamShape& keys = kinds_[size_t(query.kind)].k;
    const int group = query_heads / kv_heads_;
    const int64_t bytes = query_bytes(keys.width), head_numbers = head_bytes(numbers(), keys.width);
    const auto* from = static_cast<const uint8_t*>(q) + query.row * query_heads * head_numbers;
    float x[WIDEST];
    for (int head = 0; head < query_heads; head++, from += head_numbers) {
        isa.rows.decode_heads(numbers(), keys.width, &from, 1, x, keys.width, false);
        if (!keys.balance.empty())
            for (int i = 0; i < keys.width; i++) x[i] *= keys.balance[size_t(head / group * keys.width + i)];
        if (keys.rotation) keys.rotation->apply(isa, x);  // keys stay as they are: rotating both keeps their products
        isa.attention.spell(keys.kind, keys.width, group, head % group, x, to + head / group * group * bytes);
    }
}

void PagedAttention::merge(const Isa& isa, const AttendedParts& parts, const float* sinks, int query_heads, void* out) const {
    const auto& rotation = kinds_[0].v.rotation;
    auto* to = static_cast<uint8_t*>(out);
    float x[WIDEST];
    for (int head = 0; head < query_heads; head++, to += head_bytes(numbers(), value_width_)) {
        isa.attention.merge(parts, query_heads, head, value_width_, sinks ? sinks + head : nullptr, x);
        if (rotation) rotation->undo(isa, x);
        isa.rows.encode_head(numbers(), value_width_, x, 1.0f, to);
    }
}

void PagedAttention::attend(
    const Isa& isa, const void* q, void* out, int query_heads, const StepSpans& step, float scale, float softcap, const float* sinks
) const {
    static thread_local std::vector<Query> kept_queries;
    static thread_local std::vector<Part> kept_parts;
    static thread_local std::vector<Sequence> kept_sequences;
    std::vector<Query>& queries = kept_queries;
    std::vector<Part>& parts = kept_parts;
    std::vector<Sequence>& sequences = kept_sequences;
    queries.clear(), parts.clear(), sequences.clear();
    int64_t total_bytes = 0;
    for (const StepSpan& span : step) {
        if (span.count != 1) continue;
        for (size_t kind = 0; kind < kinds_.size(); kind++) {
            const AttendedRows& rows = kinds_[kind];
            const PageRun &k = span.runs[rows.k_table], &v = span.runs[rows.v_table];
            const int64_t newest = span.first + 1, first = rows.window ? std::max<int64_t>(0, newest - rows.window) : 0;
            const int64_t end = std::max(first, newest - rows.behind);
            k.check(first, end, rows.k.rows_per_page);
            v.check(first, end, rows.v.rows_per_page);
            queries.push_back({span.row, first, end, k.pages, k.first_page, v.pages, v.first_page, int(kind), int64_t(sequences.size())});
            total_bytes += (end - first) * (rows.k.row_bytes + rows.v.row_bytes);
        }
        sequences.push_back({span.row, 0, 0, 0});
    }
    for (const Query& query : queries) {
        Sequence& sequence = sequences[size_t(query.sequence)];
        if (!query.kind) sequence.first_part = int64_t(parts.size());
        const int64_t rows = query.end - query.first, blocks = (rows + ATTEND_ROWS - 1) / ATTEND_ROWS, count = num_parts(rows);
        const auto border = [&](int64_t part) { return std::min(query.end, query.first + part * blocks / count * ATTEND_ROWS); };
        for (int64_t part = 0; part < count; part++) parts.push_back({&query, border(part), border(part + 1)});
        sequence.parts = int64_t(parts.size()) - sequence.first_part;
        sequence.left = int(sequence.parts);
    }

    struct alignas(64) Line {
        uint8_t bytes[64];
    };
    // of each part: sums [query_heads, value_width], maxima and weights [query_heads]; two lines apart, because they are written all the time, by
    // different threads, and processors fetch lines in pairs
    constexpr int64_t apart = 2 * sizeof(Line) / sizeof(float);
    const int64_t floats = (query_heads * (int64_t(value_width_) + 2) + apart - 1) / apart * apart;
    static thread_local std::vector<Line> kept;
    kept.resize(std::max(kept.size(), parts.size() * size_t(floats) * sizeof(float) / sizeof(Line)));
    float* partial = reinterpret_cast<float*>(kept.data());
    const int64_t head_bytes = query_bytes(key_width_);
    const auto put = [&](const Sequence& sequence) {
        const int64_t bytes = int64_t(value_width_) * (bf16_ ? 2 : 4);
        merge(isa, {partial + sequence.first_part * floats, sequence.parts, floats}, sinks, query_heads, static_cast<uint8_t*>(out) + sequence.row * query_heads * bytes);
    };
    for (const Sequence& sequence : sequences)
        if (!sequence.parts) put(sequence);
    std::atomic<int64_t> next{0};

    // Every thread prepares the queries that it needs by itself, and whoever is done with a sequence's last part merges them: nobody waits for another
    in_parallel(total_bytes < SINGLE_THREAD_BYTES ? 1 : most_threads(), [&](const Share&) {
        static thread_local std::vector<Line> kept_query;  // [query_heads, head_bytes]
        const auto take = [&] {
            const int64_t i = next++;
            return i < int64_t(parts.size()) ? &parts[size_t(i)] : nullptr;
        };
        const Part* part = take();
        if (part) read_first_rows(*part);
        kept_query.resize(std::max(kept_query.size(), size_t(query_heads * head_bytes / 64)));
        uint8_t* spelled = kept_query.data()->bytes;
        const Query* prepared = nullptr;
        for (const Part* following; part; part = following) {
            following = take();
            const Query& query = *part->query;
            if (prepared != &query) spell(isa, query, q, query_heads, spelled);
            prepared = &query;
            float* sums = partial + (part - parts.data()) * floats;
            float *maxima = sums + query_heads * value_width_, *weights = maxima + query_heads;
            std::fill(sums, maxima, 0.0f);
            std::fill(maxima, weights, -INFINITY);
            std::fill(weights, weights + query_heads, 0.0f);
            const StreamShape &k = kinds_[size_t(query.kind)].k, &v = kinds_[size_t(query.kind)].v;
            attend_rows(isa, *part, following, {spelled, maxima, weights, sums, k.kind, v.kind, kv_heads_, query_heads / kv_heads_, k.width, v.width, head_bytes, scale, softcap});
            Sequence& sequence = sequences[size_t(query.sequence)];
            if (std::atomic_ref(sequence.left).fetch_sub(1, std::memory_order_acq_rel) == 1) put(sequence);
        }
    });
}

}  // namespace kvshare
