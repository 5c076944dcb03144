// Sixteen lanes in plain C++ that compilers turn into the vectors that there are. Included by each set without vectors of its own.
#pragma once

#pragma GCC diagnostic ignored "-Wpsabi"  // functions of vectors are inlined
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));  // also pairs of bfloat16
constexpr bool WIDE = false;  // registers for few accumulators only

inline Lanes all(float x) { return x - Lanes{}; }
inline Lanes high_half(Words w) { return (Lanes)(w & int32_t(0xffff0000)); }

inline Lanes dot(Lanes sum, Words a, Words b) { return sum + (Lanes)(a << 16) * (Lanes)(b << 16) + high_half(a) * high_half(b); }

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline Lanes power_of_two(Lanes x) {  // relative error below 4e-6; 1 at 0; 0 below -126
    const Lanes t = larger(x, all(-127.0f));
    Words whole = __builtin_convertvector(t, Words);
    whole += __builtin_convertvector(whole, Lanes) > t;  // true is -1
    const Lanes part = t - __builtin_convertvector(whole, Lanes);
    const Lanes p = 1.0f + part * (0.69304484f + part * (0.2412802f + part * (0.05224247f + part * 0.01342668f)));
    return p * (Lanes)((whole + 127) << 23);
}

inline Words bf16_bits(Lanes x) {
    const Words bits = (Words)x;
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}

inline Words pairs_of(Lanes first, Lanes second) { return bf16_bits(first) | (bf16_bits(second) << 16); }

inline void store_bf16(uint16_t* to, Lanes x) {
    const Words bits = bf16_bits(x);
    for (int i = 0; i < 16; i++) to[i] = uint16_t(bits[i]);
}

inline void transpose(Words* rows) {  // 16 of 16
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            const int32_t kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
}

// Each of `count` <= PANEL words of `even` beside the one of `odd`, and zeros up to PANEL.
inline void interleave(const uint16_t* even, const uint16_t* odd, int count, uint32_t* to) {
    for (int i = 0; i < count; i++) to[i] = even[i] | uint32_t(odd[i]) << 16;
    for (int i = count; i < PANEL; i++) to[i] = 0;
}
