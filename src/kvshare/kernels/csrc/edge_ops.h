// Rows of embeddings, cosines and sines of positions, the best of all logits. Included by small_ops.h.
#pragma once

struct Turned {
    double cos, sin;
};

// Of angles below 2^20 right angles, to 2^-45: Taylor's series behind a reduction to an eighth of a circle.
inline Turned turned(double angle) {
    const double whole = (angle * 0.63661977236758134 + 6755399441055744.0) - 6755399441055744.0;  // to the nearest integer: 1.5 * 2^52 has no room for a fraction
    const double r = (angle - whole * 1.57079632673412561417) - whole * 6.07710050650619224932e-11;  // pi / 2 as a number of 33 bits and the rest
    const double s = r * r;
    double sine = 1.6059043836821613e-10, cosine = -1.1470745597729725e-11;  // 1 / 13!, -1 / 14!
    sine = sine * s - 2.5052108385441720e-8;
    sine = sine * s + 2.7557319223985893e-6;
    sine = sine * s - 1.9841269841269841e-4;
    sine = sine * s + 8.3333333333333333e-3;
    sine = sine * s - 1.6666666666666667e-1;
    sine = sine * s * r + r;
    cosine = cosine * s + 2.0876756987868099e-9;
    cosine = cosine * s - 2.7557319223985888e-7;
    cosine = cosine * s + 2.4801587301587302e-5;
    cosine = cosine * s - 1.3888888888888889e-3;
    cosine = cosine * s + 4.1666666666666667e-2;
    cosine = cosine * s - 0.5;
    cosine = cosine * s + 1.0;
    const int32_t quarter = int32_t(whole);
    const bool crossed = quarter & 1;
    const double c = crossed ? sine : cosine, d = crossed ? cosine : sine;
    return {(quarter + 1) & 2 ? -c : c, quarter & 2 ? -d : d};
}

template <typename T>
void turn_rows(const TurnTask& task, int64_t begin, int64_t end) {
    const int64_t pairs = task.pairs;
    const float factor = task.factor;
    for (int64_t row = begin; row < end; row++) {
        const float position = float(task.positions[row]);
        T *cos = static_cast<T*>(task.cos) + row * pairs, *sin = static_cast<T*>(task.sin) + row * pairs;
#pragma omp simd
        for (int64_t p = 0; p < pairs; p++) {
            const Turned at = turned(double(position * task.inverse[p]));
            cos[p] = stored<T>(float(at.cos) * factor);
            sin[p] = stored<T>(float(at.sin) * factor);
        }
    }
}

inline void turn(const TurnTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? turn_rows<uint16_t>(task, begin, end) : turn_rows<float>(task, begin, end);
}

template <typename S, typename T>
void gather_rows(const GatherTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    const float scale = rounded<T>(task.scale);
    for (int64_t i = begin; i < end; i++) {
        const S* from = static_cast<const S*>(task.table) + (task.rows ? task.rows[i] : i) * task.stride;
        T* out = static_cast<T*>(task.out) + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = stored<T>(rounded<T>(number(from[j])) * scale);
    }
}

inline void gather(const GatherTask& task, bool bf16, int64_t begin, int64_t end) {
    if (task.table_bf16) bf16 ? gather_rows<uint16_t, uint16_t>(task, begin, end) : gather_rows<uint16_t, float>(task, begin, end);
    else bf16 ? gather_rows<float, uint16_t>(task, begin, end) : gather_rows<float, float>(task, begin, end);
}

inline float ordered(float x) { return x == x ? x : INFINITY; }

inline float largest(const float* x, int64_t count) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++) {
        const float v = ordered(x[i]);
        most = v > most ? v : most;
    }
    return most;
}

inline int64_t first_of(const float* x, int64_t count, float value) {
    for (int64_t i = 0; i < count; i++)
        if (ordered(x[i]) == value) return i;
    return 0;
}

#include "sampling_ops.h"

constexpr EdgeOps edge_ops = {turn, gather, largest, first_of, sampling_ops};
