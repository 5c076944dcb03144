// Scores of encoded rows for AVX512 with VNNI: codes meet integers where they are read, and become float32 only as sums. Keys are turned so that lanes
// are rows, and read once for all the heads of a slice.
#pragma once

inline __m512i broadcast(const void* four) {
    int32_t value;
    memcpy(&value, four, 4);
    return _mm512_set1_epi32(value);
}

// Two tiles of 16 rows each, so that what a query brings is loaded once for 32.
template <bool Whole, RowKind Kind>
[[gnu::always_inline]] inline void row_tiles(const Codes<Kind>& codes, const uint8_t* const* rows, int64_t offset, __mmask16 mask, __m512i (*tiles)[4]) {
    each<2>([&](auto i) INLINE { row_tile<Whole>(codes, rows + 16 * i, offset, mask, tiles[i]); });
}

// Sums of `Heads` heads with so many passes each, for 32 rows, are two registers a head and pass: how many slices of heads do they take?
constexpr int score_slices(RowKind kind, int heads) { return kind == RowKind::INT9 && heads > 4 ? 2 : 1; }

// scores[h * ATTEND_ROWS + t] = q[h] . k[t] for Heads heads from head `first` on, of `all`
template <RowKind Kind, int Heads, int All>
void score_slice(const uint8_t* q, int first, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    using Form = Codes<Kind>;
    using Spelled = SpelledQuery<Kind>;
    constexpr int passes = Spelled::passes, planes = Spelled::planes;
    const Form codes = Form::without_signs();
    const Spelled query(q, width, All);
    Ahead ahead = asked;
    __m512 scales[2];
    row_scales(k, offset + code_bytes(Kind, width), scales);
    __m512i sums[passes][Heads][2];
    each<Heads>([&](auto h) INLINE {
        each<passes>([&](auto pass) INLINE {
            each<2>([&](auto i) INLINE { sums[pass][h][i] = _mm512_set1_epi32(query.minus[(first + h) * passes + pass]); });
        });
    });
    Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
        __m512i tiles[2][4];
        ahead.evenly_eight();  // before there are tiles: gcc 12 would keep them in memory meanwhile
        row_tiles<whole>(codes, k, offset + int64_t(chunk) * Form::step, mask, tiles);
        const int8_t* at = query.codes + (int64_t(chunk) * Form::numbers * planes * All + first * 4);
        const auto add = [&](auto& to, const int8_t* four, __m512i one, __m512i two) INLINE {
            const __m512i by = broadcast(four);
            add_products(to[0], one, by);
            add_products(to[1], two, by);
        };
        if constexpr (Kind == RowKind::INT9) {
            __m512i ninths[2][4];
            const int64_t from = offset + width + 2 * chunk;
            each<2>([&](auto i) INLINE {
                const uint8_t* const* rows = k + 16 * i;
                each<4>([&](auto r) INLINE { ninths[i][r] = four_ninths(rows[r] + from, rows[4 + r] + from, rows[8 + r] + from, rows[12 + r] + from); });
                turn(ninths[i]);
            });
            each<4>([&](auto j) INLINE {
                each<Heads>([&](auto h) INLINE { add(sums[0][h], at + ((j * planes + 2) * All + h) * 4, ninths[0][j], ninths[1][j]); });
            });
        }
        each<Form::fields>([&](auto field) INLINE {
            each<4>([&](auto j) INLINE {
                const __m512i one = codes.template bytes<field>(tiles[0][j]), two = codes.template bytes<field>(tiles[1][j]);
                each<Heads>([&](auto h) INLINE {
                    each<passes>([&](auto pass) INLINE { add(sums[pass][h], at + (((field * 4 + j) * planes + pass) * All + h) * 4, one, two); });
                });
            });
        });
    });
    each<2>([&](auto i) INLINE {
        each<Heads>([&](auto h) INLINE {
            __m512 sum = _mm512_cvtepi32_ps(sums[0][h][i]);
            if constexpr (passes == 2) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums[1][h][i]));
            const float unit = query.scale[first + h];
            _mm512_store_ps(scores + (first + h) * ATTEND_ROWS + 16 * i, _mm512_mul_ps(sum, _mm512_mul_ps(scales[i], _mm512_set1_ps(unit))));
        });
    });
    asked = ahead;
}

template <RowKind Kind, int Heads>
void score_rows(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& ahead, float* scores) {
    if constexpr (score_slices(Kind, Heads) == 2) {
        score_slice<Kind, Heads / 2, Heads>(q, 0, width, k, offset, ahead, scores);
        score_slice<Kind, Heads - Heads / 2, Heads>(q, Heads / 2, width, k, offset, ahead, scores);
    } else {
        score_slice<Kind, Heads, Heads>(q, 0, width, k, offset, ahead, scores);
    }
}

// The same for INT8: sixteen numbers of the query have a scale of their own.
template <int Heads>
void score_bytes(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    using Form = Codes<RowKind::INT8>;
    const Form codes = Form::without_signs();
    const SpelledQuery<RowKind::INT8> query(q, width, Heads);
    Ahead ahead = asked;
    __m512 sums[Heads][2];
    each<Heads>([&](auto h) INLINE { sums[h][0] = sums[h][1] = _mm512_set1_ps(query.sum[h]); });
    Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
        __m512i tiles[2][4];
        ahead.evenly_eight();
        row_tiles<whole>(codes, k, offset + 16 * chunk, mask, tiles);
        each<4>([&](auto j) INLINE { each<2>([&](auto i) INLINE { tiles[i][j] = codes.bytes<0>(tiles[i][j]); }); });
        const int8_t* at = query.codes + int64_t(16) * Heads * chunk;
        const float* scale = query.scale + Heads * chunk;
        each<Heads>([&](auto h) INLINE {
            __m512i products[2] = {};
            each<4>([&](auto j) INLINE {
                const __m512i by = broadcast(at + (j * Heads + h) * 4);
                each<2>([&](auto i) INLINE { add_products(products[i], tiles[i][j], by); });
            });
            const __m512 unit = _mm512_set1_ps(scale[h]);
            each<2>([&](auto i) INLINE { sums[h][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), unit, sums[h][i]); });
        });
    });
    __m512 scales[2];
    row_scales(k, offset + width, scales);
    each<2>([&](auto i) INLINE {
        each<Heads>([&](auto h) INLINE { _mm512_store_ps(scores + h * ATTEND_ROWS + 16 * i, _mm512_mul_ps(sums[h][i], scales[i])); });
    });
    asked = ahead;
}

// The same for INT4: sums of a group meet its scale, and its minimum the sum of the query.
template <int Heads>
void score_groups(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    using Form = Codes<RowKind::INT4>;
    using Spelled = SpelledQuery<RowKind::INT4>;
    static_assert(Form::numbers == INT4_GROUP);
    const Form codes = Form::without_signs();
    const Spelled query(q, width, Heads);
    Ahead ahead = asked;
    const int groups = groups_of(width);
    alignas(64) float scalars[2 * (WIDEST_HEAD / INT4_GROUP) * ATTEND_ROWS];
    group_scalars(k, offset + code_bytes(RowKind::INT4, width), 2 * groups, scalars);
    __m512 of_minima[Heads][2];
    each<Heads>([&](auto h) INLINE { of_minima[h][0] = of_minima[h][1] = _mm512_setzero_ps(); });
    for (int g = 0; g < groups; g++) {
        const float* minima = scalars + (groups + g) * ATTEND_ROWS;
        const __m512 one = _mm512_load_ps(minima), two = _mm512_load_ps(minima + 16);
        each<Heads>([&](auto h) INLINE {
            const __m512 sum = _mm512_set1_ps(query.sum[g * Heads + h]);
            of_minima[h][0] = _mm512_fmadd_ps(one, sum, of_minima[h][0]);
            of_minima[h][1] = _mm512_fmadd_ps(two, sum, of_minima[h][1]);
        });
    }
    each<Heads>([&](auto h) INLINE { each<2>([&](auto i) INLINE { _mm512_store_ps(scores + h * ATTEND_ROWS + 16 * i, of_minima[h][i]); }); });
    Form::pieces(width, [&](int g, auto whole, __mmask16 mask) INLINE {
        __m512i tiles[2][4], sums[Heads][2];
        ahead.evenly_eight();
        row_tiles<whole>(codes, k, offset + 16 * g, mask, tiles);
        each<Heads>([&](auto h) INLINE { sums[h][0] = sums[h][1] = _mm512_setzero_si512(); });
        const int8_t* at = query.codes + int64_t(32) * Heads * g;
        each<4>([&](auto j) INLINE {
            each<2>([&](auto field) INLINE {
                const __m512i one = codes.bytes<field>(tiles[0][j]), two = codes.bytes<field>(tiles[1][j]);
                each<Heads>([&](auto h) INLINE {
                    const __m512i by = broadcast(at + ((field * 4 + j) * Heads + h) * 4);
                    add_products(sums[h][0], one, by);
                    add_products(sums[h][1], two, by);
                });
            });
        });
        each<2>([&](auto i) INLINE {
            const __m512 scale = _mm512_load_ps(scalars + g * ATTEND_ROWS + 16 * i);
            each<Heads>([&](auto h) INLINE {
                float* to = scores + h * ATTEND_ROWS + 16 * i;
                const __m512 unit = _mm512_mul_ps(scale, _mm512_set1_ps(query.scale[g * Heads + h]));
                _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[h][i]), unit, _mm512_load_ps(to)));
            });
        });
    });
    asked = ahead;
}

// The same for FP8, in pairs of bfloat16.
template <int Heads>
void score_eighths(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& asked, float* scores) {
    using Form = Codes<RowKind::FP8>;
    const Form codes = Form::without_signs();
    Ahead ahead = asked;
    static const EighthFloats tables;
    const EighthFloats floats = tables;
    __m512 sums[Heads][2];
    each<Heads>([&](auto h) INLINE { sums[h][0] = sums[h][1] = _mm512_setzero_ps(); });
    Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
        __m512i tiles[2][4];
        ahead.evenly_eight();
        row_tiles<whole>(codes, k, offset + 16 * chunk, mask, tiles);
        each<4>([&](auto j) INLINE {
            __m512bh even[2], odd[2];
            each<2>([&](auto i) INLINE { floats.pairs(tiles[i][j], even + i, odd + i); });
            const uint8_t* at = q + (4 * chunk + j) * 8 * Heads;
            each<Heads>([&](auto h) INLINE {
                const __m512bh first = (__m512bh)broadcast(at + 8 * h), second = (__m512bh)broadcast(at + 8 * h + 4);
                each<2>([&](auto i) INLINE { add_pairs(sums[h][i], even[i], first); });
                each<2>([&](auto i) INLINE { add_pairs(sums[h][i], odd[i], second); });
            });
        });
    });
    __m512 scales[2];
    row_scales(k, offset + width, scales);
    each<2>([&](auto i) INLINE {
        each<Heads>([&](auto h) INLINE { _mm512_store_ps(scores + h * ATTEND_ROWS + 16 * i, _mm512_mul_ps(sums[h][i], scales[i])); });
    });
    asked = ahead;
}

using ScoreRows = void (*)(const uint8_t* q, int width, const uint8_t* const* k, int64_t offset, Ahead& ahead, float* scores);  // of ATTEND_ROWS rows

// The functions for 1 ... HEADS_TOGETHER heads.
template <RowKind Kind, int... Before>
inline ScoreRows score_of(int heads, std::integer_sequence<int, Before...>) {
    if constexpr (Kind == RowKind::INT4) {
        static constexpr ScoreRows all[] = {score_groups<Before + 1>...};
        return all[heads - 1];
    } else if constexpr (Kind == RowKind::INT8) {
        static constexpr ScoreRows all[] = {score_bytes<Before + 1>...};
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

// How often `score_codes` and `sum_codes` ask for rows ahead, for a group of heads.
inline int codes_asks(RowKind kind, int width) {
    const int numbers = 16 * (kind == RowKind::LEVELS3 ? 1 : 8 / bits_of(kind));  // of a piece
    return (width + numbers - 1) / numbers * (ATTEND_ROWS / 4);
}
inline int score_asks(RowKind kind, int width, int group) {
    int slices = 0;
    for (int begin = 0; begin < group; begin += HEADS_TOGETHER) slices += score_slices(kind, group - begin < HEADS_TOGETHER ? group - begin : HEADS_TOGETHER);
    return slices * codes_asks(kind, width);
}
