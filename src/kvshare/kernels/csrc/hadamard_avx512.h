// The Walsh-Hadamard transform for AVX512: the steps within sixteen numbers in a register. Every sum is that of the plain one, to the bit.
#pragma once

inline void hadamard_avx512(float* x, int size) {
    if (size < 16) return hadamard(x, size);
    const auto step = [](__m512 own, __m512 other, __mmask16 second) __attribute__((always_inline)) {
        return _mm512_mask_sub_ps(_mm512_add_ps(own, other), second, other, own);
    };
    for (int i = 0; i < size; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        v = step(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
        v = step(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
        v = step(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
        v = step(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
        _mm512_storeu_ps(x + i, v);
    }
    for (int half = 16; half < size; half *= 2) add_and_subtract(x, size, half);
    scale_all(x, size, 1.0f / sqrtf(float(size)));
}
