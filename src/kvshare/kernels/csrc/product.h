// Products of rounded activations with blocks, and blocks as bfloat16, in plain C++ that compilers vectorise.
// Included once by each isa_*.cpp inside that set's namespace.
#pragma once

inline void round_row(const void* x, bool bf16, int64_t begin, int64_t end, int64_t k, const Activations& to) {
    for (int64_t start = begin; start < end; start += 32) {
        float v[32];
        float largest = 0;
        for (int i = 0; i < 32; i++) {
            const int64_t at = start + i;
            v[i] = at >= k ? 0.0f : bf16 ? bf16_to_float(static_cast<const uint16_t*>(x)[at]) : static_cast<const float*>(x)[at];
        }
        for (int i = 0; i < 32; i++) largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        for (int i = 0; i < 32; i++) to.q[start + i] = int8_t(rintf(v[i] * inverse));
        int32_t sums[2] = {};
        for (int i = 0; i < 16; i++) sums[0] += to.q[start + i];
        for (int i = 16; i < 32; i++) sums[1] += to.q[start + i];
        const float scale = largest / 127.0f;
        to.scale[start / 32] = scale;
        to.sum[start / 32] = scale * float(sums[0] + sums[1]);
        for (int h = 0; h < 2; h++) to.sum16[start / 16 + h] = scale * float(sums[h]);
        memcpy(to.exact + start, v, sizeof v);
    }
}

// Sums of w * x over the first and the second 16.
inline void dot_halves(const int8_t* w, const int8_t* x, int32_t& first, int32_t& second) {
#if defined(__AVX2__)
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(a, a), _mm256_sign_epi8(b, a));  // at most 2 * 128 * 127: no saturation
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const __m128i sums = _mm_hadd_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    const __m128i two = _mm_hadd_epi32(sums, sums);
    first = _mm_cvtsi128_si32(two);
    second = _mm_extract_epi32(two, 1);
#else
    first = second = 0;
    for (int i = 0; i < 16; i++) first += int32_t(w[i]) * x[i];
    for (int i = 16; i < 32; i++) second += int32_t(w[i]) * x[i];
#endif
}

template <BlockType T>
void multiply_blocks(const uint8_t* weights, int64_t count, int64_t k, const Activations* x, int rows, float* y, int64_t stride) {
    constexpr BlockShape shape = shape_of(T);
    const int64_t row_bytes = k / shape.weights * shape.bytes;
    for (int64_t n = 0; n < count; n++) {
        float sums[MAX_ROWS] = {};
        for (int64_t g = 0; g < k / 32; g++) {
            Group w;
            read_group<T>(weights + n * row_bytes, g, w);
            for (int r = 0; r < rows; r++) {
                int32_t first, second;
                dot_halves(w.q, x[r].q + 32 * g, first, second);
                sums[r] += x[r].scale[g] * (w.scale[0] * float(first) + w.scale[1] * float(second)) + w.minimum * x[r].sum[g];
            }
        }
        for (int r = 0; r < rows; r++) y[r * stride + n] = sums[r];
    }
}

inline void multiply_bf16(const uint8_t* weights, int64_t count, int64_t k, const Activations* x, int rows, float* y, int64_t stride) {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(weights);
    for (int64_t n = 0; n < count; n++, w += k)
        for (int r = 0; r < rows; r++) {
            const float* exact = x[r].exact;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < k; i++) sum += bf16_to_float(w[i]) * exact[i];
            y[r * stride + n] = sum;
        }
}

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) { *to = float_to_bf16(value); }

template <BlockType T, typename Number>
void decode_blocks(const uint8_t* weights, int64_t count, int64_t k, Number* to) {
    constexpr BlockShape shape = shape_of(T);
    const int64_t row_bytes = k / shape.weights * shape.bytes;
    for (int64_t n = 0; n < count; n++)
        for (int64_t g = 0; g < k / 32; g++, to += 32) {
            Group w;
            read_group<T>(weights + n * row_bytes, g, w);
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < 16; i++) put(float(w.q[16 * h + i]) * w.scale[h] + w.minimum, to + 16 * h + i);
        }
}

template <typename Number>
void decode_numbers(BlockType type, const uint8_t* weights, int64_t count, int64_t k, Number* to) {
    switch (type) {
        case BlockType::BF16:
            for (int64_t i = 0; i < count * k; i++) put(bf16_to_float(reinterpret_cast<const uint16_t*>(weights)[i]), to + i);
            break;
        case BlockType::Q4_0: decode_blocks<BlockType::Q4_0>(weights, count, k, to); break;
        case BlockType::Q4_1: decode_blocks<BlockType::Q4_1>(weights, count, k, to); break;
        case BlockType::Q5_0: decode_blocks<BlockType::Q5_0>(weights, count, k, to); break;
        case BlockType::Q5_1: decode_blocks<BlockType::Q5_1>(weights, count, k, to); break;
        case BlockType::Q8_0: decode_blocks<BlockType::Q8_0>(weights, count, k, to); break;
        case BlockType::Q4_K: decode_blocks<BlockType::Q4_K>(weights, count, k, to); break;
        case BlockType::Q5_K: decode_blocks<BlockType::Q5_K>(weights, count, k, to); break;
        case BlockType::Q6_K: decode_blocks<BlockType::Q6_K>(weights, count, k, to); break;
    }
}

inline void decode_rows(BlockType type, const uint8_t* weights, int64_t count, int64_t k, void* to, bool bf16) {
    if (bf16) decode_numbers(type, weights, count, k, static_cast<uint16_t*>(to));
    else decode_numbers(type, weights, count, k, static_cast<float*>(to));
}

inline void multiply_rows(BlockType type, const uint8_t* weights, int64_t count, int64_t k, const Activations* x, int rows, float* y, int64_t stride) {
    switch (type) {
        case BlockType::BF16: multiply_bf16(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q4_0: multiply_blocks<BlockType::Q4_0>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q4_1: multiply_blocks<BlockType::Q4_1>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q5_0: multiply_blocks<BlockType::Q5_0>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q5_1: multiply_blocks<BlockType::Q5_1>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q8_0: multiply_blocks<BlockType::Q8_0>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q4_K: multiply_blocks<BlockType::Q4_K>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q5_K: multiply_blocks<BlockType::Q5_K>(weights, count, k, x, rows, y, stride); break;
        case BlockType::Q6_K: multiply_blocks<BlockType::Q6_K>(weights, count, k, x, rows, y, stride); break;
    }
}
