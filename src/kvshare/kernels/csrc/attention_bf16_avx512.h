// Scores of and sums over bfloat16 rows for AVX512 with BF16: dot products of pairs, the heads of a group together, so that a row is read from
// memory once. Weights are rounded to bfloat16 before they meet the values, as in torch's own kernels; sums are float32.
#pragma once

inline __mmask32 first_words(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

constexpr int HALF = ATTEND_ROWS / 2;

// scores[h * ATTEND_ROWS + t] = q[h] . k[t] for Heads heads and the HALF rows from k on, 16 / Heads of them at a time (4 where Heads is 3).
template <int Heads>
inline void score(const uint8_t* q, int64_t query_bytes, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    Ahead ahead = asked;
    constexpr int Rows = Heads == 3 ? 4 : 16 / Heads;
    for (int t = 0; t < HALF; t += Rows) {
        __m512 products[16];
        for (auto& p : products) p = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 32) {
            const __mmask32 mask = first_words(width - i);
            __m512bh row[Rows];
            for (int j = 0; j < Rows; j++) {
                row[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, k[t + j] + offset + 2 * i);
                if (j % 4 == 3) ahead.ask<true>(4 * Heads);
            }
            for (int h = 0; h < Heads; h++) {
                const __m512bh head = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + h * query_bytes + 2 * i);
                for (int j = 0; j < Rows; j++) products[h * Rows + j] = _mm512_dpbf16_ps(products[h * Rows + j], row[j], head);
            }
        }
        alignas(64) float sums[16];
        _mm512_store_ps(sums, sums_of(products));
        for (int h = 0; h < Heads; h++) memcpy(scores + h * ATTEND_ROWS + t, sums + h * Rows, Rows * sizeof(float));
    }
    asked = ahead;
}

// out[h] += sum over t of p[h][t] * v[t] for Heads heads, two rows at a time; p are pairs of bfloat16.
template <int Heads>
inline void sum_up(const uint32_t* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    Ahead ahead = asked;
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
            ahead.ask<true>(2 * Heads);
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
    asked = ahead;
}

inline void score_bf16(int heads, const uint8_t* q, int64_t query_bytes, int width, const uint8_t* const* k, int64_t offset, Ahead& ahead, float* scores) {
    for (int t = 0; t < ATTEND_ROWS; t += HALF)
        for (int h = 0; h < heads;) {
            const uint8_t* at = q + h * query_bytes;
            float* to = scores + h * ATTEND_ROWS + t;
            if (heads - h >= 4) score<4>(at, query_bytes, width, k + t, offset, ahead, to), h += 4;
            else if (heads - h == 3) score<3>(at, query_bytes, width, k + t, offset, ahead, to), h += 3;
            else if (heads - h >= 2) score<2>(at, query_bytes, width, k + t, offset, ahead, to), h += 2;
            else score<1>(at, query_bytes, width, k + t, offset, ahead, to), h += 1;
        }
}

inline void sum_bf16(int heads, const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& ahead, float* out) {
    alignas(64) uint32_t pairs[HEADS_TOGETHER * HALF];
    for (int h = 0; h < heads; h++)
        _mm512_store_si512(pairs + h * HALF, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(p + h * ATTEND_ROWS + HALF), _mm512_load_ps(p + h * ATTEND_ROWS)));
    for (int h = 0; h < heads;) {
        const uint32_t* at = pairs + h * HALF;
        float* to = out + int64_t(h) * width;
        if (heads - h >= 8) sum_up<8>(at, width, v, offset, count, ahead, to), h += 8;
        else if (heads - h >= 4) sum_up<4>(at, width, v, offset, count, ahead, to), h += 4;
        else if (heads - h == 3) sum_up<3>(at, width, v, offset, count, ahead, to), h += 3;
        else if (heads - h >= 2) sum_up<2>(at, width, v, offset, count, ahead, to), h += 2;
        else sum_up<1>(at, width, v, offset, count, ahead, to), h += 1;
    }
}

// How often `score_bf16` and `sum_bf16` each ask for rows ahead, for all the heads of a group: once for each piece of 32 numbers and each head that
// meets it, so that asking goes on evenly while the work does; what is asked for in bursts, processors drop.
inline int bf16_asks(int width, int group) { return (width + 31) / 32 * int(ATTEND_ROWS) * group; }
