// Logits as integer weights: these add up to the same in any order, by any number of threads and in torch. Included by small_ops.h.
#pragma once

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")  // torch rounds products before it adds to them
#pragma GCC optimize("no-trapping-math")  // loops with comparisons are vectorised

constexpr double WHOLE = 6755399441055744.0;  // 1.5 * 2^52 has no room for a fraction: the bits of x + WHOLE are those of WHOLE, plus x

inline int64_t weight_bits(float x, Weighing by) {
    const float v = x == x ? x : INFINITY;
    const float below = v - by.most;
    float t = (v == by.most ? 0.0f : below) * by.inverse;  // two infinities are equal
    t = t > -64.0f ? t : -64.0f;  // where the weight is zero
    const float shifted = t + 12582912.0f, r = t - (shifted - 12582912.0f);  // 1.5 * 2^23
    float p = 0.001326472731307149f;  // 2^r for |r| <= 1 / 2, to 2e-7
    p = p * r + 0.009671512991189957f;
    p = p * r + 0.05550733581185341f;
    p = p * r + 0.24022242426872253f;
    p = p * r + 0.6931470036506653f;
    p = p * r + 1.0f;
    const int32_t power = (__builtin_bit_cast(int32_t, shifted) - 0x4b400000 + 127 + WEIGHT_BITS) << 23;
    return __builtin_bit_cast(int64_t, double(p * __builtin_bit_cast(float, power)) + WHOLE);
}

inline void weigh(const float* x, int64_t count, Weighing by, int64_t* to) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = weight_bits(x[i], by) - __builtin_bit_cast(int64_t, WHOLE);
}

inline int64_t weight_of(const float* x, int64_t count, Weighing by) {
    uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += uint64_t(weight_bits(x[i], by));
    return int64_t(sum - uint64_t(count) * __builtin_bit_cast(uint64_t, WHOLE));
}

#pragma GCC pop_options

inline int64_t num_above(const float* x, int64_t count, float border) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < count; begin += 1 << 20) {  // counted in 32 bits
        int32_t part = 0;
        const int64_t end = count < begin + (1 << 20) ? count : begin + (1 << 20);
#pragma omp simd reduction(+ : part)
        for (int64_t i = begin; i < end; i++) part += ordered(x[i]) > border;
        sum += part;
    }
    return sum;
}

constexpr SamplingOps sampling_ops = {weigh, weight_of, num_above};
