// Pools, products with matrices that lie input by input, and what stands between them, rounded where torch rounds. Included by small_ops.h.
#pragma once

inline void pool(const PoolTask& task) {
    constexpr int64_t CHUNK = 64;
    for (int64_t first = 0; first < task.width; first += CHUNK) {
        const int64_t count = std::min(CHUNK, task.width - first);
        float largest[CHUNK], total[CHUNK] = {}, sum[CHUNK] = {};
        for (int64_t i = 0; i < count; i++) largest[i] = -INFINITY;
        for (int64_t j = 0; j < task.slots; j++) {
            const float* gate = task.gates[j] + first;
            for (int64_t i = 0; i < count; i++) largest[i] = at_least(gate[i], largest[i]);
        }
        for (int64_t j = 0; j < task.slots; j++) {
            const float *gate = task.gates[j] + first, *value = task.values[j] + first;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                const float weight = exponential(gate[i] - largest[i]);
                total[i] += weight;
                sum[i] += weight * value[i];
            }
        }
        for (int64_t i = 0; i < count; i++) task.out[first + i] = sum[i] / total[i];
    }
}

template <typename T>
void spread_groups(const SpreadTask& task, int64_t begin, int64_t end) {
    constexpr int64_t CHUNK = 128;
    for (int64_t group = begin; group < end; group++)
        for (int64_t first = 0; first < task.outputs; first += CHUNK) {
            const int64_t count = std::min(CHUNK, task.outputs - first);
            const T* weights = static_cast<const T*>(task.weights) + group * task.weights_group + first;
            for (int64_t row = 0; row < task.rows; row++) {
                const T* x = static_cast<const T*>(task.x) + row * task.x_row + group * task.x_group;
                T* out = static_cast<T*>(task.out) + row * task.out_row + group * task.out_group + first;
                float sum[CHUNK] = {};
                if (count == CHUNK) {
                    for (int64_t i = 0; i < task.inputs; i++) {
                        const float v = number(x[i]);
                        const T* w = weights + i * task.outputs;
#pragma omp simd
                        for (int64_t o = 0; o < CHUNK; o++) sum[o] += v * number(w[o]);
                    }
                } else {
                    for (int64_t i = 0; i < task.inputs; i++)
                        for (int64_t o = 0; o < count; o++) sum[o] += number(x[i]) * number(weights[i * task.outputs + o]);
                }
                const T* bias = task.bias ? static_cast<const T*>(task.bias) + group * task.outputs + first : nullptr;
                for (int64_t o = 0; o < count; o++) out[o] = stored<T>(sum[o] + (bias ? number(bias[o]) : 0.0f));
            }
        }
}

inline void spread(const SpreadTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? spread_groups<uint16_t>(task, begin, end) : spread_groups<float>(task, begin, end);
}

template <typename T>
void channels_rows(const ChannelsTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    const T* weight = static_cast<const T*>(task.weight);
    for (int64_t row = begin; row < end; row++) {
        const T *x = static_cast<const T*>(task.x) + row * width, *y = task.y ? static_cast<const T*>(task.y) + row * width : nullptr;
        T* out = static_cast<T*>(task.out) + row * width;
        for (int64_t i = 0; i < width; i++) {
            float v = number(x[i]);
            if (task.gelu) v = rounded<T>(v * 0.5f * (1.0f + erff(v * 0.70710678f)));
            if (weight) v = rounded<T>(v * number(weight[i]));
            if (task.factor != 1) v = rounded<T>(v * task.factor);
            if (y) v = rounded<T>(v + number(y[i]));
            out[i] = stored<T>(v);
        }
    }
}

inline void channels(const ChannelsTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? channels_rows<uint16_t>(task, begin, end) : channels_rows<float>(task, begin, end);
}

template <typename T>
void layer_norm_rows(const LayerNormTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    const T *weight = static_cast<const T*>(task.weight), *bias = static_cast<const T*>(task.bias);
    for (int64_t row = begin; row < end; row++) {
        const T* x = static_cast<const T*>(task.x) + row * task.stride;
        T* out = static_cast<T*>(task.out) + row * width;
        float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; i++) total += number(x[i]);
        const float mean = total / float(width);
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += (number(x[i]) - mean) * (number(x[i]) - mean);
        const float inverse = 1.0f / sqrtf(squares / float(width) + task.eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] = stored<T>((number(x[i]) - mean) * inverse * number(weight[i]) + number(bias[i]));
    }
}

inline void layer_norm(const LayerNormTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? layer_norm_rows<uint16_t>(task, begin, end) : layer_norm_rows<float>(task, begin, end);
}

template <typename T>
void residual_rows(const ResidualTask& task, int64_t begin, int64_t end) {
    const int64_t width = task.width;
    for (int64_t row = begin; row < end; row++) {
        const T* x = static_cast<const T*>(task.x) + row * width;
        const float* residual = task.residual + row * width;
        float* total = task.total + row * width;
        T* rounded = static_cast<T*>(task.rounded) + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float v = (number(x[i]) + task.bias[i]) * task.scale[i] + (residual[i] + task.residual_bias[i]) * task.residual_scale[i];
            total[i] = v;
            rounded[i] = stored<T>(v);
        }
    }
}

inline void residual(const ResidualTask& task, bool bf16, int64_t begin, int64_t end) {
    bf16 ? residual_rows<uint16_t>(task, begin, end) : residual_rows<float>(task, begin, end);
}

template <typename T>
void depthwise_of(const ConvTask& task) {
    const int64_t channels = task.heads * task.width;
    const T *window = static_cast<const T*>(task.window), *weight = static_cast<const T*>(task.weight), *bias = static_cast<const T*>(task.bias);
    for (int64_t head = 0; head < task.heads; head++)
        for (int64_t place = 0; place < task.grouped_taps; place++) {
            T* out = static_cast<T*>(task.inputs) + (head * task.grouped_taps + place) * task.width;
            const int64_t first = head * task.width;
#pragma omp simd
            for (int64_t i = 0; i < task.width; i++) {
                float sum = 0;
                for (int64_t tap = 0; tap < task.taps; tap++)
                    sum = rounded<T>(sum + rounded<T>(number(window[(place + tap) * channels + first + i]) * number(weight[tap * channels + first + i])));
                out[i] = stored<T>(number(bias[first + i]) + sum);
            }
        }
}

inline void depthwise(const ConvTask& task, bool bf16) { bf16 ? depthwise_of<uint16_t>(task) : depthwise_of<float>(task); }

// mean + mixed at length sqrt(width), times `temperature` where that is one.
template <typename T>
void unit_head(const float* mean, const T* mixed, int64_t width, float temperature, T* out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) {
        const float v = rounded<T>(number(mixed[i]) + mean[i]);
        squares += v * v;
    }
    const float least = sizeof(T) == 2 ? 0.0078125f : 1.1920929e-07f;  // the type's epsilon
    const float factor = rounded<T>(sqrtf(float(width)) / at_least(rounded<T>(sqrtf(squares)), least));
#pragma omp simd
    for (int64_t i = 0; i < width; i++) out[i] = stored<T>(rounded<T>(rounded<T>(number(mixed[i]) + mean[i]) * factor) * temperature);
}

template <typename T>
void unit_of(const UnitTask& task) {
    const int64_t width = task.width, group = task.query_heads / task.kv_heads;
    const T *packed = static_cast<const T*>(task.packed), *mixed = static_cast<const T*>(task.mixed), *temperature = static_cast<const T*>(task.temperature);
    T* out = static_cast<T*>(task.out);
    float mean[WIDEST_UNIT], of_key[WIDEST_UNIT];
    for (int64_t g = 0; g < task.kv_heads; g++) {
        const int64_t key = task.query_heads + g;
        std::fill(of_key, of_key + width, 0.0f);
        for (int64_t head = g * group; head < (g + 1) * group; head++) {
            for (int64_t i = 0; i < width; i++) {
                mean[i] = rounded<T>(rounded<T>(number(packed[head * width + i]) + number(packed[key * width + i])) * 0.5f);
                of_key[i] += mean[i];
            }
            unit_head(mean, mixed + head * width, width, 1.0f, out + head * width);
        }
        for (int64_t i = 0; i < width; i++) of_key[i] = rounded<T>(of_key[i] / float(group));
        unit_head(of_key, mixed + key * width, width, number(temperature[g]), out + key * width);
    }
}

inline void unit(const UnitTask& task, bool bf16) { bf16 ? unit_of<uint16_t>(task) : unit_of<float>(task); }

constexpr RecurrentOps recurrent_ops = {pool, spread, channels, layer_norm, residual, depthwise, unit};
