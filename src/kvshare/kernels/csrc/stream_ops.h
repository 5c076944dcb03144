// Operations on several residual streams, rounded where torch rounds. Included by small_ops.h.
#pragma once

inline float tanh_of(float x) {
    const float e = exponential(-2.0f * (x < 0 ? -x : x)), t = (1.0f - e) / (1.0f + e);
    return x < 0 ? -t : t;
}

// matrix[outputs, streams] . tanh(routed): what AltUp mixes with.
template <typename T>
void altup_mix(const AltUpTask& task, int64_t row, int64_t outputs, float* mix) {
    const int64_t n = task.streams;
    float modalities[MAX_STREAMS];
    for (int64_t s = 0; s < n; s++) modalities[s] = rounded<T>(tanh_of(rounded<T>(number(static_cast<const T*>(task.routed)[row * n + s]) * task.scale)));
    for (int64_t o = 0; o < outputs; o++) {
        float total = 0;
        for (int64_t s = 0; s < n; s++) total += number(static_cast<const T*>(task.matrix)[o * n + s]) * modalities[s];
        mix[o] = rounded<T>(total);
    }
}

template <typename T>
void predict_rows(const AltUpTask& task, int64_t begin, int64_t end) {
    const int64_t n = task.streams, width = task.width;
    float mix[MAX_STREAMS * MAX_STREAMS];
    for (int64_t row = begin; row < end; row++) {
        altup_mix<T>(task, row, n * n, mix);
        const T* x = static_cast<const T*>(task.x) + row * n * width;
        T* out = static_cast<T*>(task.out) + row * n * width;
        for (int64_t to = 0; to < n; to++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float total = 0;
                for (int64_t from = 0; from < n; from++) total += mix[to * n + from] * number(x[from * width + i]);
                out[to * width + i] = stored<T>(number(x[to * width + i]) + rounded<T>(total));
            }
    }
}

template <typename T>
void correct_rows(const AltUpTask& task, int64_t begin, int64_t end) {
    const int64_t n = task.streams, width = task.width;
    float gains[MAX_STREAMS];
    for (int64_t row = begin; row < end; row++) {
        altup_mix<T>(task, row, n, gains);
        const T *x = static_cast<const T*>(task.x) + row * n * width, *active = static_cast<const T*>(task.active) + row * width;
        const T* weight = static_cast<const T*>(task.gain);
        T *out = static_cast<T*>(task.out) + row * n * width, *seen = static_cast<T*>(task.seen) + row * width;
        for (int64_t to = 0; to < n; to++) {
            const float gain = rounded<T>(gains[to] + 1.0f);
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                out[to * width + i] = stored<T>(number(x[to * width + i]) + rounded<T>(rounded<T>(number(active[i]) - number(x[i])) * gain));
        }
#pragma omp simd
        for (int64_t i = 0; i < width; i++) seen[i] = weight ? stored<T>(number(out[i]) * number(weight[i])) : out[i];
    }
}

template <typename T>
void stream_sum_rows(const StreamSumTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    for (int64_t row = begin; row < end; row++) {
        const T* y = static_cast<const T*>(task.y) + row * width;
        const float r = inverse_rms(y, width, task.eps);
        for (int64_t s = 1; s < task.streams; s++) {
            T* x = static_cast<T*>(task.x) + (row * task.streams + s) * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) x[i] = stored<T>(number(x[i]) + rounded<T>(number(y[i]) * r * task.weight[i]));
        }
    }
}

template <typename T>
inline float mean_square(const T* x, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += rounded<T>(number(x[i]) * number(x[i]));
    return rounded<T>(sum / float(width));
}

template <typename T>
void magnitude_rows(const MagnitudeTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width, n = task.streams;
    for (int64_t row = begin; row < end; row++) {
        const T* first = static_cast<const T*>(task.first) + row * task.first_stride;
        T* out = static_cast<T*>(task.out) + row * width * (task.mean ? 1 : n);
        const float wanted = rounded<T>(sqrtf(mean_square(first, width)));
        const T* others[MAX_STREAMS];
        float found[MAX_STREAMS];
        for (int64_t s = 1; s < n; s++) {
            others[s] = static_cast<const T*>(task.others[s]) + row * task.others_stride;
            found[s] = rounded<T>(sqrtf(std::max(mean_square(others[s], width), rounded<T>(1e-5f))));
        }
        const auto at_magnitude = [&](int64_t s, int64_t i) { return rounded<T>(rounded<T>(number(others[s][i]) * wanted) / found[s]); };
        if (task.mean) {
            for (int64_t i = 0; i < width; i++) {
                float total = number(first[i]);
                for (int64_t s = 1; s < n; s++) total += at_magnitude(s, i);
                out[i] = stored<T>(total / float(n));
            }
            continue;
        }
        memcpy(out, first, size_t(width) * sizeof(T));
        for (int64_t s = 1; s < n; s++)
            for (int64_t i = 0; i < width; i++) out[s * width + i] = stored<T>(at_magnitude(s, i));
    }
}

template <typename T>
void project_weights(const T* x, const float* fn, int64_t weights, int64_t length, float* to, int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
        float total = 0;
        if (w == weights) {
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < length; i++) total += number(x[i]) * number(x[i]);
        } else {
            const float* own = fn + w * length;
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < length; i++) total += own[i] * number(x[i]);
        }
        to[w] = total;
    }
}

inline void project(const void* x, bool bf16, const float* fn, int64_t weights, int64_t length, float* to, int64_t begin, int64_t end) {
    if (bf16) project_weights(static_cast<const uint16_t*>(x), fn, weights, length, to, begin, end);
    else project_weights(static_cast<const float*>(x), fn, weights, length, to, begin, end);
}

// Towards a doubly stochastic matrix: columns and rows are divided by their sums in turn, columns first and last.
inline void sinkhorn(float* x, int64_t n, int64_t iterations, float eps) {
    const auto divide = [&](int64_t line, int64_t along) {  // what lies `line` apart are lines, `along` their numbers
        for (int64_t a = 0; a < n; a++) {
            float total = 0;
            for (int64_t b = 0; b < n; b++) total += x[a * line + b * along];
            for (int64_t b = 0; b < n; b++) x[a * line + b * along] /= total + eps;
        }
    };
    divide(1, n);
    for (int64_t i = 1; i < iterations; i++) {
        divide(n, 1);
        divide(1, n);
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <typename T>
void hyper_read_rows(const HyperTask& task, int64_t begin, int64_t end) {
    const int64_t n = task.streams, width = task.width, weights = task.comb ? (2 + n) * n : n;
    for (int64_t row = begin; row < end; row++) {
        const float* projected = task.projected + row * (weights + 1);
        const float r = 1.0f / sqrtf(projected[weights] / float(n * width) + task.rms_eps);
        const auto weight = [&](int64_t i, int64_t kind) { return projected[i] * r * task.scale[kind] + task.base[i]; };
        float pre[MAX_STREAMS];
        for (int64_t s = 0; s < n; s++) pre[s] = sigmoid(weight(s, 0)) + task.eps;
        if (task.comb) {
            float *post = task.post + row * n, *comb = task.comb + row * n * n;
            for (int64_t s = 0; s < n; s++) post[s] = 2.0f * sigmoid(weight(n + s, 1));
            for (int64_t s = 0; s < n; s++) {
                float largest = -INFINITY, total = 0, *line = comb + s * n;
                for (int64_t i = 0; i < n; i++) largest = std::max(largest, line[i] = weight((2 + s) * n + i, 2));
                for (int64_t i = 0; i < n; i++) total += line[i] = exponential(line[i] - largest);
                for (int64_t i = 0; i < n; i++) line[i] = line[i] / total + task.eps;
            }
            sinkhorn(comb, n, task.iterations, task.eps);
        }
        const T* x = static_cast<const T*>(task.x) + row * n * width;
        T* out = static_cast<T*>(task.out) + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) {
            float total = 0;
            for (int64_t s = 0; s < n; s++) total += pre[s] * number(x[s * width + i]);
            const float v = rounded<T>(total);
            out[i] = stored<T>(v);
            squares += v * v;
        }
        const float inverse = 1.0f / sqrtf(squares / float(width) + task.norm_eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] = stored<T>(number(out[i]) * inverse * task.weight[i]);
    }
}

template <typename T>
void hyper_write_rows(const HyperWriteTask& task, int64_t begin, int64_t end) {
    const int64_t n = task.streams, width = task.width;
    for (int64_t row = begin; row < end; row++) {
        const T *x = static_cast<const T*>(task.x) + row * n * width, *y = static_cast<const T*>(task.y) + row * width;
        const float *post = task.post + row * n, *comb = task.comb + row * n * n;
        T* out = static_cast<T*>(task.out) + row * n * width;
        for (int64_t to = 0; to < n; to++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float total = 0;
                for (int64_t from = 0; from < n; from++) total += comb[from * n + to] * number(x[from * width + i]);
                out[to * width + i] = stored<T>(total + post[to] * number(y[i]));
            }
    }
}

inline void altup_predict(const AltUpTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? predict_rows<uint16_t>(task, begin, end) : predict_rows<float>(task, begin, end);
}
inline void altup_correct(const AltUpTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? correct_rows<uint16_t>(task, begin, end) : correct_rows<float>(task, begin, end);
}
inline void stream_sum(const StreamSumTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? stream_sum_rows<uint16_t>(task, begin, end) : stream_sum_rows<float>(task, begin, end);
}
inline void magnitude(const MagnitudeTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? magnitude_rows<uint16_t>(task, begin, end) : magnitude_rows<float>(task, begin, end);
}
inline void hyper_read(const HyperTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? hyper_read_rows<uint16_t>(task, begin, end) : hyper_read_rows<float>(task, begin, end);
}
inline void hyper_write(const HyperWriteTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? hyper_write_rows<uint16_t>(task, begin, end) : hyper_write_rows<float>(task, begin, end);
}

constexpr StreamOps stream_ops = {altup_predict, altup_correct, stream_sum, magnitude, project, hyper_read, hyper_write};
