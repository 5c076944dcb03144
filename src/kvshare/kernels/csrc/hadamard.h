// The normalised Walsh-Hadamard transform, in plain C++ that compilers vectorise. Included once by each file of a set inside that set's namespace.
#pragma once

// One step of it on x[size], in place: sums and differences of numbers that are `half` apart.
inline void add_and_subtract(float* x, int size, int half) {
    for (int i = 0; i < size; i += 2 * half)
        for (int j = i; j < i + half; j++) {
            const float a = x[j], b = x[j + half];
            x[j] = a + b;
            x[j + half] = a - b;
        }
}

inline void scale_all(float* x, int size, float unit) {
    for (int i = 0; i < size; i++) x[i] *= unit;
}

inline void hadamard(float* x, int size) {
    for (int half = 1; half < size; half *= 2) add_and_subtract(x, size, half);
    scale_all(x, size, 1.0f / sqrtf(float(size)));
}
