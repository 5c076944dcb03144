// Attention to bfloat16 rows for AVX512 with BF16: scores and weighted sums by dot products of pairs, the heads of a group together, so that
// a row is read from memory once. Weights are rounded to bfloat16 before they meet the values, as in torch's own kernels; sums are float32.
#pragma once

inline __m512 exponential(__m512 x) {  // within 2 ulp for x <= 0; zero below -87
    const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // 2^part by its series
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}

inline __m512 hyperbolic_tangent(__m512 x) {  // of any x: (1 - e) / (1 + e), e = exp(-2 |x|)
    const __m512 e = exponential(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f))), one = _mm512_set1_ps(1.0f);
    const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    return _mm512_or_ps(size, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

inline __mmask32 first_words(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

// Asks for rows that will be needed a few lines at a time, spread evenly over the work that goes on meanwhile: all at once they would fill
// the queues and stall it. With one KV head these are the values of this block and the keys of the next one; with several, whose vectors lie
// side by side in a row, the next block's keys and values, in the order in which they lie in memory.
struct Ahead {
    const uint8_t* const* rows;  // 2 * ATTEND_ROWS
    int lines[2];                // of a row of the first half and of the second
    int each;                    // lines to ask for at once
    int row = 0, line = 0;

    Ahead(const AttendRows& from, const AttendState& state, int times) {
        static_assert(offsetof(AttendRows, next_k) == offsetof(AttendRows, v) + sizeof from.v && offsetof(AttendRows, next_v) == offsetof(AttendRows, next_k) + sizeof from.next_k);
        const int key_lines = (state.kv_heads * state.key_width * 2 + 63) / 64, value_lines = (state.kv_heads * state.value_width * 2 + 63) / 64;
        const bool single = state.kv_heads == 1;
        rows = single ? from.v : from.next_k;
        lines[0] = single ? value_lines : key_lines;
        lines[1] = single ? key_lines : value_lines;
        each = (ATTEND_ROWS * (key_lines + value_lines) + times - 1) / times;
    }

    void ask() {
        for (int i = 0; i < each && row < 2 * ATTEND_ROWS; i++) {
            _mm_prefetch(reinterpret_cast<const char*>(rows[row]) + 64 * line, _MM_HINT_T0);
            if (++line == lines[row >= ATTEND_ROWS]) {
                line = 0;
                row++;
            }
        }
    }
};

constexpr int HALF = ATTEND_ROWS / 2;

// scores[h * ATTEND_ROWS + t] = q[h] . k[t] for Heads heads and the HALF rows from k on, 16 / Heads of them at a time.
template <int Heads>
inline void score(const uint16_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& ahead, float* scores) {
    constexpr int Rows = 16 / Heads;
    for (int t = 0; t < HALF; t += Rows) {
        __m512 products[16];
        for (auto& p : products) p = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 32) {
            const __mmask32 mask = first_words(width - i);
            __m512bh row[Rows];
            for (int j = 0; j < Rows; j++) row[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, k[t + j] + offset + 2 * i);
            ahead.ask();
            for (int h = 0; h < Heads; h++) {
                const __m512bh head = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + h * width + i);
                for (int j = 0; j < Rows; j++) products[h * Rows + j] = _mm512_dpbf16_ps(products[h * Rows + j], row[j], head);
            }
        }
        alignas(64) float sums[16];
        _mm512_store_ps(sums, sums_of(products));
        for (int h = 0; h < Heads; h++) memcpy(scores + h * ATTEND_ROWS + t, sums + h * Rows, Rows * sizeof(float));
    }
}

// out[h] += sum over t of p[h][t] * v[t] for Heads heads, two rows at a time; p are pairs of bfloat16.
template <int Heads>
inline void sum_up(const uint32_t* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& ahead, float* out) {
    alignas(64) static const struct Order {
        uint16_t low[32], high[32];
        Order() {
            for (int i = 0; i < 32; i++) {
                low[i] = uint16_t(i / 2 + (i & 1) * 32);
                high[i] = uint16_t(i / 2 + 16 + (i & 1) * 32);
            }
        }
    } order;
    const __m512i low = _mm512_load_si512(order.low), high = _mm512_load_si512(order.high);
    for (int i = 0; i < width; i += 32) {
        const __mmask32 mask = first_words(width - i);
        const __mmask16 first = __mmask16(mask), second = __mmask16(mask >> 16);
        __m512 sums[2 * Heads];
        for (int h = 0; h < Heads; h++) {
            sums[2 * h] = _mm512_maskz_loadu_ps(first, out + h * width + i);
            sums[2 * h + 1] = _mm512_maskz_loadu_ps(second, out + h * width + i + 16);
        }
        for (int t = 0; t < count; t += 2) {
            const __m512i a = _mm512_maskz_loadu_epi16(mask, v[t] + offset + 2 * i), b = _mm512_maskz_loadu_epi16(mask, v[t + 1] + offset + 2 * i);
            ahead.ask();
            const __m512bh left = (__m512bh)_mm512_permutex2var_epi16(a, low, b), right = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
            for (int h = 0; h < Heads; h++) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(p[h * HALF + t / 2]));
                sums[2 * h] = _mm512_dpbf16_ps(sums[2 * h], pair, left);
                sums[2 * h + 1] = _mm512_dpbf16_ps(sums[2 * h + 1], pair, right);
            }
        }
        for (int h = 0; h < Heads; h++) {
            _mm512_mask_storeu_ps(out + h * width + i, first, sums[2 * h]);
            _mm512_mask_storeu_ps(out + h * width + i + 16, second, sums[2 * h + 1]);
        }
    }
}

// From raw scores to weights, as pairs of bfloat16, with the running maximum, sum and output of one head brought along.
inline void weigh(const float* scores, int count, const AttendState& state, int head, uint32_t* p) {
    __m512 s[2];
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < 2; i++) {
        s[i] = _mm512_mul_ps(_mm512_load_ps(scores + 16 * i), _mm512_set1_ps(state.scale));
        if (state.softcap > 0)
            s[i] = _mm512_mul_ps(hyperbolic_tangent(_mm512_mul_ps(s[i], _mm512_set1_ps(1.0f / state.softcap))), _mm512_set1_ps(state.softcap));
        const __mmask16 real = __mmask16(first_words(count) >> (16 * i));
        s[i] = _mm512_mask_blend_ps(real, _mm512_set1_ps(-INFINITY), s[i]);
        largest = _mm512_max_ps(largest, s[i]);
    }
    const float top = _mm512_reduce_max_ps(largest);
    if (top > state.maximum[head]) {
        const float shrink = expf(state.maximum[head] - top);
        state.maximum[head] = top;
        state.weight[head] *= shrink;
        float* out = state.out + int64_t(head) * state.value_width;
        for (int i = 0; i < state.value_width; i++) out[i] *= shrink;
    }
    for (int i = 0; i < 2; i++) {
        const __mmask16 real = __mmask16(first_words(count) >> (16 * i));
        s[i] = _mm512_maskz_mov_ps(real, exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(state.maximum[head]))));
    }
    state.weight[head] += _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1]));
    _mm512_store_si512(p, (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]));
}

inline void attend_bf16(const AttendRows& rows, const AttendState& state) {
    constexpr int AT_ONCE = 16;  // heads whose scores are kept
    alignas(64) float scores[AT_ONCE * ATTEND_ROWS];
    alignas(64) uint32_t p[AT_ONCE * HALF];
    const int key_width = state.key_width, value_width = state.value_width, key_chunks = (key_width + 31) / 32, value_chunks = (value_width + 31) / 32;
    // how often `score` and `sum_up` ask: heads are taken in fours (eights), twos and ones
    const int group = state.group, ones = group & 1, twos = group >> 1 & 1, fours = group >> 2 & 1;
    Ahead ahead(rows, state, state.kv_heads * (key_chunks * (group / 4 * 8 + twos * 4 + ones * 2) + value_chunks * HALF * (group / 8 + fours + twos + ones)));
    for (int kv_head = 0; kv_head < state.kv_heads; kv_head++) {
        const int64_t k_offset = int64_t(kv_head) * key_width * 2, v_offset = int64_t(kv_head) * value_width * 2;
        for (int begin = 0; begin < group; begin += AT_ONCE) {
            const int head = kv_head * group + begin, heads = group - begin < AT_ONCE ? group - begin : AT_ONCE;
            const uint16_t* q = static_cast<const uint16_t*>(state.q) + int64_t(head) * key_width;
            for (int t = 0; t < ATTEND_ROWS; t += HALF)
                for (int h = 0; h < heads;) {
                    const uint16_t* at = q + int64_t(h) * key_width;
                    float* to = scores + h * ATTEND_ROWS + t;
                    if (heads - h >= 4) score<4>(at, key_width, rows.k + t, k_offset, ahead, to), h += 4;
                    else if (heads - h >= 2) score<2>(at, key_width, rows.k + t, k_offset, ahead, to), h += 2;
                    else score<1>(at, key_width, rows.k + t, k_offset, ahead, to), h += 1;
                }
            for (int h = 0; h < heads; h++) weigh(scores + h * ATTEND_ROWS, rows.count, state, head + h, p + h * HALF);
            for (int h = 0; h < heads;) {
                const uint32_t* at = p + h * HALF;
                float* to = state.out + int64_t(head + h) * value_width;
                if (heads - h >= 8) sum_up<8>(at, value_width, rows.v, v_offset, rows.count, ahead, to), h += 8;
                else if (heads - h >= 4) sum_up<4>(at, value_width, rows.v, v_offset, rows.count, ahead, to), h += 4;
                else if (heads - h >= 2) sum_up<2>(at, value_width, rows.v, v_offset, rows.count, ahead, to), h += 2;
                else sum_up<1>(at, value_width, rows.v, v_offset, rows.count, ahead, to), h += 1;
            }
        }
    }
}
