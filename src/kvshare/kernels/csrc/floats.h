// Numbers of 16 bits and float32. Included once by each file of a set inside that set's namespace, so that no function compiled for one set is linked
// into another; so is everything here that belongs to one.
#pragma once

inline float half_to_float(const uint8_t* p) {
#if defined(__F16C__)
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
#else
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 31) bits = sign | 0x7f800000 | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    else {  // zero or subnormal: mantissa * 2^-24
        const float small = float(mantissa) * 5.9604644775390625e-8f;
        return sign ? -small : small;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
#endif
}

inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_bf16(float f) {  // to nearest even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 64);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t float_to_half(float f) {  // to nearest even
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(f, 0));
#else
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size >= 0x7f800000) return uint16_t(sign | 0x7c00 | (size > 0x7f800000 ? 0x200 : 0));
    if (size < 0x38800000) {  // subnormal: a multiple of 2^-24
        float scaled;
        memcpy(&scaled, &size, 4);
        return uint16_t(sign | uint32_t(rintf(scaled * 16777216.0f)));
    }
    const uint32_t rounded = (size + 0xfff + (size >> 13 & 1)) >> 13;
    return uint16_t(sign | (rounded - 0x1c000 < 0x7c00 ? rounded - 0x1c000 : 0x7c00));
#endif
}

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) { *to = float_to_bf16(value); }
