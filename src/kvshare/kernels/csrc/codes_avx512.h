// Codes of cached rows in AVX512 registers. A tile is a piece of 16 bytes of several rows, turned so that one lane of 32 bits holds what a dot
// product of four bytes adds up: four numbers of one row (`row_tile`: lanes are 16 rows), or one number of four rows (`column_tile`: lanes are 16 bytes
// of the row). Pieces may begin at any address and never reach behind the head.
#pragma once

#define INLINE __attribute__((always_inline))  // of a lambda: what it captures stays in registers

// 16 bytes of four rows, or the first of them by a mask: where codes end within a piece, or a piece has fewer.
template <bool Whole>
[[gnu::always_inline]] inline __m512i four_pieces(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, __mmask16 mask) {
    const auto load = [&](const uint8_t* p) INLINE {
        if constexpr (Whole) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        else return _mm_maskz_loadu_epi8(mask, p);
    };
    const __m512i first = _mm512_inserti32x4(_mm512_castsi128_si512(load(a)), load(b), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(first, load(c), 2), load(d), 3);
}

// How 16 bytes of a row become numbers: `fields` codes a byte, `step` bytes to the next piece.
template <RowKind Kind>
struct Codes {
    static constexpr int bits = bits_of(Kind);
    static constexpr int fields = bits == 3 ? 1 : 8 / bits;
    static constexpr int numbers = 16 * fields;  // of a piece
    static constexpr int step = numbers * bits / 8;
    static constexpr bool has_levels = Kind == RowKind::LEVELS4 || Kind == RowKind::LEVELS3 || Kind == RowKind::LEVELS2;
    static constexpr float levels_unit = has_levels ? 127.0f / level(Kind, (1 << bits) - 1) : 1.0f;  // levels are this many times smaller than their bytes

    // work<Together, true>(chunk, mask) for so many whole pieces at a time, work<1, ...> for the rest.
    template <int Together, typename Work>
    [[gnu::always_inline]] static void pieces(int width, Work&& work) {
        const int whole = step == 16 ? width / numbers / Together * Together : 0;
        for (int chunk = 0; chunk < whole; chunk += Together) work.template operator()<Together, true>(chunk, 0xffff);
        pieces(width, [&](int chunk, auto is_whole, __mmask16 mask) INLINE { work.template operator()<1, is_whole>(chunk, mask); }, whole);
    }

    // work(chunk, whole, mask) for each piece of a head of `width` numbers; the mask of one that is not whole tells which bytes are there.
    template <typename Work>
    [[gnu::always_inline]] static void pieces(int width, Work&& work, int from = 0) {
        const int whole = step == 16 ? width / numbers : 0, all = (width + numbers - 1) / numbers;
        for (int chunk = from; chunk < whole; chunk++) work(chunk, std::true_type(), __mmask16(0xffff));
        for (int chunk = whole > from ? whole : from; chunk < all; chunk++) {
            const int64_t left = (int64_t(width) * bits + 7) / 8 - int64_t(chunk) * step;
            work(chunk, std::false_type(), __mmask16((1 << (left < step ? left : step)) - 1));
        }
    }

    __m512i table, spread, shift;

    static const Codes& with_signs() {
        static const Codes codes(true);
        return codes;
    }
    static const Codes& without_signs() {  // bytes are 128 more
        static const Codes codes(false);
        return codes;
    }

    explicit Codes(bool is_signed) {
        alignas(64) uint8_t bytes[64] = {}, from[64], by[64];
        for (int i = 0; i < 64; i++) {
            if constexpr (has_levels) bytes[i] = uint8_t(int(lrintf(level(Kind, i & ((1 << bits) - 1)) * levels_unit)) + (is_signed ? 0 : 128));
            from[i] = uint8_t((i >> 3 & 1) * 3 + (i & 7) % 3);
            by[i] = uint8_t(3 * (i & 7));
        }
        table = _mm512_load_si512(bytes);
        spread = _mm512_load_si512(from);
        shift = _mm512_load_si512(by);
        if constexpr (bits == 8 && Kind != RowKind::FP8) table = is_signed ? _mm512_setzero_si512() : _mm512_set1_epi8(char(0x80));
    }

    __m512i prepare(__m512i pieces) const {  // before a tile is turned
        if constexpr (bits == 3) return _mm512_multishift_epi64_epi8(shift, _mm512_shuffle_epi8(pieces, spread));
        else return pieces;
    }

    template <int Field>
    __m512i bytes(__m512i tile) const {
        __m512i codes = tile;
        if constexpr (Field > 0) codes = _mm512_srli_epi16(codes, Field * bits);
        if constexpr (bits < 8) codes = _mm512_and_si512(codes, _mm512_set1_epi8((1 << bits) - 1));
        if constexpr (has_levels) codes = _mm512_shuffle_epi8(table, codes);
        if constexpr (bits == 8 && Kind != RowKind::FP8) codes = _mm512_xor_si512(codes, table);
        return codes;
    }
};

[[gnu::always_inline]] inline void turn(__m512i* x) {  // lanes of 128 bits: x[r] of row 4 L + r -> x[j], number j of rows 4 L ... 4 L + 3
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
}

// tile[j]: bytes 4 j ... 4 j + 3 of the pieces of 16 rows.
template <bool Whole, RowKind Kind>
[[gnu::always_inline]] inline void row_tile(const Codes<Kind>& codes, const uint8_t* const* rows, int64_t offset, __mmask16 mask, __m512i* tile) {
    for (int r = 0; r < 4; r++)
        tile[r] = codes.prepare(four_pieces<Whole>(rows[r] + offset, rows[4 + r] + offset, rows[8 + r] + offset, rows[12 + r] + offset, mask));
    turn(tile);
}

// Where the bytes of a column tile come from: of 4 rows of 16 bytes; and of rows 0 and 1, then 2 and 3 of 32 bytes, the first and the second 16.
struct ColumnOrder {
    __m512i of_one, of_two[2];
};

inline ColumnOrder column_order() {
    static const struct Order {
        alignas(64) uint8_t from[3][64];
        Order() {
            for (int i = 0; i < 64; i++) {
                from[0][i] = uint8_t((i & 3) * 16 + i / 4);
                from[1][i] = uint8_t((i & 3) * 32 + i / 4);
                from[2][i] = uint8_t((i & 3) * 32 + i / 4 + 16);
            }
        }
    } order;
    return {_mm512_load_si512(order.from[0]), {_mm512_load_si512(order.from[1]), _mm512_load_si512(order.from[2])}};
}

// Lane c: byte c of the pieces of 4 rows.
template <bool Whole, RowKind Kind>
[[gnu::always_inline]] inline __m512i column_tile(const Codes<Kind>& codes, const ColumnOrder& order, const uint8_t* const* rows, int64_t offset, __mmask16 mask) {
    return _mm512_permutexvar_epi8(order.of_one, codes.prepare(four_pieces<Whole>(rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset, mask)));
}

// The same of two whole pieces that lie side by side.
[[gnu::always_inline]] inline void two_column_tiles(const ColumnOrder& order, const uint8_t* const* rows, int64_t offset, __m512i* tiles) {
    const auto load = [&](int r) INLINE { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + offset)); };
    const __m512i first = _mm512_inserti64x4(_mm512_castsi256_si512(load(0)), load(1), 1), second = _mm512_inserti64x4(_mm512_castsi256_si512(load(2)), load(3), 1);
    for (int i = 0; i < 2; i++) tiles[i] = _mm512_permutex2var_epi8(first, order.of_two[i], second);
}

// The tiles of so many pieces side by side; more than one are whole.
template <bool Whole, int Pieces, RowKind Kind>
[[gnu::always_inline]] inline void column_tiles(const Codes<Kind>& codes, const ColumnOrder& order, const uint8_t* const* rows, int64_t offset, __mmask16 mask, __m512i* tiles) {
    if constexpr (Pieces == 1) tiles[0] = column_tile<Whole>(codes, order, rows, offset, mask);
    else for (int i = 0; i < Pieces; i += 2) two_column_tiles(order, rows, offset + 16 * i, tiles + i);
}

// Bytes that are 0 or 1, like pieces of 16 numbers: the ninth bits of INT9, of which there are two bytes at `offset`. What stands behind the last
// number of a head is read as well, and meets zeros.
[[gnu::always_inline]] inline __m512i four_ninths(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    uint16_t bits[4];
    memcpy(bits, a, 2);
    memcpy(bits + 1, b, 2);
    memcpy(bits + 2, c, 2);
    memcpy(bits + 3, d, 2);
    const uint64_t all = uint64_t(bits[0]) | uint64_t(bits[1]) << 16 | uint64_t(bits[2]) << 32 | uint64_t(bits[3]) << 48;
    return _mm512_maskz_mov_epi8(__mmask64(all), _mm512_set1_epi8(1));
}

// e4m3 as bfloat16, exactly, by tables of the upper and the lower byte: words 0 and 2, and 1 and 3, of each lane's four numbers.
struct EighthFloats {
    __m512i high[2], low[2];

    EighthFloats() {
        alignas(64) uint8_t upper[128], lower[128];
        for (int code = 0; code < 128; code++) {
            const uint16_t bits = float_to_bf16(fp8_to_float(uint8_t(code)));
            upper[code] = uint8_t(bits >> 8);
            lower[code] = uint8_t(bits);
        }
        for (int i = 0; i < 2; i++) {
            high[i] = _mm512_load_si512(upper + 64 * i);
            low[i] = _mm512_load_si512(lower + 64 * i);
        }
    }

    void pairs(__m512i codes, __m512bh* even, __m512bh* odd) const {
        const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(char(0x80)));
        const __m512i upper = _mm512_or_si512(_mm512_permutex2var_epi8(high[0], codes, high[1]), sign), lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        constexpr __mmask64 second = 0xaaaaaaaaaaaaaaaaull;
        *even = (__m512bh)_mm512_mask_blend_epi8(second, lower, _mm512_slli_epi16(upper, 8));
        *odd = (__m512bh)_mm512_mask_blend_epi8(second, _mm512_srli_epi16(lower, 8), upper);
    }
};

// The float16 scales behind the codes of 32 heads. They never lie in memory: what is stored in parts cannot be loaded as a whole at once.
inline void row_scales(const uint8_t* const* rows, int64_t offset, __m512* scales) {
    each<2>([&](auto i) INLINE {
        __m128i halves[2];
        each<2>([&](auto part) INLINE {
            halves[part] = _mm_setzero_si128();
            each<8>([&](auto t) INLINE {
                uint16_t half;
                memcpy(&half, rows[16 * i + 8 * part + t] + offset, 2);
                halves[part] = _mm_insert_epi16(halves[part], half, t);
            });
        });
        scales[i] = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(halves[0]), halves[1], 1));
    });
}

// to[i * ATTEND_ROWS + t]: float16 number i < count of row t.
inline void group_scalars(const uint8_t* const* rows, int64_t offset, int count, float* to) {
    for (int t = 0; t < ATTEND_ROWS; t += 16)
        for (int i = 0; i < count; i += 8) {
            const __mmask16 mask = count - i >= 8 ? 0xffff : __mmask16((1 << 2 * (count - i)) - 1);
            __m512i x[4];
            for (int r = 0; r < 4; r++) {
                const uint8_t* const* at = rows + t + r;
                const int64_t from = offset + 2 * i;
                x[r] = four_pieces<false>(at[0] + from, at[4] + from, at[8] + from, at[12] + from, mask);
            }
            turn(x);
            for (int j = 0; j < 8 && i + j < count; j++) {
                const __m512i halves = j & 1 ? _mm512_srli_epi32(x[j / 2], 16) : x[j / 2];
                _mm512_storeu_ps(to + (i + j) * ATTEND_ROWS + t, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)));
            }
        }
}
