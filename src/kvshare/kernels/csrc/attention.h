// Attention to a few rows of the cache with a running softmax (Milakov and Gimelshein 2018), in plain C++ that compilers vectorise: a row is
// decoded into a small buffer for all heads that share it. Included once by each file of a set inside that set's namespace.
#pragma once

constexpr int WIDEST_HEAD = 2048;
constexpr int HEADS_AT_ONCE = 16;

inline void spell_plain(RowKind, int width, int, int head, const float* q, uint8_t* to) { memcpy(to + head * query_bytes(width), q, size_t(width) * sizeof(float)); }

inline void settle_plain(const AttendState&) {}

inline void merge_parts(const AttendedParts& parts, int heads, int head, int width, const float* sink, float* to) {
    const float *maxima = parts.sums + heads * width + head, *weights = maxima + heads, *sums = parts.sums + head * width;
    float maximum = sink ? *sink : -INFINITY;
    for (int64_t p = 0; p < parts.count; p++) maximum = maxima[p * parts.stride] > maximum ? maxima[p * parts.stride] : maximum;
    float weight = sink ? expf(*sink - maximum) : 0;
    for (int i = 0; i < width; i++) to[i] = 0;
    for (int64_t p = 0; p < parts.count; p++, sums += parts.stride) {
        const float share = expf(maxima[p * parts.stride] - maximum);
        weight += share * weights[p * parts.stride];
        for (int i = 0; i < width; i++) to[i] += share * sums[i];
    }
    const float whole = weight > 0 ? 1.0f / weight : 0.0f;
    for (int i = 0; i < width; i++) to[i] *= whole;
}

inline void attend_plain(const AttendRows& rows, const AttendState& state) {
    float row[WIDEST_HEAD], scores[HEADS_AT_ONCE][ATTEND_ROWS];
    const int key_width = state.key_width, value_width = state.value_width;
    const int slices = (state.group + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
    for (int slice = 0; slice < state.kv_heads * slices; slice++) {
        const int kv_head = slice / slices, done = slice % slices * HEADS_AT_ONCE, begin = kv_head * state.group + done;
        const int heads = state.group - done < HEADS_AT_ONCE ? state.group - done : HEADS_AT_ONCE;
        for (int t = 0; t < rows.count; t++) {
            const uint8_t* head = rows.k[t] + kv_head * head_bytes(state.keys, key_width);
            decode_heads(state.keys, key_width, &head, 1, row, 0, false);
            for (int h = 0; h < heads; h++) {
                const float* q = reinterpret_cast<const float*>(state.q + (begin + h) * state.query_bytes);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < key_width; i++) sum += q[i] * row[i];
                sum *= state.scale;
                scores[h][t] = state.softcap > 0 ? state.softcap * tanhf(sum / state.softcap) : sum;
            }
        }
        for (int h = 0; h < heads; h++) {
            float& maximum = state.maximum[begin + h];
            float largest = maximum;
            for (int t = 0; t < rows.count; t++) largest = scores[h][t] > largest ? scores[h][t] : largest;
            if (largest > maximum) {
                const float shrink = expf(maximum - largest);
                float* out = state.out + int64_t(begin + h) * value_width;
                maximum = largest;
                state.weight[begin + h] *= shrink;
                for (int i = 0; i < value_width; i++) out[i] *= shrink;
            }
            for (int t = 0; t < rows.count; t++) state.weight[begin + h] += scores[h][t] = expf(scores[h][t] - maximum);
        }
        for (int t = 0; t < rows.count; t++) {
            const uint8_t* head = rows.v[t] + kv_head * head_bytes(state.values, value_width);
            decode_heads(state.values, value_width, &head, 1, row, 0, false);
            for (int h = 0; h < heads; h++) {
                float* out = state.out + int64_t(begin + h) * value_width;
                const float weight = scores[h][t];
#pragma omp simd
                for (int i = 0; i < value_width; i++) out[i] += weight * row[i];
            }
        }
    }
}
