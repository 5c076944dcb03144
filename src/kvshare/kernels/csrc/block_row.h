// Rows of a `BlockForm`: decoded and encoded as kvshare.cache.codecs.deepseek does, in plain C++ that compilers vectorise.
// Included once by each file of a set inside that set's namespace.
#pragma once

constexpr int EXPONENT_BIAS = 127;

inline float block_scale(const BlockForm& form, const uint8_t* scales, int block) {
    uint32_t bits;
    if (form.scale_bytes == 1) bits = scales[block] ? uint32_t(scales[block]) << 23 : 1u << 22;  // 2^-127 is subnormal
    else memcpy(&bits, scales + 4 * block, 4);
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

// Decodes as many of the first numbers as the instruction set has a way of its own for, and says how many; here none.
template <typename To>
inline int decode_whole_blocks(const BlockForm&, int, const uint8_t*, const uint8_t*, To*) {
    return 0;
}

template <typename To>
void decode_blocks(const BlockForm& form, int width, const uint8_t* p, To* to) {
    const int plain = width - form.exact;
    const uint8_t *exact = p + form.codes_bytes(width), *scales = exact + 2 * form.exact;
    for (int i = decode_whole_blocks(form, plain, p, scales, to); i < plain;) {
        const float scale = block_scale(form, scales, i / form.group);
        const int end = std::min(plain, (i / form.group + 1) * form.group);
        if (form.bits == 8)
            for (; i < end; i++) put(fp8_to_float(p[i]) * scale, to + i);
        else
            for (; i < end; i++) put(e2m1_to_float(p[i / 2] >> 4 * (i & 1) & 15) * scale, to + i);
    }
    for (int i = 0; i < form.exact; i++) {
        uint16_t bits;
        memcpy(&bits, exact + 2 * i, 2);
        put(bf16_to_float(bits), to + plain + i);
    }
}

inline float largest_size(const float* x, int width) {  // of |x|; not a number where one of them is none
    float largest = 0, all = 0;
    for (int i = 0; i < width; i++) {
        const float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        all += x[i] * 0.0f;
    }
    return all == 0 || largest == INFINITY ? largest : NAN;
}

// The least integer e with 2^e >= x, for positive x.
inline int power_above(float x) {
    int exponent = 0;
    const float mantissa = frexpf(x, &exponent);  // in [0.5, 1)
    return exponent - (mantissa == 0.5f);
}

inline void encode_blocks(const BlockForm& form, int width, const float* x, uint8_t* to) {
    const int plain = width - form.exact;
    const float largest = form.bits == 8 ? 448.0f : 6.0f, smallest = form.bits == 8 ? 1e-4f : 6 * 1.17549435e-38f;
    memset(to, 0, size_t(form.bytes(width)));
    uint8_t *exact = to + form.codes_bytes(width), *scales = exact + 2 * form.exact;
    for (int first = 0; first < plain; first += form.group) {
        const int count = std::min(form.group, plain - first), block = first / form.group;
        const float size = largest_size(x + first, count);
        const bool finite = size < INFINITY;  // what is no number has no scale either
        const int exponent = finite ? power_above((size > smallest ? size : smallest) / largest) : 0;
        const float factor = ldexpf(1.0f, -exponent);
        if (form.bits == 8)
            for (int i = first; i < first + count; i++) to[i] = finite ? float_to_fp8(x[i] * factor) : uint8_t(127);
        else
            for (int i = first; i < first + count; i++) to[i / 2] |= uint8_t(float_to_e2m1(x[i] * factor) << 4 * (i & 1));
        if (form.scale_bytes == 1) scales[block] = uint8_t(exponent + EXPONENT_BIAS);
        else {
            const float scale = ldexpf(1.0f, exponent);
            memcpy(scales + 4 * block, &scale, 4);
        }
    }
    for (int i = 0; i < form.exact; i++) {
        uint16_t bits;
        put(x[plain + i], &bits);
        memcpy(exact + 2 * i, &bits, 2);
    }
}
