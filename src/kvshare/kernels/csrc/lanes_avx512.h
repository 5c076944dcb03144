// Sixteen lanes as AVX512 vectors. Included by avx512_tiles.cpp.
#pragma once

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));  // also pairs of bfloat16
constexpr bool WIDE = true;  // 32 registers

inline Lanes all(float x) { return (Lanes)_mm512_set1_ps(x); }
inline Lanes dot(Lanes sum, Words a, Words b) { return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
inline Lanes larger(Lanes a, Lanes b) { return (Lanes)_mm512_max_ps((__m512)a, (__m512)b); }

inline Lanes power_of_two(Lanes x) {  // relative error below 4e-6; 1 at 0
    const __m512 t = (__m512)x, part = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.01342668f);
    for (const float c : {0.05224247f, 0.2412802f, 0.69304484f, 1.0f}) p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
    return (Lanes)_mm512_scalef_ps(p, t);
}

alignas(64) static constexpr uint16_t PAIRED[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                    16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

inline Words pairs_of(Lanes first, Lanes second) {
    const __m512i even = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)first)), odd = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Words)_mm512_permutex2var_epi16(even, _mm512_load_si512(PAIRED), odd);
}

inline void store_bf16(uint16_t* to, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x)); }

inline void transpose(Words* rows) {  // 16 of 16
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {  // b[4 i + j] has columns j, j + 4, j + 8, j + 12 of rows 4 i ... 4 i + 3
        const __m512i low0 = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), low1 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
        const __m512i high0 = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd), high1 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
        rows[j] = (Words)_mm512_shuffle_i32x4(low0, low1, 0x88);
        rows[j + 4] = (Words)_mm512_shuffle_i32x4(high0, high1, 0x88);
        rows[j + 8] = (Words)_mm512_shuffle_i32x4(low0, low1, 0xdd);
        rows[j + 12] = (Words)_mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
}

// Each of `count` <= PANEL words of `even` beside the one of `odd`, and zeros up to PANEL.
inline void interleave(const uint16_t* even, const uint16_t* odd, int count, uint32_t* to) {
    static_assert(PANEL == 24);
    const __mmask32 real = (1u << count) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(real, even), b = _mm512_maskz_loadu_epi16(real, odd);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(PAIRED), b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm512_castsi512_si256(_mm512_permutex2var_epi16(a, _mm512_load_si512(PAIRED + 32), b)));
}
