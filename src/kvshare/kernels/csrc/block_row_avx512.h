// The numbers of a `BlockForm` as bfloat16 for AVX512: codes are looked up, and the block's exponent is added to theirs.
// Included once by the AVX512 files inside their namespace, before block_row.h.
#pragma once

// e4m3 by its upper and lower byte; e2m1 whole.
struct SmallFloats {
    alignas(64) uint8_t upper[128], lower[128];
    alignas(64) uint16_t four_bits[32];

    SmallFloats() {
        for (int code = 0; code < 128; code++) {
            const uint16_t bits = float_to_bf16(fp8_to_float(uint8_t(code)));
            upper[code] = uint8_t(bits >> 8);
            lower[code] = uint8_t(bits);
        }
        for (int code = 0; code < 32; code++) four_bits[code] = float_to_bf16(e2m1_to_float(code & 15));
    }
};

// Zeros stay zeros, and what is no number stays that.
inline __m512i times_power(__m512i numbers, int exponent) {
    const __m512i size = _mm512_and_si512(numbers, _mm512_set1_epi16(0x7fff));
    const __mmask32 real = _mm512_test_epi16_mask(size, size) & _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(0x7f80));
    return _mm512_mask_add_epi16(numbers, real, numbers, _mm512_set1_epi16(int16_t(exponent << 7)));
}

inline int decode_whole_blocks(const BlockForm& form, int plain, const uint8_t* p, const uint8_t* scales, uint16_t* to) {
    constexpr int least = -100, most = 100;  // exponents with which every number stays a normal one
    static const SmallFloats tables;
    const int step = form.bits == 8 ? 64 : 32;
    if (form.group % step) return 0;
    const auto exponent = [&](int i) {
        const int block = i / form.group;
        if (form.scale_bytes == 1) return int(scales[block]) - 127;
        uint32_t bits;
        memcpy(&bits, scales + 4 * block, 4);
        return bits & 0x807fffff ? most + 1 : int(bits >> 23) - 127;
    };
    int i = 0;
    if (form.bits == 8) {
        const __m512i high[2] = {_mm512_load_si512(tables.upper), _mm512_load_si512(tables.upper + 64)};
        const __m512i low[2] = {_mm512_load_si512(tables.lower), _mm512_load_si512(tables.lower + 64)};
        const __m512i apart = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // so that unpacking leaves numbers in order
        for (; i + 64 <= plain; i += 64) {
            const int e = exponent(i);
            if (e < least || e > most) break;
            const __m512i codes = _mm512_permutexvar_epi64(apart, _mm512_loadu_si512(p + i)), sign = _mm512_and_si512(codes, _mm512_set1_epi8(char(0x80)));
            const __m512i upper = _mm512_or_si512(_mm512_permutex2var_epi8(high[0], codes, high[1]), sign), lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
            _mm512_storeu_si512(to + i, times_power(_mm512_unpacklo_epi8(lower, upper), e));
            _mm512_storeu_si512(to + i + 32, times_power(_mm512_unpackhi_epi8(lower, upper), e));
        }
    } else {
        const __m512i table = _mm512_load_si512(tables.four_bits);
        for (; i + 32 <= plain; i += 32) {
            const int e = exponent(i);
            if (e < least || e > most) break;
            const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i / 2)));
            const __m512i codes = _mm512_or_si512(_mm512_and_si512(pairs, _mm512_set1_epi32(15)), _mm512_slli_epi32(_mm512_srli_epi32(pairs, 4), 16));
            _mm512_storeu_si512(to + i, times_power(_mm512_permutexvar_epi16(codes, table), e));
        }
    }
    return i;
}
