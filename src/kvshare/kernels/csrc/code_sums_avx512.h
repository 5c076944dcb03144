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

template <int Fields, bool Whole>
[[gnu::always_inline]] inline void add_columns(const __m512* sums, int left, float* out) {  // `left`: columns up to the head's end
    each<Fields>([&](auto f) INLINE {
        float* at = out + 16 * f;
        if constexpr (Whole) {
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[f]));
        } else {
            const int here = left - 16 * f;
            const __mmask16 mask = here >= 16 ? 0xffff : here > 0 ? __mmask16((1 << here) - 1) : 0;
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums[f]));
        }
    });
}

// The weights of a block of rows as integers of 8 or 16 bits, in bytes: the largest is 255 or 65,535.
template <int Passes>
struct Weights {
    alignas(32) uint8_t bytes[Passes][ATTEND_ROWS];  // the upper bytes, then the lower ones
    alignas(32) uint8_t half[ATTEND_ROWS];           // half of the upper ones of 16 bits, which the ninth bits of INT9 meet
    float unit;

    void set(__m512 first, __m512 second) {
        constexpr float largest = Passes == 2 ? 65535.0f : 255.0f;
        const float top = _mm512_reduce_max_ps(_mm512_max_ps(first, second));
        unit = top / largest;
        const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? largest / top : 0.0f);
        const __m512 both[2] = {first, second};
        for (int i = 0; i < 2; i++) {
            const __m512i w = _mm512_cvtps_epi32(_mm512_mul_ps(both[i], inverse));
            if constexpr (Passes == 2) {
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + 16 * i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 8)));
                _mm_store_si128(reinterpret_cast<__m128i*>(half + 16 * i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(256)), 9)));
            }
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes[Passes - 1] + 16 * i), _mm512_cvtepi32_epi8(w));
        }
    }
};

// out[h] += sum over t of p[h][t] * v[t]
template <RowKind Kind, int Heads>
void sum_rows(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    using Form = Codes<Kind>;
    constexpr int passes = bits_of(Kind) == 8 ? 2 : 1, fields = Form::fields;
    if constexpr (Heads * passes * fields > 16) {  // registers for the sums
        sum_rows<Kind, Heads / 2>(p, width, v, offset, count, asked, out);
        sum_rows<Kind, Heads - Heads / 2>(p + Heads / 2 * ATTEND_ROWS, width, v, offset, count, asked, out + int64_t(Heads / 2) * width);
        return;
    } else {
        const Form codes = Form::with_signs();
        Ahead ahead = asked;
        const __m512i order = column_order();
        alignas(64) float scales[ATTEND_ROWS];
        row_scales(v, offset + code_bytes(Kind, width), scales);
        Weights<passes> weights[Heads];
        const __m512 scale[2] = {_mm512_load_ps(scales), _mm512_load_ps(scales + 16)};
        for (int h = 0; h < Heads; h++)
            weights[h].set(_mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS), scale[0]), _mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS + 16), scale[1]));
        // `Pieces` from number `chunk` on, so that a weight is loaded once for all of them and sums do not wait for themselves.
        const auto add = [&]<int Pieces, bool Whole>(int chunk, __mmask16 mask) INLINE {
            __m512i sums[Pieces][passes][Heads][fields] = {};
            for (int t = 0; t < count; t += 4) {
                __m512i four[Pieces][fields];
                each<Pieces>([&](auto piece) INLINE {
                    const __m512i tile = column_tile<Whole>(codes, order, v + t, offset + int64_t(chunk + piece) * Form::step, mask);
                    each<fields>([&](auto f) INLINE { four[piece][f] = codes.template bytes<f>(tile); });
                    if constexpr (Kind == RowKind::INT9) {
                        const int64_t from = offset + width + 2 * (chunk + piece);
                        const __m512i ninths = _mm512_permutexvar_epi8(order, four_ninths(v[t] + from, v[t + 1] + from, v[t + 2] + from, v[t + 3] + from));
                        each<Heads>([&](auto h) INLINE { add_products(sums[piece][0][h][0], broadcast(weights[h].half + t), ninths); });
                    }
                });
                ahead.ask(Pieces);
                each<Heads>([&](auto h) INLINE {
                    each<passes>([&](auto pass) INLINE {
                        const __m512i w = broadcast(weights[h].bytes[pass] + t);
                        each<Pieces>([&](auto piece) INLINE { each<fields>([&](auto f) INLINE { add_products(sums[piece][pass][h][f], w, four[piece][f]); }); });
                    });
                });
            }
            each<Heads>([&](auto h) INLINE {
                const __m512 unit = _mm512_set1_ps(weights[h].unit / Form::levels_unit * (Kind == RowKind::INT9 ? 2.0f : 1.0f));
                each<Pieces>([&](auto piece) INLINE {
                    __m512 numbers[fields];
                    each<fields>([&](auto f) INLINE {
                        __m512i sum = sums[piece][0][h][f];
                        if constexpr (passes == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), sums[piece][1][h][f]);
                        numbers[f] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), unit);
                    });
                    side_by_side<fields>(numbers);
                    const int column = (chunk + piece) * Form::numbers;
                    add_columns<fields, Whole>(numbers, width - column, out + int64_t(h) * width + column);
                });
            });
        };
        constexpr int together = Heads * passes * fields <= 4 ? 4 : Heads * passes * fields <= 8 ? 2 : 1;
        Form::template pieces<together>(width, add);
        asked = ahead;
    }
}

inline __m512i words_of(const float* numbers, float largest, float top) {  // 32 numbers up to `top`, as 16-bit integers up to `largest`
    const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? largest / top : 0.0f);
    const __m256i first = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers), inverse)));
    const __m256i second = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers + 16), inverse)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

inline float largest_of(const float* numbers) { return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_load_ps(numbers), _mm512_load_ps(numbers + 16))); }

// The same for INT4: the weight of a row is another one for each group, the product of two integers of 16 bits of which 8 are kept. What minima add is
// the same for all columns of a group.
template <int Heads>
void sum_groups(const float* p, int width, const uint8_t* const* v, int64_t offset, int count, Ahead& asked, float* out) {
    using Form = Codes<RowKind::INT4>;
    constexpr int most_groups = WIDEST_HEAD / INT4_GROUP;
    const Form codes = Form::with_signs();
    Ahead ahead = asked;
    const __m512i order = column_order();
    const int groups = groups_of(width);
    alignas(64) float scalars[2 * most_groups * ATTEND_ROWS];
    group_scalars(v, offset + code_bytes(RowKind::INT4, width), 2 * groups, scalars);
    constexpr float most = 65535.0f, of_scales = 255.0f * 256.0f;  // the upper byte of a product, rounded, is at most 255
    __m512i words[Heads];
    float tops[Heads];
    for (int h = 0; h < Heads; h++) {
        tops[h] = largest_of(p + h * ATTEND_ROWS);
        words[h] = words_of(p + h * ATTEND_ROWS, most, tops[h]);
    }
    alignas(32) uint8_t weights[most_groups][Heads][ATTEND_ROWS];
    alignas(64) float rest[most_groups][8], units[most_groups];
    for (int g = 0; g < groups; g++) {
        const float *scales = scalars + g * ATTEND_ROWS, top = largest_of(scales);
        const __m512i of_group = words_of(scales, of_scales, top);
        units[g] = top * (65536.0f * 256.0f / (most * of_scales));
        each<Heads>([&](auto h) INLINE {
            const __m512i w = _mm512_adds_epu16(_mm512_mulhi_epu16(words[h], of_group), _mm512_set1_epi16(128));
            _mm256_store_si256(reinterpret_cast<__m256i*>(weights[g][h]), _mm512_cvtepi16_epi8(_mm512_srli_epi16(w, 8)));
        });
    }
    for (int g = 0; g < groups; g += 2) {
        __m512 shares[16] = {};
        for (int i = 0; i < 2 && g + i < groups; i++) {
            const float* minima = scalars + (groups + g + i) * ATTEND_ROWS;
            each<Heads>([&](auto h) INLINE {
                const __m512 share = _mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS), _mm512_load_ps(minima));
                shares[8 * i + h] = _mm512_fmadd_ps(_mm512_load_ps(p + h * ATTEND_ROWS + 16), _mm512_load_ps(minima + 16), share);
            });
        }
        _mm512_store_ps(rest[g], sums_of(shares));
    }
    const auto add = [&]<int Pieces, bool Whole>(int group, __mmask16 mask) INLINE {
        __m512i sums[Pieces][Heads][2] = {};
        for (int t = 0; t < count; t += 4) {
            each<Pieces>([&](auto piece) INLINE {
                const __m512i tile = column_tile<Whole>(codes, order, v + t, offset + 16 * (group + piece), mask);
                const __m512i even = codes.bytes<0>(tile), odd = codes.bytes<1>(tile);
                each<Heads>([&](auto h) INLINE {
                    const __m512i w = broadcast(weights[group + piece][h] + t);
                    add_products(sums[piece][h][0], w, even);
                    add_products(sums[piece][h][1], w, odd);
                });
            });
            ahead.ask(Pieces);
        }
        each<Pieces>([&](auto piece) INLINE {
            const int g = group + piece;
            each<Heads>([&](auto h) INLINE {
                const __m512 unit = _mm512_set1_ps(tops[h] * units[g]), base = _mm512_set1_ps(rest[g][h]);
                __m512 numbers[2];
                each<2>([&](auto f) INLINE { numbers[f] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[piece][h][f]), unit, base); });
                side_by_side<2>(numbers);
                add_columns<2, Whole>(numbers, width - 32 * g, out + int64_t(h) * width + 32 * g);
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
    const __m512i order = column_order();
    alignas(64) float scales[ATTEND_ROWS];
    row_scales(v, offset + width, scales);
    alignas(64) uint16_t weights[Heads][ATTEND_ROWS];  // of four rows first 0 and 2, then 1 and 3
    for (int h = 0; h < Heads; h++) {
        __m512 w[2];
        for (int i = 0; i < 2; i++) w[i] = _mm512_permute_ps(_mm512_mul_ps(_mm512_load_ps(p + h * ATTEND_ROWS + 16 * i), _mm512_load_ps(scales + 16 * i)), 0xd8);
        _mm512_store_si512(weights[h], (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
    }
    Form::pieces(width, [&](int chunk, auto whole, __mmask16 mask) INLINE {
        __m512 sums[2][Heads];
        each<Heads>([&](auto h) INLINE { sums[0][h] = sums[1][h] = _mm512_setzero_ps(); });
        for (int t = 0; t < count; t += 4) {
            __m512bh even, odd;
            floats.pairs(column_tile<whole>(codes, order, v + t, offset + 16 * chunk, mask), &even, &odd);
            ahead.ask(1);
            each<Heads>([&](auto h) INLINE {
                add_pairs(sums[0][h], even, weights[h] + t);
                add_pairs(sums[1][h], odd, weights[h] + t + 2);
            });
        }
        each<Heads>([&](auto h) INLINE {
            const __m512 sum = _mm512_add_ps(sums[0][h], sums[1][h]);
            add_columns<1, whole>(&sum, width - 16 * chunk, out + int64_t(h) * width + 16 * chunk);
        });
    });
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
