// Scores of and sums over bfloat16 rows for AVX512 with BF16: dot products of pairs, the heads of a group together, so that a row is read from
// memory once. Weights are rounded to bfloat16 before they meet the values, as in torch's own kernels; sums are float32.
#pragma once

inline __mmask32 first_words(int count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

constexpr int HALF = ATTEND_ROWS / 2;

// 32 numbers of a row, or as many as there are.
template <bool Whole>
struct Piece {
    __mmask32 mask;

    [[gnu::always_inline]] __m512i load(const uint8_t* at) const {
        if constexpr (Whole) return _mm512_loadu_si512(at);
        return _mm512_maskz_loadu_epi16(mask, at);
    }
    [[gnu::always_inline]] __m512 half(const float* at, int which) const {
        if constexpr (Whole) return _mm512_loadu_ps(at + 16 * which);
        return _mm512_maskz_loadu_ps(__mmask16(mask >> 16 * which), at + 16 * which);
    }
    [[gnu::always_inline]] void store_half(float* at, int which, __m512 x) const {
        if constexpr (Whole) _mm512_storeu_ps(at + 16 * which, x);
        else _mm512_mask_storeu_ps(at + 16 * which, __mmask16(mask >> 16 * which), x);
    }
};

// work(i, piece) for each piece of a head of `width` numbers. A single head waits for memory whatever it does, and was read 4 % faster with masks.
template <int Heads, typename Work>
[[gnu::always_inline]] inline void each_piece(int width, Work&& work) {
    int i = 0;
    if constexpr (Heads > 1)
        for (; i + 32 <= width; i += 32) work(i, Piece<true>{0xffffffffu});
    for (; i < width; i += 32) work(i, Piece<false>{first_words(width - i)});
}

// scores[h * ATTEND_ROWS + t] = q[h] . k[t] for Heads heads and the HALF rows from k on, 16 / Heads of them at a time (4 where Heads is 3). In q, the
// heads' pieces of 32 numbers lie side by side, those of the next 32 numbers `step` bytes behind.
template <int Heads>
inline void score(const uint8_t* q, int64_t step, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    Ahead ahead = asked;
    constexpr int Rows = Heads == 3 ? 4 : 16 / Heads, asking = Rows < 4 ? Rows : 4;
    for (int t = 0; t < HALF; t += Rows) {
        __m512 products[16];
        for (auto& p : products) p = _mm512_setzero_ps();
        const uint8_t *rows[Rows], *heads = q;
        for (int j = 0; j < Rows; j++) rows[j] = k[t + j] + offset;
        each_piece<Heads>(width, [&](int i, auto piece) __attribute__((always_inline)) {
            __m512bh row[Rows];
            each<Rows>([&](auto j) __attribute__((always_inline)) {
                row[j] = (__m512bh)piece.load(rows[j] + 2 * i);
                if (j % asking == asking - 1) ahead.ask<true>(asking * Heads);
            });
            each<Heads>([&](auto h) __attribute__((always_inline)) {
                const __m512bh head = (__m512bh)_mm512_load_si512(heads + 64 * h);
                each<Rows>([&](auto j) __attribute__((always_inline)) { products[h * Rows + j] = _mm512_dpbf16_ps(products[h * Rows + j], row[j], head); });
            });
            heads += step;
        });
        const __m512 sums = sums_of(products);
        if constexpr (Rows == 2) {
            each<Heads / 2>([&](auto i) __attribute__((always_inline)) {
                const __m128 two_heads = _mm512_extractf32x4_ps(sums, i);
                _mm_storel_pi(reinterpret_cast<__m64*>(scores + 2 * i * ATTEND_ROWS + t), two_heads);
                _mm_storeh_pi(reinterpret_cast<__m64*>(scores + (2 * i + 1) * ATTEND_ROWS + t), two_heads);
            });
        } else {
            alignas(64) float numbers[16];
            _mm512_store_ps(numbers, sums);
            for (int h = 0; h < Heads; h++) memcpy(scores + h * ATTEND_ROWS + t, numbers + h * Rows, Rows * sizeof(float));
        }
    }
    asked = ahead;
}

// Which words of two rows make their first 16 pairs, and their last.
struct PairOrder {
    alignas(64) uint16_t low[32], high[32];
    constexpr PairOrder() : low(), high() {
        for (int i = 0; i < 32; i++) {
            low[i] = uint16_t(i / 2 + (i & 1) * 32);
            high[i] = uint16_t(i / 2 + 16 + (i & 1) * 32);
        }
    }
};

// out[h] += sum over t of p[h][t] * v[t] for Heads heads, two rows at a time; p are pairs of bfloat16.
template <int Heads>
inline void sum_up(const uint32_t* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    Ahead ahead = asked;
    static constexpr PairOrder order;
    const __m512i low = _mm512_load_si512(order.low), high = _mm512_load_si512(order.high);
    each_piece<Heads>(width, [&](int i, auto piece) __attribute__((always_inline)) {
        __m512 sums[2 * Heads];
        each<2 * Heads>([&](auto s) __attribute__((always_inline)) { sums[s] = piece.half(out + s / 2 * width + i, s % 2); });
        for (int t = 0; t < count; t += 2) {
            const __m512i a = piece.load(v[t] + offset + 2 * i), b = piece.load(v[t + 1] + offset + 2 * i);
            ahead.ask<true>(2 * Heads);
            const __m512bh left = (__m512bh)_mm512_permutex2var_epi16(a, low, b), right = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
            each<Heads>([&](auto h) __attribute__((always_inline)) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(p[h * HALF + t / 2]));
                sums[2 * h] = _mm512_dpbf16_ps(sums[2 * h], pair, left);
                sums[2 * h + 1] = _mm512_dpbf16_ps(sums[2 * h + 1], pair, right);
            });
        }
        each<2 * Heads>([&](auto s) __attribute__((always_inline)) { piece.store_half(out + s / 2 * width + i, s % 2, sums[s]); });
    });
    asked = ahead;
}

// The `heads` <= HEADS_TOGETHER at q, as `spell_pieces` wrote them.
inline void score_bf16(int heads, const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& ahead, float* scores) {
    const int64_t step = 64 * heads;
    for (int t = 0; t < ATTEND_ROWS; t += HALF)
        for (int h = 0; h < heads;) {
            const uint8_t* at = q + 64 * h;
            float* to = scores + h * ATTEND_ROWS + t;
            if (heads - h >= 8) score<8>(at, step, width, k + t, offset, ahead, to), h += 8;
            else if (heads - h >= 4) score<4>(at, step, width, k + t, offset, ahead, to), h += 4;
            else if (heads - h == 3) score<3>(at, step, width, k + t, offset, ahead, to), h += 3;
            else if (heads - h >= 2) score<2>(at, step, width, k + t, offset, ahead, to), h += 2;
            else score<1>(at, step, width, k + t, offset, ahead, to), h += 1;
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
