// Scores of encoded rows for AVX512 with VNNI: codes meet integers where they are read, and become float32 only as sums. Keys are turned so that lanes
// are rows, and read once for all the heads of a slice.
#pragma once

#define INLINE __attribute__((always_inline))  // of a lambda: what it captures stays in registers

inline __m512i broadcast(const void* four) {
    int32_t value;
    memcpy(&value, four, 4);
    return _mm512_set1_epi32(value);
}

// scores[h * ATTEND_ROWS + t] = q[h] . k[t]
template <RowKind Kind, int Heads>
void score_rows(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, int count, Ahead& asked, float* scores) {
    using Form = Codes<Kind>;
    using Spelled = SpelledQuery<Kind>;
    constexpr int passes = Spelled::passes, planes = Spelled::planes;
    const Form codes = Form::without_signs();
    const Spelled query(q, width, Heads);
    Ahead ahead = asked;
    alignas(64) float scales[ATTEND_ROWS];
    row_scales(k, offset + code_bytes(Kind, width), scales);
    constexpr int chains = Heads * passes <= 4 ? 4 : Heads * passes <= 8 ? 2 : 1;  // sums side by side where one would wait for itself
    for (int t = 0; t < count; t += 16) {
        __m512i sums[passes][Heads][chains] = {};
        each<Heads>([&](auto h) INLINE { each<passes>([&](auto pass) INLINE { sums[pass][h][0] = _mm512_set1_epi32(query.minus[h * passes + pass]); }); });
        Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
            __m512i tile[4];
            row_tile<whole>(codes, k + t, offset + int64_t(chunk) * Form::step, mask, tile);
            ahead.ask(4);
            const int8_t* at = query.codes + int64_t(chunk) * Form::numbers * planes * Heads;
            if constexpr (Kind == RowKind::INT9) {
                __m512i ninths[4];
                const int64_t from = offset + width + 2 * chunk;
                each<4>([&](auto r) INLINE { ninths[r] = four_ninths(k[t + r] + from, k[t + 4 + r] + from, k[t + 8 + r] + from, k[t + 12 + r] + from); });
                turn(ninths);
                each<4>([&](auto j) INLINE {
                    each<Heads>([&](auto h) INLINE { add_products(sums[0][h][j % chains], ninths[j], at + ((j * planes + 2) * Heads + h) * 4); });
                });
            }
            each<Form::fields>([&](auto field) INLINE {
                each<4>([&](auto j) INLINE {
                    const __m512i four = codes.template bytes<field>(tile[j]);
                    each<Heads>([&](auto h) INLINE {
                        each<passes>([&](auto pass) INLINE {
                            add_products(sums[pass][h][j % chains], four, at + (((field * 4 + j) * planes + pass) * Heads + h) * 4);
                        });
                    });
                });
            });
        });
        const __m512 scale = _mm512_load_ps(scales + t);
        each<Heads>([&](auto h) INLINE {
            each<passes>([&](auto pass) INLINE {
                each<chains - 1>([&](auto chain) INLINE { sums[pass][h][0] = _mm512_add_epi32(sums[pass][h][0], sums[pass][h][chain + 1]); });
            });
            __m512 sum = _mm512_cvtepi32_ps(sums[0][h][0]);
            if constexpr (passes == 2) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[1][h][0]));
            const float unit = query.scale[h];
            _mm512_store_ps(scores + h * ATTEND_ROWS + t, _mm512_mul_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(unit))));
        });
    }
    asked = ahead;
}

// The same for INT4: sums of a group meet its scale, and its minimum the sum of the query.
template <int Heads>
void score_groups(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, int count, Ahead& asked, float* scores) {
    using Form = Codes<RowKind::INT4>;
    using Spelled = SpelledQuery<RowKind::INT4>;
    static_assert(Form::numbers == INT4_GROUP);
    const Form codes = Form::without_signs();
    const Spelled query(q, width, Heads);
    Ahead ahead = asked;
    const int groups = groups_of(width);
    alignas(64) float scalars[2 * (WIDEST_HEAD / INT4_GROUP) * ATTEND_ROWS];
    group_scalars(k, offset + code_bytes(RowKind::INT4, width), 2 * groups, scalars);
    for (int t = 0; t < count; t += 16) {
        __m512 scores_of[Heads];
        each<Heads>([&](auto h) INLINE { scores_of[h] = _mm512_setzero_ps(); });
        Form::pieces(width, [&](int g, auto whole, __mmask16 mask) INLINE {
            __m512i tile[4], sums[Heads];
            row_tile<whole>(codes, k + t, offset + 16 * g, mask, tile);
            ahead.ask(4);
            each<Heads>([&](auto h) INLINE { sums[h] = _mm512_setzero_si512(); });
            const int8_t* at = query.codes + int64_t(32) * Heads * g;
            each<4>([&](auto j) INLINE {
                const __m512i even = codes.bytes<0>(tile[j]), odd = codes.bytes<1>(tile[j]);
                each<Heads>([&](auto h) INLINE {
                    add_products(sums[h], even, at + (j * Heads + h) * 4);
                    add_products(sums[h], odd, at + ((4 + j) * Heads + h) * 4);
                });
            });
            const __m512 scale = _mm512_load_ps(scalars + g * ATTEND_ROWS + t), minimum = _mm512_load_ps(scalars + (groups + g) * ATTEND_ROWS + t);
            each<Heads>([&](auto h) INLINE {
                scores_of[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[h]), _mm512_mul_ps(scale, _mm512_set1_ps(query.scale[h * groups + g])), scores_of[h]);
                scores_of[h] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(query.sum[h * groups + g]), scores_of[h]);
            });
        });
        each<Heads>([&](auto h) INLINE { _mm512_store_ps(scores + h * ATTEND_ROWS + t, scores_of[h]); });
    }
    asked = ahead;
}

// The same for FP8, in pairs of bfloat16.
template <int Heads>
void score_eighths(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, int count, Ahead& asked, float* scores) {
    using Form = Codes<RowKind::FP8>;
    const Form codes = Form::without_signs();
    Ahead ahead = asked;
    static const EighthFloats tables;
    const EighthFloats floats = tables;
    alignas(64) float scales[ATTEND_ROWS];
    row_scales(k, offset + width, scales);
    for (int t = 0; t < count; t += 16) {
        __m512 sums[2][Heads];
        each<Heads>([&](auto h) INLINE { sums[0][h] = sums[1][h] = _mm512_setzero_ps(); });
        Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
            __m512i tile[4];
            row_tile<whole>(codes, k + t, offset + 16 * chunk, mask, tile);
            ahead.ask(4);
            each<4>([&](auto j) INLINE {
                __m512bh even, odd;
                floats.pairs(tile[j], &even, &odd);
                const uint8_t* at = q + (4 * chunk + j) * 8 * Heads;
                each<Heads>([&](auto h) INLINE {
                    add_pairs(sums[0][h], even, at + 8 * h);
                    add_pairs(sums[1][h], odd, at + 8 * h + 4);
                });
            });
        });
        const __m512 scale = _mm512_load_ps(scales + t);
        each<Heads>([&](auto h) INLINE { _mm512_store_ps(scores + h * ATTEND_ROWS + t, _mm512_mul_ps(_mm512_add_ps(sums[0][h], sums[1][h]), scale)); });
    }
    asked = ahead;
}

using ScoreRows = void (*)(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, int count, Ahead& ahead, float* scores);

// The functions for 1 ... HEADS_TOGETHER heads.
template <RowKind Kind, int... Before>
inline ScoreRows score_of(int heads, std::integer_sequence<int, Before...>) {
    if constexpr (Kind == RowKind::INT4) {
        static constexpr ScoreRows all[] = {score_groups<Before + 1>...};
        return all[heads - 1];
    } else if constexpr (Kind == RowKind::FP8) {
        static constexpr ScoreRows all[] = {score_eighths<Before + 1>...};
        return all[heads - 1];
    } else {
        static constexpr ScoreRows all[] = {score_rows<Kind, Before + 1>...};
        return all[heads - 1];
    }
}

using UpToEight = std::make_integer_sequence<int, HEADS_TOGETHER>;

inline ScoreRows score_codes(RowKind kind, int heads) {
    switch (kind) {
        case RowKind::INT9: return score_of<RowKind::INT9>(heads, UpToEight());
        case RowKind::INT4: return score_of<RowKind::INT4>(heads, UpToEight());
        case RowKind::FP8: return score_of<RowKind::FP8>(heads, UpToEight());
        case RowKind::LEVELS4: return score_of<RowKind::LEVELS4>(heads, UpToEight());
        case RowKind::LEVELS3: return score_of<RowKind::LEVELS3>(heads, UpToEight());
        case RowKind::LEVELS2: return score_of<RowKind::LEVELS2>(heads, UpToEight());
        default: return score_of<RowKind::INT8>(heads, UpToEight());
    }
}

// How often `score_codes` and `sum_codes` each ask for rows ahead, for a slice of heads.
inline int codes_asks(RowKind kind, int width) {
    const int numbers = 16 * (kind == RowKind::LEVELS3 ? 1 : 8 / bits_of(kind));  // of a piece
    return (width + numbers - 1) / numbers * (ATTEND_ROWS / 4);
}
