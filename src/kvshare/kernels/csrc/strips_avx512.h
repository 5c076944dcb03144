// Strips for AVX512: sixteen rows of weights at a time, one in each lane of 32 bits: four weights of a row behind one another are the four bytes of its
// lane. Rows are loaded 16 bytes each and transposed, so that scales, minima and sums of different rows share registers, nothing is summed
// across lanes, and the cost of reading a format is divided by all rows of activations. Weights become unsigned bytes; signed formats have an
// `offset`, a multiple of which the products subtract as integers.
#pragma once

using Bytes = __m512i;

constexpr int LANES = 16;

// Lane i of to[j] = bytes 4 * j ... 4 * j + 3 behind rows[i] + at, j < 4.
inline __attribute__((always_inline)) void transpose(const uint8_t* const* rows, int64_t at, Bytes* to) {
    __m512i v[4];
    for (int a = 0; a < 4; a++) {
        const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at)); };
        v[a] = _mm512_castsi128_si512(row(a));
        v[a] = _mm512_mask_broadcast_i32x4(v[a], 0x00f0, row(4 + a));
        v[a] = _mm512_mask_broadcast_i32x4(v[a], 0x0f00, row(8 + a));
        v[a] = _mm512_mask_broadcast_i32x4(v[a], 0xf000, row(12 + a));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    to[0] = _mm512_unpacklo_epi64(low01, low23);
    to[1] = _mm512_unpackhi_epi64(low01, low23);
    to[2] = _mm512_unpacklo_epi64(high01, high23);
    to[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Lane i = the four bytes behind rows[i] + at.
inline __attribute__((always_inline)) __m512i words(const uint8_t* const* rows, int64_t at) {
    __m512i v[4];
    for (int a = 0; a < 4; a++) {
        const auto row = [&](int i) { return _mm_loadu_si32(rows[i] + at); };
        v[a] = _mm512_broadcastd_epi32(row(a));
        v[a] = _mm512_mask_broadcastd_epi32(v[a], 0x00f0, row(4 + a));
        v[a] = _mm512_mask_broadcastd_epi32(v[a], 0x0f00, row(8 + a));
        v[a] = _mm512_mask_broadcastd_epi32(v[a], 0xf000, row(12 + a));
    }
    const __m512i even = _mm512_mask_mov_epi32(v[0], 0x2222, v[1]), odd = _mm512_mask_mov_epi32(v[2], 0x8888, v[3]);
    return _mm512_mask_mov_epi32(even, 0xcccc, odd);
}

inline __m512 low_half(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
inline __m512 high_half(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))); }

inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline __m512 byte_of(__m512i v, int i) {  // unsigned, as a number
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255)));
}

// Groups of 32 weights of sixteen rows.
template <int Groups, int Halves>
struct Unpacked {
    Bytes w[8 * Groups];            // four weights of each row a register
    __m512 scale[Halves * Groups];  // of each group, or of each half of one
    __m512 minimum[Groups];
};

// How a format is read: `open` a block at `at`, then `unpack` its `groups` groups, `unit` of them at a time.
template <BlockType T>
struct Strip;

// Blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, Q5_1.
template <BlockType T>
struct NibbleStrip {
    static constexpr bool has_fifth = T == BlockType::Q5_0 || T == BlockType::Q5_1;
    static constexpr bool has_minimum = T == BlockType::Q4_1 || T == BlockType::Q5_1;
    static constexpr int groups = 1, unit = 1, halves = 1, offset = has_minimum ? 0 : has_fifth ? 16 : 8;
    const uint8_t* const* rows;
    int64_t at;

    void open(const uint8_t* const* from, int64_t start) { rows = from, at = start; }
    void unpack(int, Unpacked<1, 1>& to) const {
        constexpr int fifth_at = has_minimum ? 4 : 2, quants_at = int(shape_of(T).bytes) - 16;
        const __m512i head = words(rows, at);
        to.scale[0] = low_half(head);
        if constexpr (has_minimum) to.minimum[0] = high_half(head);
        Bytes raw[4];
        transpose(rows, at + quants_at, raw);
        for (int j = 0; j < 4; j++) to.w[j] = low_nibbles(raw[j]), to.w[4 + j] = high_nibbles(raw[j]);
        if constexpr (has_fifth) {
            const __m512i bits = words(rows, at + fifth_at);
            for (int j = 0; j < 8; j++) {  // bit 4 * j + i belongs to byte i of register j
                const __m512i byte = _mm512_shuffle_epi8(bits, _mm512_add_epi8(_mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0), _mm512_set1_epi8(char(j / 2))));
                const __mmask64 fifth = _mm512_test_epi8_mask(byte, _mm512_set1_epi32(j % 2 ? int(0x80402010) : 0x08040201));
                to.w[j] = _mm512_mask_add_epi8(to.w[j], fifth, to.w[j], _mm512_set1_epi8(16));
            }
        }
    }
};
template <> struct Strip<BlockType::Q4_0> : NibbleStrip<BlockType::Q4_0> {};
template <> struct Strip<BlockType::Q4_1> : NibbleStrip<BlockType::Q4_1> {};
template <> struct Strip<BlockType::Q5_0> : NibbleStrip<BlockType::Q5_0> {};
template <> struct Strip<BlockType::Q5_1> : NibbleStrip<BlockType::Q5_1> {};

template <>
struct Strip<BlockType::Q8_0> {
    static constexpr bool has_minimum = false;
    static constexpr int groups = 1, unit = 1, halves = 1, offset = 128;
    const uint8_t* const* rows;
    int64_t at;

    void open(const uint8_t* const* from, int64_t start) { rows = from, at = start; }
    void unpack(int, Unpacked<1, 1>& to) const {
        to.scale[0] = low_half(words(rows, at));
        for (int half = 0; half < 2; half++) transpose(rows, at + 2 + 16 * half, to.w + 4 * half);
        for (auto& w : to.w) w = _mm512_xor_si512(w, _mm512_set1_epi8(char(0x80)));  // signed to unsigned
    }
};

// Blocks of 256 with eight scales and minima of six bits: Q4_K, Q5_K. 32 bytes of nibbles are two groups.
template <BlockType T>
struct ScaledStrip {
    static constexpr bool has_fifth = T == BlockType::Q5_K, has_minimum = true;
    static constexpr int groups = 8, unit = 2, halves = 1, offset = 0;
    const uint8_t* const* rows;
    int64_t at;
    __m512 d, minimum;
    __m512i six[2], low[2];  // bytes: scales and minima of groups 0-3 and 4-7
    Bytes fifth[has_fifth ? 8 : 1];

    void open(const uint8_t* const* from, int64_t start) {
        rows = from, at = start;
        Bytes head[4];  // two floats of 16 bits; scales 0-3; minima 0-3; the lower halves of 4-7, whose upper bits are those of the first eight
        transpose(rows, at, head);
        d = low_half(head[0]);
        minimum = _mm512_sub_ps(_mm512_setzero_ps(), high_half(head[0]));
        const __m512i upper = _mm512_set1_epi8(0x30), first = _mm512_set1_epi8(0x3f);
        six[0] = _mm512_and_si512(head[1], first);
        low[0] = _mm512_and_si512(head[2], first);
        six[1] = _mm512_or_si512(low_nibbles(head[3]), _mm512_and_si512(_mm512_srli_epi16(head[1], 2), upper));
        low[1] = _mm512_or_si512(high_nibbles(head[3]), _mm512_and_si512(_mm512_srli_epi16(head[2], 2), upper));
        if constexpr (has_fifth)
            for (int half = 0; half < 2; half++) transpose(rows, at + 16 + 16 * half, fifth + 4 * half);
    }
    void unpack(int pair, Unpacked<2, 1>& to) const {
        for (int half = 0; half < 2; half++) {
            Bytes raw[4];
            transpose(rows, at + (has_fifth ? 48 : 16) + 32 * pair + 16 * half, raw);
            for (int j = 0; j < 4; j++) to.w[4 * half + j] = low_nibbles(raw[j]), to.w[8 + 4 * half + j] = high_nibbles(raw[j]);
        }
        for (int i = 0; i < 2; i++) {
            const int group = 2 * pair + i;
            to.scale[i] = _mm512_mul_ps(d, byte_of(six[group / 4], group % 4));
            to.minimum[i] = _mm512_mul_ps(minimum, byte_of(low[group / 4], group % 4));
            if constexpr (has_fifth)
                for (int j = 0; j < 8; j++) {
                    const __mmask64 set = _mm512_test_epi8_mask(fifth[j], _mm512_set1_epi8(char(1 << group)));
                    to.w[8 * i + j] = _mm512_mask_add_epi8(to.w[8 * i + j], set, to.w[8 * i + j], _mm512_set1_epi8(16));
                }
        }
    }
};
template <> struct Strip<BlockType::Q4_K> : ScaledStrip<BlockType::Q4_K> {};
template <> struct Strip<BlockType::Q5_K> : ScaledStrip<BlockType::Q5_K> {};

// Blocks of 256 with a signed scale of eight bits for every 16. Each half of a block has 64 bytes of nibbles and 32 of bit pairs for its four groups.
template <>
struct Strip<BlockType::Q6_K> {
    static constexpr bool has_minimum = false;
    static constexpr int groups = 8, unit = 4, halves = 2, offset = 32;
    const uint8_t* const* rows;
    int64_t at;
    __m512 d;
    __m512i scales[4];

    void open(const uint8_t* const* from, int64_t start) {
        rows = from, at = start;
        transpose(rows, at + 192, scales);
        d = high_half(words(rows, at + 206));
    }
    void unpack(int half, Unpacked<4, 2>& to) const {
        for (int j = 0; j < 2; j++) {  // the lower and the upper 16 weights of each group
            Bytes high[4];
            transpose(rows, at + 128 + 32 * half + 16 * j, high);
            for (int i = 0; i < 2; i++) {  // groups i and i + 2
                Bytes low[4];
                transpose(rows, at + 64 * half + 32 * i + 16 * j, low);
                for (int n = 0; n < 4; n++) {
                    const __m512i pairs = _mm512_srl_epi16(high[n], _mm_cvtsi32_si128(2 * i)), mask = _mm512_set1_epi8(0x30);
                    to.w[8 * i + 4 * j + n] = _mm512_or_si512(low_nibbles(low[n]), _mm512_and_si512(_mm512_slli_epi16(pairs, 4), mask));
                    to.w[8 * (i + 2) + 4 * j + n] = _mm512_or_si512(high_nibbles(low[n]), _mm512_and_si512(pairs, mask));
                }
            }
        }
        for (int i = 0; i < 8; i++) {
            const __m512i byte = _mm512_srai_epi32(_mm512_sll_epi32(scales[2 * half + i / 4], _mm_cvtsi32_si128(24 - 8 * (i % 4))), 24);
            to.scale[i] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(byte));
        }
    }
};
