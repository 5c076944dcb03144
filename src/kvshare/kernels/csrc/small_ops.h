// Norms, rotations and activations in plain C++ that compilers vectorise; 16-bit numbers are rounded where torch rounds them.
// Included once by each file of a set inside that set's namespace, behind floats.h.
#pragma once

inline float number(float v) { return v; }
inline float number(uint16_t v) { return bf16_to_float(v); }

template <typename T>
inline T stored(float v);
template <>
inline float stored<float>(float v) { return v; }
template <>
inline uint16_t stored<uint16_t>(float v) { return float_to_bf16(v); }

template <typename T>
inline float rounded(float v) { return number(stored<T>(v)); }

// Relative error below 2^-22; numbers beyond what a float can hold give its largest or smallest.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer: 1.5 * 2^23 has no room for a fraction
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// Of values: a loop with std::min's and std::max's references is not vectorised.
inline float at_least(float x, float least) { return x < least ? least : x; }
inline float at_most(float x, float most) { return x > most ? most : x; }

inline float silu(float x) { return x / (1.0f + exponential(-x)); }
inline float gelu_tanh(float x) { return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x))); }  // 2 sqrt(2 / pi)

template <typename T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) {
        const float v = number(x[i]);
        sum += v * v;
    }
    return 1.0f / sqrtf(sum / float(width) + eps);
}

// One head through `at`, which gives its numbers, normed or not. C is the type of cos and sin.
template <typename T, typename C, typename At>
inline void rotate_head(const HeadsTask& task, int64_t row, At at, T* out) {
    const int64_t width = task.width, pairs = task.pairs, first = task.interleaved ? width - 2 * pairs : 0;
    const C *cos = static_cast<const C*>(task.cos) + row * pairs, *sin = static_cast<const C*>(task.sin) + row * pairs;
    const int64_t passing = task.interleaved ? 0 : 2 * pairs, passing_end = task.interleaved ? first : width;
#pragma omp simd
    for (int64_t i = passing; i < passing_end; i++) out[i] = stored<T>(at(i));
    if (task.interleaved) {
#pragma omp simd
        for (int64_t p = 0; p < pairs; p++) {
            const float a = at(first + 2 * p), b = at(first + 2 * p + 1), c = number(cos[p]), s = number(sin[p]);
            out[first + 2 * p] = stored<T>(rounded<C>(a * c) - rounded<C>(b * s));
            out[first + 2 * p + 1] = stored<T>(rounded<C>(b * c) + rounded<C>(a * s));
        }
    } else {
#pragma omp simd
        for (int64_t p = 0; p < pairs; p++) {
            const float a = at(p), b = at(p + pairs), c = number(cos[p]), s = number(sin[p]);
            out[p] = stored<T>(rounded<C>(a * c) - rounded<C>(b * s));
            out[p + pairs] = stored<T>(rounded<C>(b * c) + rounded<C>(a * s));
        }
    }
}

template <typename T, typename C>
void heads_rows(const HeadsTask& task, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < task.heads; head++) {
            const T* x = static_cast<const T*>(task.x) + row * task.row_stride + head * task.head_stride;
            T* out = static_cast<T*>(task.out) + (row * task.heads + head) * task.width;
            if (task.weight) {
                const float r = inverse_rms(x, task.width, task.eps);
                const float* weight = task.weight;
                rotate_head<T, C>(task, row, [=](int64_t i) { return rounded<T>(number(x[i]) * r * weight[i]); }, out);
            } else {
                rotate_head<T, C>(task, row, [=](int64_t i) { return number(x[i]); }, out);
            }
        }
}

inline void heads(const HeadsTask& task, bool bf16, int64_t begin, int64_t end) {
    if (!bf16) heads_rows<float, float>(task, begin, end);
    else if (task.precise) heads_rows<uint16_t, float>(task, begin, end);
    else heads_rows<uint16_t, uint16_t>(task, begin, end);
}

template <typename T>
void sum_rows(const SumTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    const float scale = task.scale;
    for (int64_t row = begin; row < end; row++) {
        const T *x = static_cast<const T*>(task.x) + row * width, *y = static_cast<const T*>(task.y) + row * width;
        T* sum = static_cast<T*>(task.sum) + row * width;
        float squares = 0;
        const auto add = [&](auto term) {
            float total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < width; i++) {
                const float v = rounded<T>(rounded<T>(number(x[i]) + term(i)) * scale);
                sum[i] = stored<T>(v);
                total += v * v;
            }
            squares = total;
        };
        if (task.y_weight) {
            const float r = inverse_rms(y, width, task.y_eps);
            const float* weight = task.y_weight;
            add([=](int64_t i) { return rounded<T>(number(y[i]) * r * weight[i]); });
        } else {
            add([=](int64_t i) { return number(y[i]); });
        }
        if (!task.weight) continue;
        T* normed = static_cast<T*>(task.normed) + row * width;
        const float r = 1.0f / sqrtf(squares / float(width) + task.eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) normed[i] = stored<T>(number(sum[i]) * r * task.weight[i]);
    }
}

inline void sum(const SumTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? sum_rows<uint16_t>(task, begin, end) : sum_rows<float>(task, begin, end);
}

// What `deviations` takes from every gate of a row. Torch rounds the mean, the deviation and what is made of them.
template <typename T>
float gate_cut(const T* gate, int64_t width, float deviations) {
    float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) total += number(gate[i]);
    const float mean = total / float(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += (number(gate[i]) - mean) * (number(gate[i]) - mean);
    return rounded<T>(rounded<T>(mean) + rounded<T>(rounded<T>(sqrtf(squares / float(width))) * rounded<T>(deviations)));
}

template <typename T>
void gate_rows(const GateTask& task, int64_t begin, int64_t end) {
    const Activation& activation = task.activation;
    const float limit = activation.limit;
    const int64_t width = task.width;
    for (int64_t row = begin; row < end; row++) {
        const T *gate = static_cast<const T*>(task.gate) + row * task.gate_stride, *up = static_cast<const T*>(task.up) + row * task.up_stride;
        T* out = static_cast<T*>(task.out) + row * width;
        const auto all = [=](auto activated) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) out[i] = stored<T>(rounded<T>(activated(number(gate[i]))) * at_most(at_least(number(up[i]), -limit), limit));
        };
        if (activation.deviations > -INFINITY) {
            const float cut = gate_cut(gate, task.width, activation.deviations);
            all([=](float g) { return gelu_tanh(at_least(rounded<T>(g - cut), 0.0f)); });
        } else if (activation.gelu) {
            all([](float g) { return gelu_tanh(g); });
        } else {
            all([=](float g) { return silu(at_most(g, limit)); });
        }
    }
}

inline void gate(const GateTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? gate_rows<uint16_t>(task, begin, end) : gate_rows<float>(task, begin, end);
}

template <typename T>
void affine_rows(const AffineTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    const float factor = task.factor;
    for (int64_t row = begin; row < end; row++) {
        T* x = static_cast<T*>(task.x) + row * width;
        const auto all = [=](auto bias) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) x[i] = stored<T>(rounded<T>(number(x[i]) * factor) + bias(i));
        };
        if (const T* bias = static_cast<const T*>(task.bias)) all([=](int64_t i) { return number(bias[i]); });
        else all([](int64_t) { return 0.0f; });
    }
}

inline void affine(const AffineTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? affine_rows<uint16_t>(task, begin, end) : affine_rows<float>(task, begin, end);
}

inline void cap(float* x, int64_t count, float cap) {
    const float inverse = 1.0f / cap;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float e = exponential(-2.0f * (x[i] < 0 ? -x[i] : x[i]) * inverse);
        const float t = cap * (1.0f - e) / (1.0f + e);
        x[i] = x[i] < 0 ? -t : t;
    }
}

template <typename T, typename W>
void combine_rows(const CombineTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    for (int64_t row = begin; row < end; row++) {
        const T *y = static_cast<const T*>(task.y) + row * task.k * width, *beside = static_cast<const T*>(task.beside) + (task.beside ? row * width : 0);
        const W* weights = static_cast<const W*>(task.weights) + row * task.k;
        T* out = static_cast<T*>(task.out) + row * width;
        const auto all = [&](auto last) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float total = 0;
                for (int64_t j = 0; j < task.k; j++) total += number(y[j * width + i]) * number(weights[j]);
                out[i] = stored<T>(last(rounded<T>(rounded<T>(total) * task.scale), i));
            }
        };
        if (beside) all([=](float v, int64_t i) { return v + number(beside[i]); });
        else all([](float v, int64_t) { return v; });
    }
}

inline void combine(const CombineTask& task, bool bf16, int64_t begin, int64_t end) {
    if (!bf16) combine_rows<float, float>(task, begin, end);
    else if (task.weights_bf16) combine_rows<uint16_t, uint16_t>(task, begin, end);
    else combine_rows<uint16_t, float>(task, begin, end);
}

inline float softplus_of(float x) { return x > 20 ? x : log1pf(expf(x)); }

template <typename T>
void softplus_rows(const SoftplusTask& task, int64_t begin, int64_t end) {
    for (int64_t head = begin * task.heads; head < end * task.heads; head++) {
        const T *x = static_cast<const T*>(task.x) + head * task.width, *gate = static_cast<const T*>(task.gate) + head * (task.per_head ? 1 : task.width);
        T* out = static_cast<T*>(task.out) + head * task.width;
        const float one = rounded<T>(softplus_of(number(gate[0])));
        for (int64_t i = 0; i < task.width; i++) out[i] = stored<T>(number(x[i]) * (task.per_head ? one : rounded<T>(softplus_of(number(gate[i])))));
    }
}

inline void softplus(const SoftplusTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? softplus_rows<uint16_t>(task, begin, end) : softplus_rows<float>(task, begin, end);
}

#include "routing.h"
#include "stream_ops.h"
#include "edge_ops.h"

#include "recurrent_ops.h"

constexpr SmallOps small_ops = {heads, sum, gate, affine, cap, combine, softplus, route, stream_ops, edge_ops, recurrent_ops};
