// Sums over encoded rows for AVX512 with VNNI: codes meet integers where they are read, and become float32 only as sums. Values are turned so that
// lanes are columns, and read once for all the heads of a slice.
#pragma once

// Sums of the columns that the fields of a byte hold, side by side again: field f of lane c is column fields * c + f.
template <int Fields>
inline void side_by_side(__m512* x) {
    if constexpr (Fields == 1) return;
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const auto zip = [&](__m512& a, __m512& b) {
        const __m512 first = _mm512_permutex2var_ps(a, low, b);
        b = _mm512_permutex2var_ps(a, high, b);
        a = first;
    };
    if constexpr (Fields == 2) zip(x[0], x[1]);
    if constexpr (Fields == 4) {  // (0 2) and (1 3), then those with each other
        zip(x[0], x[2]);
        zip(x[1], x[3]);
        zip(x[0], x[1]);
        zip(x[2], x[3]);
    }
}

// out += unit * sums + base for the columns of a piece. Whole pieces keep their fields apart until `settle_codes` puts them side by side.
template <int Fields, bool Whole>
[[gnu::always_inline]] inline void add_columns(const __m512i* sums, __m512 unit, auto base, int left, float* out) {  // `left`: columns up to the head's end
    if constexpr (Whole) {
        each<Fields>([&](auto f) INLINE {
            float* at = out + 16 * f;
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[f]), unit, base(_mm512_loadu_ps(at))));
        });
    } else {
        __m512 numbers[Fields];
        each<Fields>([&](auto f) INLINE { numbers[f] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[f]), unit, base(_mm512_setzero_ps())); });
        side_by_side<Fields>(numbers);
        each<Fields>([&](auto f) INLINE {
            const int here = left - 16 * f;
            const __mmask16 mask = here >= 16 ? 0xffff : here > 0 ? __mmask16((1 << here) - 1) : 0;
            _mm512_mask_storeu_ps(out + 16 * f, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out + 16 * f), numbers[f]));
        });
    }
}

// What is added to weights in units before they are cut off: a different fraction for each of the rows that share a unit. So what is lost of weights
// far below a unit is gained by others like them, where rounding each to the nearest would lose all of it.
struct Dither {
    alignas(64) float fractions[ATTEND_ROWS];
    alignas(64) uint16_t bytes[ATTEND_ROWS];  // in 256ths
    Dither() {
        for (int t = 0; t < ATTEND_ROWS; t++) {  // the bits of a row's number in reverse: neighbours lie far apart
            const int reversed = (t & 1) << 4 | (t & 2) << 2 | (t & 4) | (t & 8) >> 2 | (t & 16) >> 4;
            fractions[t] = (float(reversed) + 0.5f) / float(ATTEND_ROWS);
            bytes[t] = uint16_t(256.0f * fractions[t]);
        }
    }
};
static_assert(ATTEND_ROWS == 32);

inline const Dither& dither() {
    static const Dither fractions;
    return fractions;
}

// The weights of a block of rows as integers in bytes. Of 8 bits, the largest is 255; of 16, as upper bytes and then lower ones, 65,535.
template <int Passes>
struct Weights {
    alignas(32) uint8_t bytes[Passes][ATTEND_ROWS];
    alignas(32) uint8_t half[Passes == 2 ? ATTEND_ROWS : 32];  // half of the upper ones of 16 bits, which the ninth bits of INT9 meet
    float unit;

    // Values are `larger` times what their codes say.
    void set(__m512 first, __m512 second, float top, float larger) {
        constexpr float largest = Passes == 2 ? 65535.0f : 255.0f;
        unit = top * (larger / largest);
        const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? largest / top : 0.0f);
        const __m512 both[2] = {first, second};
        for (int i = 0; i < 2; i++) {
            if constexpr (Passes == 2) {
                const __m512i w = _mm512_cvtps_epi32(_mm512_mul_ps(both[i], inverse));
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + 16 * i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 8)));
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes[1] + 16 * i), _mm512_cvtepi32_epi8(w));
                _mm_store_si128(reinterpret_cast<__m128i*>(half + 16 * i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(256)), 9)));
            } else {
                const __m512i w = _mm512_cvttps_epi32(_mm512_fmadd_ps(both[i], inverse, _mm512_load_ps(dither().fractions + 16 * i)));
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + 16 * i), _mm512_cvtepi32_epi8(w));
            }
        }
    }
};

// How many slices of heads the sums of a piece take in registers.
constexpr int sum_slices(RowKind kind, int heads) {
    const int fields = kind == RowKind::LEVELS2 ? 4 : kind == RowKind::LEVELS4 ? 2 : 1, sums = heads * fields * (kind == RowKind::INT9 ? 2 : 1);
    return sums <= 16 ? 1 : 2;
}

inline int sum_asks(RowKind kind, int width, int group) {
    int slices = 0;
    for (int begin = 0; begin < group; begin += HEADS_TOGETHER) slices += sum_slices(kind, group - begin < HEADS_TOGETHER ? group - begin : HEADS_TOGETHER);
    return slices * codes_asks(kind, width);
}

// out[h] += sum over t of p[h][t] * v[t]
template <RowKind Kind, int Heads>
void sum_rows(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    using Form = Codes<Kind>;
    constexpr int passes = Kind == RowKind::INT9 ? 2 : 1, fields = Form::fields;
    if constexpr (sum_slices(Kind, Heads) == 2) {
        sum_rows<Kind, Heads / 2>(p, width, v, offset, count, asked, out);
        sum_rows<Kind, Heads - Heads / 2>(p + Heads / 2 * ATTEND_ROWS, width, v, offset, count, asked, out + int64_t(Heads / 2) * width);
        return;
    } else {
        const Form codes = Form::with_signs();
        Ahead ahead = asked;
        const ColumnOrder order = column_order();
        __m512 scales[2];
        row_scales(v, offset + code_bytes(Kind, width), scales);
        Weights<passes> weights[Heads];
        __m512 scaled[8][2], larger[16] = {};
        each<Heads>([&](auto h) INLINE {
            each<2>([&](auto i) INLINE { scaled[h][i] = _mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS + 16 * i), scales[i]); });
            larger[h] = _mm512_max_ps(scaled[h][0], scaled[h][1]);
        });
        constexpr float larger_than_codes = Kind == RowKind::INT9 ? 2.0f : 1.0f / Form::levels_unit;
        alignas(64) float tops[16];
        _mm512_store_ps(tops, largest_of(larger));
        each<Heads>([&](auto h) INLINE { weights[h].set(scaled[h][0], scaled[h][1], tops[h], larger_than_codes); });
        // `Pieces` from number `chunk` on, so that a weight is loaded once for all of them and sums do not wait for themselves.
        const auto add = [&]<int Pieces, bool Whole>(int chunk, __mmask16 mask) INLINE {
            __m512i sums[Pieces][passes][Heads][fields] = {};
            for (int t = 0; t < count; t += 4) {
                __m512i tiles[Pieces], four[Pieces][fields];
                column_tiles<Whole, Pieces>(codes, order, v + t, offset + int64_t(chunk) * Form::step, mask, tiles);
                each<Pieces>([&](auto piece) INLINE {
                    each<fields>([&](auto f) INLINE { four[piece][f] = codes.template bytes<f>(tiles[piece]); });
                    if constexpr (Kind == RowKind::INT9) {
                        const int64_t from = offset + width + 2 * (chunk + piece);
                        const __m512i ninths = _mm512_permutexvar_epi8(order.of_one, four_ninths(v[t] + from, v[t + 1] + from, v[t + 2] + from, v[t + 3] + from));
                        each<Heads>([&](auto h) INLINE { add_products(sums[piece][0][h][0], broadcast(weights[h].half + t), ninths); });
                    }
                });
                ahead.evenly<Pieces>();
                each<Heads>([&](auto h) INLINE {
                    each<passes>([&](auto pass) INLINE {
                        const __m512i w = broadcast(weights[h].bytes[pass] + t);
                        each<Pieces>([&](auto piece) INLINE { each<fields>([&](auto f) INLINE { add_products(sums[piece][pass][h][f], w, four[piece][f]); }); });
                    });
                });
            }
            each<Heads>([&](auto h) INLINE {
                const __m512 unit = _mm512_set1_ps(weights[h].unit);
                each<Pieces>([&](auto piece) INLINE {
                    if constexpr (passes == 2)
                        sums[piece][0][h][0] = _mm512_add_epi32(_mm512_slli_epi32(sums[piece][0][h][0], 8), sums[piece][1][h][0]);
                    const int column = (chunk + piece) * Form::numbers;
                    add_columns<fields, Whole>(sums[piece][0][h], unit, [](__m512 sum) INLINE { return sum; }, width - column, out + int64_t(h) * width + column);
                });
            });
        };
        constexpr int together = Form::step < 16 ? 1 : Heads * passes * fields <= 4 ? 4 : Heads * passes * fields <= 8 ? 2 : 1;
        Form::template pieces<together>(width, add);
        asked = ahead;
    }
}

inline __m512i words_of(const float* numbers, float inverse) {  // 32 numbers as 16-bit integers: times `inverse`
    const __m512 by = _mm512_set1_ps(inverse);
    const __m256i first = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers), by)));
    const __m256i second = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers + 16), by)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

inline __m512i upper_bytes_order() {  // of the words of two registers
    static const struct Order {
        alignas(64) uint8_t from[64];
        Order() {
            for (int i = 0; i < 64; i++) from[i] = uint8_t(2 * i + 1);
        }
    } order;
    return _mm512_load_si512(order.from);
}

// Words up to `largest`: by what to multiply numbers up to each of `tops`, or by 0 where they vanish.
inline __m512 inverses_of(__m512 tops, float largest) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(tops, _mm512_set1_ps(1e-30f), _CMP_GT_OQ), _mm512_set1_ps(largest), tops);
}

// rest[h][g] = sum over t of p[h][t] * minimum g of row t, of up to 16 groups from `offset` on; both become bfloat16.
template <int Heads>
inline void sum_minima(const uint32_t (*pairs)[ATTEND_ROWS / 2], const uint8_t* const* v, int64_t offset, int groups, int count, __m512* rest) {
    const __mmask16 mask = groups >= 16 ? 0xffff : __mmask16((1 << groups) - 1);
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto minima = [&](int t) INLINE { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, v[t] + offset)); };
    __m512 sums[Heads];
    each<Heads>([&](auto h) INLINE { sums[h] = _mm512_setzero_ps(); });
    for (int t = 0; t < count; t += 2) {
        const __m512bh both = (__m512bh)_mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(minima(t + 1), minima(t)));
        each<Heads>([&](auto h) INLINE { add_pairs(sums[h], both, pairs[h] + t / 2); });
    }
    each<Heads>([&](auto h) INLINE { rest[h] = sums[h]; });
}

// The same for INT4: the weight of a row is another one for each group, the product of two integers of 16 bits of which 8 are kept. What minima add is
// the same for all columns of a group.
template <int Heads>
void sum_groups(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    using Form = Codes<RowKind::INT4>;
    constexpr int most_groups = WIDEST_HEAD / INT4_GROUP, even_heads = (Heads + 1) / 2 * 2;
    const Form codes = Form::with_signs();
    Ahead ahead = asked;
    const ColumnOrder order = column_order();
    const int groups = groups_of(width);
    const int64_t scalars_at = offset + code_bytes(RowKind::INT4, width);
    alignas(64) float scales[most_groups * ATTEND_ROWS];
    group_scalars(v, scalars_at, groups, scales);
    constexpr float most = 65535.0f, of_scales = 255.0f * 256.0f;  // the upper byte of a product and a fraction of it is at most 255
    alignas(64) uint32_t pairs[Heads][ATTEND_ROWS / 2];  // weights as bfloat16
    alignas(64) float tops[16], inverses[16];
    __m512 larger[16] = {};
    each<Heads>([&](auto h) INLINE {
        const __m512 first = _mm512_load_ps(p + h * ATTEND_ROWS), second = _mm512_load_ps(p + h * ATTEND_ROWS + 16);
        larger[h] = _mm512_max_ps(first, second);
        _mm512_store_si512(pairs[h], (__m512i)_mm512_cvtne2ps_pbh(second, first));
    });
    const __m512 top_weights = largest_of(larger);
    _mm512_store_ps(tops, top_weights);
    _mm512_store_ps(inverses, inverses_of(top_weights, most));
    __m512i words[even_heads] = {};
    each<Heads>([&](auto h) INLINE { words[h] = words_of(p + h * ATTEND_ROWS, inverses[h]); });
    alignas(64) uint8_t weights[most_groups][even_heads][ATTEND_ROWS];
    alignas(64) float rest[Heads][most_groups], units[Heads][most_groups];
    const __m512i fractions = _mm512_load_si512(dither().bytes), upper_bytes = upper_bytes_order();
    for (int begin = 0; begin < groups; begin += 16) {
        const int here = groups - begin < 16 ? groups - begin : 16;
        for (int i = 0; i < 16; i++) {
            const float* at = scales + (begin + (i < here ? i : 0)) * ATTEND_ROWS;
            larger[i] = _mm512_max_ps(_mm512_load_ps(at), _mm512_load_ps(at + 16));
        }
        const __m512 top_scales = largest_of(larger);
        _mm512_store_ps(inverses, inverses_of(top_scales, of_scales));
        __m512 minima[Heads];
        sum_minima<Heads>(pairs, v, scalars_at + 2 * (groups + begin), here, count, minima);
        each<Heads>([&](auto h) INLINE {
            _mm512_store_ps(units[h] + begin, _mm512_mul_ps(top_scales, _mm512_set1_ps(tops[h] * (65536.0f * 256.0f / (most * of_scales)))));
            _mm512_store_ps(rest[h] + begin, minima[h]);
        });
        for (int i = 0; i < here; i++) {
            const __m512i of_group = words_of(scales + (begin + i) * ATTEND_ROWS, inverses[i]);
            each<even_heads / 2>([&](auto j) INLINE {
                const auto product = [&](int h) INLINE { return _mm512_add_epi16(_mm512_mulhi_epu16(words[h], of_group), fractions); };
                _mm512_store_si512(weights[begin + i][2 * j], _mm512_permutex2var_epi8(product(2 * j), upper_bytes, product(2 * j + 1)));
            });
        }
    }
    const auto add = [&]<int Pieces, bool Whole>(int group, __mmask16 mask) INLINE {
        __m512i sums[Pieces][Heads][2] = {};
        for (int t = 0; t < count; t += 4) {
            __m512i tiles[Pieces], four[Pieces][2];
            column_tiles<Whole, Pieces>(codes, order, v + t, offset + 16 * group, mask, tiles);
            each<Pieces>([&](auto piece) INLINE { each<2>([&](auto f) INLINE { four[piece][f] = codes.bytes<f>(tiles[piece]); }); });
            ahead.evenly<Pieces>();
            const uint8_t* at = weights[group][0] + t;
            asm("" : "+r"(at));  // gcc 12 would keep an address for each head, of which it has too few registers
            each<Heads>([&](auto h) INLINE {
                each<Pieces>([&](auto piece) INLINE {
                    const __m512i w = broadcast(at + (piece * even_heads + h) * ATTEND_ROWS);
                    each<2>([&](auto f) INLINE { add_products(sums[piece][h][f], w, four[piece][f]); });
                });
            });
        }
        each<Pieces>([&](auto piece) INLINE {
            const int g = group + piece;
            each<Heads>([&](auto h) INLINE {
                const __m512 base = _mm512_set1_ps(rest[h][g]);
                const auto with_base = [&](__m512 sum) INLINE { return _mm512_add_ps(sum, base); };
                add_columns<2, Whole>(sums[piece][h], _mm512_set1_ps(units[h][g]), with_base, width - 32 * g, out + int64_t(h) * width + 32 * g);
            });
        });
    };
    Form::pieces<(Heads <= 2 ? 4 : Heads <= 4 ? 2 : 1)>(width, add);
    asked = ahead;
}

// The same for FP8, in pairs of bfloat16.
template <int Heads>
void sum_eighths(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    using Form = Codes<RowKind::FP8>;
    const Form codes = Form::with_signs();
    Ahead ahead = asked;
    static const EighthFloats tables;
    const EighthFloats floats = tables;
    const ColumnOrder order = column_order();
    __m512 scales[2];
    row_scales(v, offset + width, scales);
    alignas(64) uint16_t weights[Heads][ATTEND_ROWS];  // of four rows first 0 and 2, then 1 and 3
    for (int h = 0; h < Heads; h++) {
        __m512 w[2];
        for (int i = 0; i < 2; i++) w[i] = _mm512_permute_ps(_mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS + 16 * i), scales[i]), 0xd8);
        _mm512_store_si512(weights[h], (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
    }
    const auto add = [&]<int Pieces, bool Whole>(int chunk, __mmask16 mask) INLINE {
        __m512 sums[Pieces][Heads];
        each<Pieces>([&](auto piece) INLINE { each<Heads>([&](auto h) INLINE { sums[piece][h] = _mm512_setzero_ps(); }); });
        for (int t = 0; t < count; t += 4) {
            __m512i tiles[Pieces];
            __m512bh even[Pieces], odd[Pieces];
            column_tiles<Whole, Pieces>(codes, order, v + t, offset + 16 * chunk, mask, tiles);
            each<Pieces>([&](auto piece) INLINE { floats.pairs(tiles[piece], even + piece, odd + piece); });
            ahead.evenly<Pieces>();
            each<Heads>([&](auto h) INLINE {
                const __m512bh first = (__m512bh)broadcast(weights[h] + t), second = (__m512bh)broadcast(weights[h] + t + 2);
                each<Pieces>([&](auto piece) INLINE { add_pairs(sums[piece][h], even[piece], first); });
                each<Pieces>([&](auto piece) INLINE { add_pairs(sums[piece][h], odd[piece], second); });
            });
        }
        each<Heads>([&](auto h) INLINE {
            each<Pieces>([&](auto piece) INLINE {
                float* at = out + int64_t(h) * width + 16 * (chunk + piece);
                const __mmask16 columns = first_words(width - 16 * (chunk + piece));
                _mm512_mask_storeu_ps(at, columns, _mm512_add_ps(_mm512_maskz_loadu_ps(columns, at), sums[piece][h]));
            });
        });
    };
    Form::pieces<(Heads <= 4 ? 4 : 2)>(width, add);
    asked = ahead;
}

using SumRows = void (*)(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& ahead, float* out);

// As `score_of`, for sums.
template <RowKind Kind, int... Before>
inline SumRows sum_of(int heads, std::integer_sequence<int, Before...>) {
    if constexpr (Kind == RowKind::INT4) {
        static constexpr SumRows all[] = {sum_groups<Before + 1>...};
        return all[heads - 1];
    } else if constexpr (Kind == RowKind::FP8) {
        static constexpr SumRows all[] = {sum_eighths<Before + 1>...};
        return all[heads - 1];
    } else {
        static constexpr SumRows all[] = {sum_rows<Kind, Before + 1>...};
        return all[heads - 1];
    }
}

inline SumRows sum_codes(RowKind kind, int heads) {
    switch (kind) {
        case RowKind::INT9: return sum_of<RowKind::INT9>(heads, UpToEight());
        case RowKind::INT4: return sum_of<RowKind::INT4>(heads, UpToEight());
        case RowKind::FP8: return sum_of<RowKind::FP8>(heads, UpToEight());
        case RowKind::LEVELS4: return sum_of<RowKind::LEVELS4>(heads, UpToEight());
        case RowKind::LEVELS3: return sum_of<RowKind::LEVELS3>(heads, UpToEight());
        case RowKind::LEVELS2: return sum_of<RowKind::LEVELS2>(heads, UpToEight());
        default: return sum_of<RowKind::INT8>(heads, UpToEight());
    }
}

// What whole pieces have left with their fields apart, as columns in order: once when all rows have been added.
template <int Fields>
inline void settle_fields(int width, int heads, float* out) {
    constexpr int numbers = 16 * Fields;
    for (int h = 0; h < heads; h++)
        for (int column = 0; column + numbers <= width; column += numbers) {
            float* at = out + int64_t(h) * width + column;
            __m512 x[Fields];
            each<Fields>([&](auto f) INLINE { x[f] = _mm512_loadu_ps(at + 16 * f); });
            side_by_side<Fields>(x);
            each<Fields>([&](auto f) INLINE { _mm512_storeu_ps(at + 16 * f, x[f]); });
        }
}

inline void settle_codes(RowKind kind, int width, int heads, float* out) {
    if (kind == RowKind::INT4 || kind == RowKind::LEVELS4) settle_fields<2>(width, heads, out);
    if (kind == RowKind::LEVELS2) settle_fields<4>(width, heads, out);
}
