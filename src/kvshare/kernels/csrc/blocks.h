// GGUF's blocks, 32 weights at a time, in plain C++: what every instruction set without its own reading of a format uses.
// Included once by each file of a set inside that set's namespace, so that no function compiled for one set is linked into another.
#pragma once

// 32 weights: q[i] * scale[i / 16] + minimum.
struct Group {
    int8_t q[32];
    float scale[2];
    float minimum;
};

// The six-bit scale and minimum of group j of a Q4_K or Q5_K block, from its 12 bytes.
inline void k_scale(const uint8_t* s, int j, int& scale, int& minimum) {
    if (j < 4) {
        scale = s[j] & 63;
        minimum = s[j + 4] & 63;
    } else {
        scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
        minimum = (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
    }
}

inline void nibbles(const uint8_t* from, int offset, int8_t* q) {  // low halves of 16 bytes, then high halves
    for (int i = 0; i < 16; i++) {
        q[i] = int8_t((from[i] & 15) - offset);
        q[i + 16] = int8_t((from[i] >> 4) - offset);
    }
}

inline void fifth_bits(const uint8_t* from, int8_t* q) {  // bit i of four bytes is worth 16 in weight i
    uint32_t bits;
    memcpy(&bits, from, 4);
    for (int i = 0; i < 32; i++) q[i] = int8_t(q[i] + int((bits >> i & 1) << 4));
}

// Group g of a row of blocks.
template <BlockType T>
inline void read_group(const uint8_t* row, int64_t g, Group& to) {
    constexpr BlockShape shape = shape_of(T);
    const uint8_t* p = row + g * 32 / shape.weights * shape.bytes;
    to.minimum = 0;
    if constexpr (T == BlockType::Q4_0 || T == BlockType::Q5_0 || T == BlockType::Q8_0) {
        to.scale[0] = to.scale[1] = half_to_float(p);
        if constexpr (T == BlockType::Q4_0) nibbles(p + 2, 8, to.q);
        if constexpr (T == BlockType::Q8_0) memcpy(to.q, p + 2, 32);
        if constexpr (T == BlockType::Q5_0) {
            nibbles(p + 6, 16, to.q);
            fifth_bits(p + 2, to.q);
        }
    } else if constexpr (T == BlockType::Q4_1 || T == BlockType::Q5_1) {
        to.scale[0] = to.scale[1] = half_to_float(p);
        to.minimum = half_to_float(p + 2);
        nibbles(p + (T == BlockType::Q4_1 ? 4 : 8), 0, to.q);
        if constexpr (T == BlockType::Q5_1) fifth_bits(p + 4, to.q);
    } else if constexpr (T == BlockType::Q4_K || T == BlockType::Q5_K) {
        const int j = int(g & 7);
        int scale, minimum;
        k_scale(p + 4, j, scale, minimum);
        to.scale[0] = to.scale[1] = half_to_float(p) * float(scale);
        to.minimum = -half_to_float(p + 2) * float(minimum);
        const uint8_t* q = p + (T == BlockType::Q4_K ? 16 : 48) + j / 2 * 32;
        const int shift = j & 1 ? 4 : 0;
        for (int i = 0; i < 32; i++) to.q[i] = int8_t(q[i] >> shift & 15);
        if constexpr (T == BlockType::Q5_K)
            for (int i = 0; i < 32; i++) to.q[i] = int8_t(to.q[i] + ((p[16 + i] >> j & 1) << 4));
    } else if constexpr (T == BlockType::Q6_K) {
        const int half = int(g & 7) / 4, j = int(g & 3);  // each half of a block has 64 + 32 bytes for its four groups
        const uint8_t* low = p + 64 * half + 32 * (j & 1);
        const uint8_t* high = p + 128 + 32 * half;
        const int8_t* scales = reinterpret_cast<const int8_t*>(p) + 192 + 8 * half + 2 * j;
        const float d = half_to_float(p + 208);
        to.scale[0] = d * float(scales[0]);
        to.scale[1] = d * float(scales[1]);
        const int low_shift = j & 2 ? 4 : 0, high_shift = 2 * j;
        for (int i = 0; i < 32; i++) to.q[i] = int8_t(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
    }
}
