// Attention to a few rows of the cache with a running softmax (Milakov and Gimelshein 2018), in plain C++ that compilers vectorise.
// Included once by each isa_*.cpp inside that set's namespace.
#pragma once

inline float as_float(float v) { return v; }
inline float as_float(uint16_t v) { return bf16_to_float(v); }

template <typename Number>  // float, or uint16_t for bfloat16
void attend_rows(const AttendRows& rows, const AttendState& state) {
    for (int head = 0; head < state.kv_heads * state.group; head++) {
        const int kv_head = head / state.group;
        const Number* q = static_cast<const Number*>(state.q) + int64_t(head) * state.key_width;
        float p[ATTEND_ROWS], largest = -INFINITY;
        for (int t = 0; t < rows.count; t++) {
            const Number* k = reinterpret_cast<const Number*>(rows.k[t]) + int64_t(kv_head) * state.key_width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < state.key_width; i++) sum += as_float(q[i]) * as_float(k[i]);
            sum *= state.scale;
            p[t] = state.softcap > 0 ? state.softcap * tanhf(sum / state.softcap) : sum;
            largest = p[t] > largest ? p[t] : largest;
        }
        float* out = state.out + int64_t(head) * state.value_width;
        if (largest > state.maximum[head]) {
            const float shrink = expf(state.maximum[head] - largest);
            state.maximum[head] = largest;
            state.weight[head] *= shrink;
            for (int i = 0; i < state.value_width; i++) out[i] *= shrink;
        }
        for (int t = 0; t < rows.count; t++) {
            const Number* v = reinterpret_cast<const Number*>(rows.v[t]) + int64_t(kv_head) * state.value_width;
            const float weight = expf(p[t] - state.maximum[head]);
            state.weight[head] += weight;
#pragma omp simd
            for (int i = 0; i < state.value_width; i++) out[i] += weight * as_float(v[i]);
        }
    }
}
