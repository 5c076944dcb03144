// Strips for AVX512: sixteen rows of weights at a time, one in each lane of 32 bits: four weights of a row behind one another are the four bytes of its
// lane. So scales, minima and sums of different rows share registers, nothing is summed across lanes, and the cost of reading a format is divided by
// all rows of activations. Interleaved rows (interleave.h) are loaded so; those of the file 16 bytes each, and transposed. Weights become unsigned
// bytes; signed formats have an `offset`, a multiple of which the products subtract as integers.
#pragma once

using Bytes = __m512i;

constexpr int LANES = STRIP;

// Word j of v[a] <-> word a of v[j] in each quarter.
inline __attribute__((always_inline)) void transpose_quarters(Bytes* v) {
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(low01, low23);
    v[1] = _mm512_unpackhi_epi64(low01, low23);
    v[2] = _mm512_unpacklo_epi64(high01, high23);
    v[3] = _mm512_unpackhi_epi64(high01, high23);
}

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
    transpose_quarters(v);
    for (int j = 0; j < 4; j++) to[j] = v[j];
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
// Byte i of each lane, the others zero; in the uppermost place where Top.
template <bool Top = false>
inline __m512i byte_of(__m512i v, int i) {
    alignas(64) static constexpr uint32_t INDICES[2][4] = {{0xffffff00, 0xffffff01, 0xffffff02, 0xffffff03}, {0x00ffffff, 0x01ffffff, 0x02ffffff, 0x03ffffff}};
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // a byte of an index counts from the beginning of 16 bytes
    return _mm512_shuffle_epi8(v, _mm512_or_si512(lane, _mm512_set1_epi32(int(INDICES[Top][i]))));
}

// Sixteen rows as they lie in the file, the last one repeated where there are fewer. `open` a block, then read its fields.
template <BlockType T>
class FileStrip {
  public:
    FileStrip(const uint8_t* weights, int64_t blocks, int64_t count) {
        for (int i = 0; i < LANES; i++) rows_[i] = weights + (i < count ? i : count - 1) * blocks * shape_of(T).bytes;
    }
    void open(int64_t block) { at_ = block * shape_of(T).bytes; }
    template <int I>
    __m512 number() const {  // the I-th of the 16-bit floats
        constexpr int at = strip_shape(T).floats_at + 2 * I;
        return at % 4 ? high_half(words(rows_, at_ + at - 2)) : at + 4 > shape_of(T).bytes ? high_half(words(rows_, at_ + at - 2)) : low_half(words(rows_, at_ + at));
    }
    Bytes word(int i) const { return words(rows_, at_ + strip_shape(T).words_at + 4 * i); }
    void four(int i, Bytes* to) const { transpose(rows_, at_ + strip_shape(T).words_at + 4 * i, to); }

  private:
    const uint8_t* rows_[LANES];
    int64_t at_;
};

// The same of sixteen interleaved rows.
template <BlockType T>
class InterleavedStrip {
  public:
    InterleavedStrip(const uint8_t* strip, int64_t blocks) : strip_(strip), blocks_(blocks) {}
    void open(int64_t block) { at_ = strip_block<T>(strip_, blocks_, block); }
    template <int I>
    __m512 number() const {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at_.floats + 2 * LANES * I)));
    }
    Bytes word(int i) const { return _mm512_loadu_si512(at_.words + 4 * LANES * i); }
    void four(int i, Bytes* to) const {
        for (int j = 0; j < 4; j++) to[j] = word(i + j);
    }

  private:
    const uint8_t* strip_;
    int64_t blocks_;
    StripBlock<const uint8_t> at_;
};

// Groups of 32 weights of sixteen rows.
template <int Groups, int Halves>
struct Unpacked {
    Bytes w[8 * Groups];            // four weights of each row a register
    __m512 scale[Halves * Groups];  // of each group, or of each half of one
    __m512 minimum[Groups];
};

// How a format is read from a strip: `open` a block, then `unpack` its `groups` groups, `unit` of them at a time.

// Blocks of 32 in nibbles: Q4_0, Q4_1, Q5_0, Q5_1.
template <BlockType T>
struct NibbleReader {
    static constexpr bool has_fifth = T == BlockType::Q5_0 || T == BlockType::Q5_1;
    static constexpr bool has_minimum = T == BlockType::Q4_1 || T == BlockType::Q5_1;
    static constexpr int groups = 1, unit = 1, halves = 1, offset = has_minimum ? 0 : has_fifth ? 16 : 8, levels = has_fifth ? 32 : 16;

    void open(const auto&) {}
    void unpack(const auto& strip, int, Unpacked<1, 1>& to) const {
        to.scale[0] = strip.template number<0>();
        if constexpr (has_minimum) to.minimum[0] = strip.template number<1>();
        Bytes raw[4];
        strip.four(has_fifth, raw);
        for (int j = 0; j < 4; j++) to.w[j] = low_nibbles(raw[j]), to.w[4 + j] = high_nibbles(raw[j]);
        if constexpr (has_fifth) {
            const __m512i bits = strip.word(0);
            for (int j = 0; j < 8; j++) {  // bit 4 * j + i belongs to byte i of register j
                const __m512i byte = _mm512_shuffle_epi8(bits, _mm512_add_epi8(_mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0), _mm512_set1_epi8(char(j / 2))));
                const __mmask64 fifth = _mm512_test_epi8_mask(byte, _mm512_set1_epi32(j % 2 ? int(0x80402010) : 0x08040201));
                to.w[j] = _mm512_mask_add_epi8(to.w[j], fifth, to.w[j], _mm512_set1_epi8(16));
            }
        }
    }
};

struct ByteReader {  // Q8_0
    static constexpr bool has_minimum = false;
    static constexpr int groups = 1, unit = 1, halves = 1, offset = 128, levels = 256;

    void open(const auto&) {}
    void unpack(const auto& strip, int, Unpacked<1, 1>& to) const {
        to.scale[0] = strip.template number<0>();
        for (int half = 0; half < 2; half++) strip.four(4 * half, to.w + 4 * half);
        for (auto& w : to.w) w = _mm512_xor_si512(w, _mm512_set1_epi8(char(0x80)));  // signed to unsigned
    }
};

// Blocks of 256 with eight scales and minima of six bits: Q4_K, Q5_K. 32 bytes of nibbles are two groups.
template <BlockType T>
struct ScaledReader {
    static constexpr bool has_fifth = T == BlockType::Q5_K, has_minimum = true;
    static constexpr int groups = 8, unit = 2, halves = 1, offset = 0, levels = has_fifth ? 32 : 16;
    __m512 d, minimum;
    __m512i six[2], low[2];  // bytes: scales and minima of groups 0-3 and 4-7
    Bytes fifth[has_fifth ? 8 : 1];

    void open(const auto& strip) {
        Bytes head[4];  // scales 0-3; minima 0-3; the lower halves of 4-7, whose upper bits are those of the first eight
        strip.four(0, head);
        d = strip.template number<0>();
        minimum = _mm512_sub_ps(_mm512_setzero_ps(), strip.template number<1>());
        const __m512i upper = _mm512_set1_epi8(0x30), first = _mm512_set1_epi8(0x3f);
        six[0] = _mm512_and_si512(head[0], first);
        low[0] = _mm512_and_si512(head[1], first);
        six[1] = _mm512_or_si512(low_nibbles(head[2]), _mm512_and_si512(_mm512_srli_epi16(head[0], 2), upper));
        low[1] = _mm512_or_si512(high_nibbles(head[2]), _mm512_and_si512(_mm512_srli_epi16(head[1], 2), upper));
        if constexpr (has_fifth)
            for (int half = 0; half < 2; half++) strip.four(3 + 4 * half, fifth + 4 * half);
    }
    void unpack(const auto& strip, int pair, Unpacked<2, 1>& to) const {
        each<2>([&](auto half) __attribute__((always_inline)) {
            Bytes raw[4];
            strip.four((has_fifth ? 11 : 3) + 8 * pair + 4 * half, raw);
            each<4>([&](auto j) __attribute__((always_inline)) { to.w[4 * half + j] = low_nibbles(raw[j]), to.w[8 + 4 * half + j] = high_nibbles(raw[j]); });
        });
        each<2>([&](auto i) __attribute__((always_inline)) {
            const int group = 2 * pair + i;
            to.scale[i] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(byte_of(six[pair / 2], group % 4)));
            to.minimum[i] = _mm512_mul_ps(minimum, _mm512_cvtepi32_ps(byte_of(low[pair / 2], group % 4)));
            if constexpr (has_fifth)
                each<8>([&](auto j) __attribute__((always_inline)) {
                    const __mmask64 set = _mm512_test_epi8_mask(fifth[j], _mm512_set1_epi8(char(1 << group)));
                    to.w[8 * i + j] = _mm512_mask_add_epi8(to.w[8 * i + j], set, to.w[8 * i + j], _mm512_set1_epi8(16));
                });
        });
    }
};

// Blocks of 256 with a signed scale of eight bits for every 16. Each half of a block has 64 bytes of nibbles and 32 of bit pairs for its four groups.
struct SixReader {
    static constexpr bool has_minimum = false;
    static constexpr int groups = 8, unit = 4, halves = 2, offset = 32, levels = 64;
    __m512 d;
    __m512i scales[4];

    void open(const auto& strip) {
        strip.four(48, scales);
        d = strip.template number<0>();
    }
    void unpack(const auto& strip, int half, Unpacked<4, 2>& to) const {
        each<2>([&](auto j) __attribute__((always_inline)) {  // the lower and the upper 16 weights of each group
            Bytes high[4];
            strip.four(32 + 8 * half + 4 * j, high);
            each<2>([&](auto i) __attribute__((always_inline)) {  // groups i and i + 2
                Bytes low[4];
                strip.four(16 * half + 8 * i + 4 * j, low);
                for (int n = 0; n < 4; n++) {
                    const __m512i mask = _mm512_set1_epi8(0x30);
                    const __m512i first = i ? _mm512_slli_epi16(high[n], 2) : _mm512_slli_epi16(high[n], 4), second = i ? _mm512_srli_epi16(high[n], 2) : high[n];
                    to.w[8 * i + 4 * j + n] = _mm512_or_si512(low_nibbles(low[n]), _mm512_and_si512(first, mask));
                    to.w[8 * (i + 2) + 4 * j + n] = _mm512_or_si512(high_nibbles(low[n]), _mm512_and_si512(second, mask));
                }
            });
        });
        for (int i = 0; i < 8; i++)
            to.scale[i] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(byte_of<true>(scales[2 * half + i / 4], i % 4), 24)));
    }
};

template <BlockType T>
using Reader = std::conditional_t<T == BlockType::Q8_0, ByteReader,
               std::conditional_t<T == BlockType::Q6_K, SixReader,
               std::conditional_t<T == BlockType::Q4_K || T == BlockType::Q5_K, ScaledReader<T>, NibbleReader<T>>>>;
