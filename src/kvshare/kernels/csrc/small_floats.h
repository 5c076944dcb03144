// Floats of 8 and 4 bits, in plain C++ that compilers vectorise. Included once by each file of a set inside that set's namespace.
#pragma once

inline float fp8_to_float(uint8_t code) {  // e4m3: the exponent is 120 less than float32's, which multiplying makes right for subnormals too
    const uint32_t size = code & 127, bits = size == 127 ? 0x7fc00000u : size << 20;
    float f;
    memcpy(&f, &bits, 4);
    f *= 1.329227995784916e36f;
    return code & 128 ? -f : f;
}

inline uint8_t float_to_fp8(float f) {  // e4m3, to nearest even, for |f| <= 448
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint8_t sign = uint8_t(bits >> 24 & 128);
    const float size = fabsf(f);
    if (!(size == size)) return sign | 127;
    if (size < 0.015625f) return sign | uint8_t(rintf(size * 512.0f));  // subnormal: a multiple of 2^-9
    bits &= 0x7fffffff;
    return sign | uint8_t(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960);
}

constexpr float E2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

inline float e2m1_to_float(int code) { return code & 8 ? -E2M1[code & 7] : E2M1[code & 7]; }

inline uint8_t float_to_e2m1(float f) {  // to nearest even, for |f| <= 6
    const float size = fabsf(f);
    const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return uint8_t(code | (bits >> 31) << 3);
}
