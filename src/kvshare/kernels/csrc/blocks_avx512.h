// Two blocks of 32, or one of 256, in the registers of AVX512: 64 weights at a time, read from the file's own bytes by one or two loads and a
// permutation, as unsigned bytes in their natural order. What decoding into bfloat16 takes. Nothing is read behind a row: the last load is masked.
#pragma once

inline __m512i shifts(short low, short high) {  // 16-bit shift counts by 256-bit half
    return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}

// Two blocks of 32: lanes of d hold the scale of the block that the lane's four weights belong to.
struct Pair {
    Bytes q;
    __m512 d;
};

// Byte permutation that spreads the 16 bytes at `quants` of each of two blocks over 32 lanes each.
inline __m512i spread(int quants, int block_bytes) {
    alignas(64) uint8_t at[64];
    for (int i = 0; i < 64; i++) at[i] = uint8_t(quants + (i & 15) + (i >> 5) * block_bytes);
    return _mm512_load_si512(at);
}

// Word permutation that puts the 16-bit number at `byte` of each of two blocks in 8 lanes each.
inline __m256i pair_words(int byte, int block_bytes) {
    alignas(32) uint16_t at[16];
    for (int i = 0; i < 16; i++) at[i] = uint16_t((byte + (i >> 3) * block_bytes) / 2);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

template <BlockType T>
struct PairReader;

// Formats whose two blocks fit one register: Q4_0, Q4_1, Q5_0, Q5_1.
template <BlockType T>
struct NibblePairs {
    static constexpr int bytes = int(shape_of(T).bytes);
    static constexpr bool has_fifth = T == BlockType::Q5_0 || T == BlockType::Q5_1;
    static constexpr bool has_minimum = T == BlockType::Q4_1 || T == BlockType::Q5_1;
    static constexpr int rest_at = has_minimum ? 2 : 0;  // the 16-bit float that the activations' sums are multiplied by: the minimum, or the scale ...
    static constexpr float rest_factor = has_minimum ? 1.0f : has_fifth ? -16.0f : -8.0f;  // ... and how often
    const __m512i quants = spread(bytes - 16, bytes);
    // halves of each 32: counts by 128-bit lane 0, 4, 0, 4
    const __m512i counts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i d_at = _mm512_castsi256_si512(pair_words(0, bytes));

    Pair read(const uint8_t* p, int blocks) const {
        const __mmask64 mask = (__mmask64(1) << (blocks * bytes)) - 1;
        const __m512i raw = _mm512_maskz_loadu_epi8(mask, p);
        Pair to;
        to.q = _mm512_and_si512(_mm512_srlv_epi16(_mm512_permutexvar_epi8(quants, raw), counts), low);
        if constexpr (has_fifth) {
            constexpr int at = has_minimum ? 4 : 2;
            uint32_t first, second = 0;
            memcpy(&first, p + at, 4);
            if (blocks == 2) memcpy(&second, p + bytes + at, 4);
            const __mmask64 fifth = __mmask64(first) | __mmask64(second) << 32;
            to.q = _mm512_mask_add_epi8(to.q, fifth, to.q, _mm512_set1_epi8(16));
        }
        to.d = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(d_at, raw)));
        return to;
    }
};
template <> struct PairReader<BlockType::Q4_0> : NibblePairs<BlockType::Q4_0> {};
template <> struct PairReader<BlockType::Q4_1> : NibblePairs<BlockType::Q4_1> {};
template <> struct PairReader<BlockType::Q5_0> : NibblePairs<BlockType::Q5_0> {};
template <> struct PairReader<BlockType::Q5_1> : NibblePairs<BlockType::Q5_1> {};

template <>
struct PairReader<BlockType::Q8_0> {
    static constexpr int bytes = 34;
    static constexpr int rest_at = 0;
    static constexpr float rest_factor = -128.0f;
    const __m512i flip = _mm512_set1_epi8(char(0x80));  // signed to unsigned

    Pair read(const uint8_t* p, int blocks) const {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2));
        const __m256i second = blocks == 2 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 36)) : _mm256_setzero_si256();
        uint16_t d0, d1 = 0;
        memcpy(&d0, p, 2);
        if (blocks == 2) memcpy(&d1, p + 34, 2);
        Pair to;
        to.q = _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), flip);
        to.d = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi16(short(d0))), _mm_set1_epi16(short(d1)), 1));
        return to;
    }
};

// Blocks of 256 (k-quants): four registers of 64 weights; scales of 32 (Q4_K, Q5_K, with minima) or of 16 (Q6_K).
template <BlockType T>
struct KBlock {
    static constexpr bool is_six = T == BlockType::Q6_K;
    const uint8_t* p;
    __m512 scales;   // 16 of them, or 8 in the lower half
    __m256 minima;   // 8 (Q4_K, Q5_K), negative

    explicit KBlock(const uint8_t* from) : p(from) {
        if constexpr (is_six) {
            const __m512i bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 192)));
            scales = _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(half_to_float(p + 208)));
        } else {
            uint32_t a, b, c;  // twelve bytes: scales 0-3, minima 0-3, and the lower halves of 4-7 whose upper bits are spread over the first eight
            memcpy(&a, p + 4, 4);
            memcpy(&b, p + 8, 4);
            memcpy(&c, p + 12, 4);
            const uint64_t six = uint64_t(a & 0x3f3f3f3f) | uint64_t((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
            const uint64_t low = uint64_t(b & 0x3f3f3f3f) | uint64_t((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
            const auto wide = [](uint64_t v) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(v)))); };
            scales = _mm512_castps256_ps512(_mm256_mul_ps(wide(six), _mm256_set1_ps(half_to_float(p))));
            minima = _mm256_mul_ps(wide(low), _mm256_set1_ps(-half_to_float(p + 2)));
        }
    }

    template <int J>
    Bytes quants() const {  // weights 64 * J ... 64 * J + 63
        const __m512i low = _mm512_set1_epi8(15);
        if constexpr (is_six) {
            const __m512i raw = _mm512_loadu_si512(p + 64 * (J / 2));
            const __m512i four = _mm512_and_si512(J % 2 ? _mm512_srli_epi16(raw, 4) : raw, low);
            const __m512i pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 128 + 32 * (J / 2))));
            const __m512i two = _mm512_and_si512(_mm512_srlv_epi16(pairs, J % 2 ? shifts(4, 6) : shifts(0, 2)), _mm512_set1_epi8(3));
            return _mm512_or_si512(four, _mm512_slli_epi16(two, 4));
        } else {
            constexpr int at = T == BlockType::Q4_K ? 16 : 48;
            const __m512i raw = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at + 32 * J)));
            __m512i q = _mm512_and_si512(_mm512_srlv_epi16(raw, shifts(0, 4)), low);
            if constexpr (T == BlockType::Q5_K) {
                const __m512i bits = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
                const __m512i tested = _mm512_inserti64x4(_mm512_set1_epi8(char(1 << (2 * J))), _mm256_set1_epi8(char(1 << (2 * J + 1))), 1);
                q = _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, tested), q, _mm512_set1_epi8(16));
            }
            return q;
        }
    }
};
