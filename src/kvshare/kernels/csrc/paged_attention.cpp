#include "paged_attention.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace kvshare {

static constexpr int64_t MOST_PARTS = 64;  // of one sequence
static constexpr int64_t LEAST_ROWS = 128;  // of a part
static constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;

static int64_t rows_of_part(int64_t rows) {
    const int64_t even = (rows + MOST_PARTS - 1) / MOST_PARTS;
    return std::max(LEAST_ROWS, (even + ATTEND_ROWS - 1) / ATTEND_ROWS * ATTEND_ROWS);
}

void PagedAttention::attend_rows(const Isa& isa, const Query& query, int64_t begin, int64_t end, const AttendState& state) const {
    AttendRows rows;
    const auto find = [&](int64_t from, const uint8_t** k, const uint8_t** v) {  // beyond the end: the last row again
        for (int64_t i = 0; i < ATTEND_ROWS; i++) {
            const int64_t index = std::min(from + i, end - 1);
            k[i] = row(k_, query.k_pages, query.k_first_page, index);
            v[i] = row(v_, query.v_pages, query.v_first_page, index);
        }
    };
    find(begin, rows.next_k, rows.next_v);
    for (int64_t from = begin; from < end; from += ATTEND_ROWS) {
        memcpy(rows.k, rows.next_k, sizeof rows.k);
        memcpy(rows.v, rows.next_v, sizeof rows.v);
        if (from + ATTEND_ROWS < end) find(from + ATTEND_ROWS, rows.next_k, rows.next_v);
        rows.count = int(std::min(ATTEND_ROWS, end - from));
        (bf16_ ? isa.attend_bf16 : isa.attend_fp32)(rows, state);
    }
}

void PagedAttention::attend(
    const Isa& isa, const void* q, void* out, int query_heads, const std::vector<Query>& queries, float scale, float softcap, const float* sinks
) const {
    struct Part {
        const Query* query;
        int64_t begin, end;
    };
    std::vector<Part> parts;
    std::vector<int64_t> first_part;
    int64_t total_rows = 0;
    for (const Query& query : queries) {
        first_part.push_back(int64_t(parts.size()));
        const int64_t step = rows_of_part(query.end - query.first);
        for (int64_t begin = query.first; begin < query.end; begin += step) parts.push_back({&query, begin, std::min(begin + step, query.end)});
        total_rows += query.end - query.first;
    }
    first_part.push_back(int64_t(parts.size()));

    const int64_t value_width = v_.width, size = bf16_ ? 2 : 4, floats = query_heads * (value_width + 2);
    static thread_local std::vector<float> kept;  // of each part: sums [query_heads, value_width], maxima and weights [query_heads]
    kept.resize(parts.size() * size_t(floats));
    float* partial = kept.data();
    std::atomic<int64_t> next{0};
    const bool alone = total_rows * (k_.row_bytes + v_.row_bytes) < SINGLE_THREAD_BYTES;

#pragma omp parallel num_threads(alone ? 1 : omp_get_max_threads())
    {
        for (int64_t i = next++; i < int64_t(parts.size()); i = next++) {
            const Part& part = parts[size_t(i)];
            float* sums = partial + i * floats;
            float *maxima = sums + query_heads * value_width, *weights = maxima + query_heads;
            std::fill(sums, maxima, 0.0f);
            std::fill(maxima, weights, -INFINITY);
            std::fill(weights, weights + query_heads, 0.0f);
            const auto* row = static_cast<const uint8_t*>(q) + part.query->row * query_heads * k_.width * size;
            attend_rows(isa, *part.query, part.begin, part.end, {row, maxima, weights, sums, kv_heads_, query_heads / kv_heads_, k_.width, v_.width, scale, softcap});
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < int64_t(queries.size()) * query_heads; i++) {
            const int64_t s = i / query_heads, head = i % query_heads;
            float maximum = sinks ? sinks[head] : -INFINITY, weight = 0;
            for (int64_t p = first_part[size_t(s)]; p < first_part[size_t(s) + 1]; p++) maximum = std::max(maximum, partial[p * floats + query_heads * value_width + head]);
            if (sinks) weight = expf(sinks[head] - maximum);
            float sums[2048] = {};
            for (int64_t p = first_part[size_t(s)]; p < first_part[size_t(s) + 1]; p++) {
                const float* at = partial + p * floats;
                const float share = expf(at[query_heads * value_width + head] - maximum);
                weight += share * at[query_heads * (value_width + 1) + head];
                for (int64_t c = 0; c < value_width; c++) sums[c] += share * at[head * value_width + c];
            }
            const int64_t to = (queries[size_t(s)].row * query_heads + head) * value_width;
            const float inverse = weight > 0 ? 1.0f / weight : 0.0f;
            for (int64_t c = 0; c < value_width; c++) {
                const float value = sums[c] * inverse;
                if (bf16_) {
                    uint32_t bits;
                    memcpy(&bits, &value, 4);
                    static_cast<uint16_t*>(out)[to + c] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                } else {
                    static_cast<float*>(out)[to + c] = value;
                }
            }
        }
    }
}

}  // namespace kvshare
