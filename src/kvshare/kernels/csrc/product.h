// Products of rounded activations with blocks, and blocks as bfloat16, in plain C++ that compilers vectorise.
// Included once by each file of a set inside that set's namespace.
#pragma once

inline void round_row(const void* x, bool bf16, int64_t begin, int64_t end, const Activations& to) {
    for (int64_t start = begin; start < end; start += 32) {
        float v[32];
        float largest = 0;
        for (int i = 0; i < 32; i++) v[i] = bf16 ? bf16_to_float(static_cast<const uint16_t*>(x)[start + i]) : static_cast<const float*>(x)[start + i];
        for (int i = 0; i < 32; i++) largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
        const float inverse = largest > SMALLEST ? to.largest() / largest : 0.0f, scale = largest / to.largest();
        const Activations group = to.from(0, start / 32);
        int32_t sums[2] = {};
        int16_t q[32];
        for (int i = 0; i < 32; i++) q[i] = int16_t(rintf(v[i] * inverse));
        for (int i = 0; i < 32; i++) sums[i / 16] += q[i];
        if (to.bytes == 2) memcpy(group.q, q, sizeof q);
        else
            for (int i = 0; i < 32; i++) group.q[i] = int8_t(q[i]);
        *group.scale = scale;
        *group.sum32 = sums[0] + sums[1];
        *group.sum = scale * float(sums[0] + sums[1]);
        for (int h = 0; h < 2; h++) group.sum16[h] = sums[h];
    }
}

// The sum of scale[0] * (w . x) over the first 16 of each group and scale[1] * (w . x) over the others.
#if defined(__AVX2__)
class GroupSums {
  public:
    template <typename Number>
    void add(const int8_t* w, const Number* x, float first, float second) {
        sums_ = _mm256_fmadd_ps(_mm256_set1_ps(first), sixteen(w, x), sums_);
        sums_ = _mm256_fmadd_ps(_mm256_set1_ps(second), sixteen(w + 16, x + 16), sums_);
    }
    float total() const {
        __m128 v = _mm_add_ps(_mm256_castps256_ps128(sums_), _mm256_extractf128_ps(sums_, 1));
        v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
    }

  private:
    static __m256i wide(const int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
    static __m256i wide(const int8_t* x) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
    template <typename Number>
    static __m256 sixteen(const int8_t* w, const Number* x) {
        return _mm256_cvtepi32_ps(_mm256_madd_epi16(wide(w), wide(x)));
    }
    __m256 sums_ = _mm256_setzero_ps();
};
#else
class GroupSums {
  public:
    template <typename Number>
    void add(const int8_t* w, const Number* x, float first, float second) {
        int32_t sums[2] = {};
        for (int h = 0; h < 2; h++)
            for (int i = 16 * h; i < 16 * h + 16; i++) sums[h] += int32_t(w[i]) * x[i];
        sum_ += first * float(sums[0]) + second * float(sums[1]);
    }
    float total() const { return sum_; }

  private:
    float sum_ = 0;
};
#endif

template <BlockType T, typename Number>
void multiply_blocks(const uint8_t* weights, int64_t count, int64_t k, const Activations& x, int rows, float* y, int64_t stride) {
    constexpr BlockShape shape = shape_of(T);
    const int64_t row_bytes = k / shape.weights * shape.bytes;
    for (int64_t n = 0; n < count; n++) {
        GroupSums sums[MAX_ROWS];
        float minima[MAX_ROWS] = {};
        for (int64_t g = 0; g < k / 32; g++) {
            Group w;
            read_group<T>(weights + n * row_bytes, g, w);
            for (int r = 0; r < rows; r++) {
                const Activations group = x.from(r, g);
                sums[r].add(w.q, reinterpret_cast<const Number*>(group.q), *group.scale * w.scale[0], *group.scale * w.scale[1]);
                minima[r] += w.minimum * *group.sum;
            }
        }
        for (int r = 0; r < rows; r++) y[r * stride + n] = sums[r].total() + minima[r];
    }
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return bf16_to_float(x); }

template <typename Number>
void multiply_wide(const uint8_t* weights, int64_t count, int64_t k, const Number* x, int rows, float* y, int64_t stride) {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(weights);
    for (int64_t n = 0; n < count; n++, w += k)
        for (int r = 0; r < rows; r++) {
            const Number* row = x + r * k;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < k; i++) sum += bf16_to_float(w[i]) * to_float(row[i]);
            y[r * stride + n] = sum;
        }
}

inline const void* as_they_are(const void* x, bool, int64_t, int64_t k, int64_t, int64_t* padded) {
    *padded = k;
    return x;
}

inline void multiply_bf16(const uint8_t* weights, int64_t count, int64_t k, const void* x, bool bf16, int rows, float* y, int64_t stride, const uint8_t*) {
    if (bf16) multiply_wide(weights, count, k, static_cast<const uint16_t*>(x), rows, y, stride);
    else multiply_wide(weights, count, k, static_cast<const float*>(x), rows, y, stride);
}

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
void decode_numbers(const WeightRows& weights, int64_t k, Number* to) {
    if (weights.type == BlockType::BF16)
        for (int64_t i = 0; i < weights.count * k; i++) put(bf16_to_float(reinterpret_cast<const uint16_t*>(weights.data)[i]), to + i);
    with_format(weights.type, [&]<BlockType T>() {
        in_file_order<T>(weights, k, [&](const uint8_t* rows, int64_t first, int64_t count) { decode_blocks<T>(rows, count, k, to + first * k); });
    });
}

inline void decode_rows(const WeightRows& weights, int64_t k, void* to, bool bf16) {
    if (bf16) decode_numbers(weights, k, static_cast<uint16_t*>(to));
    else decode_numbers(weights, k, static_cast<float*>(to));
}

inline void multiply_rows(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t*) {
    with_format(weights.type, [&]<BlockType T>() {
        in_file_order<T>(weights, k, [&](const uint8_t* from, int64_t first, int64_t count) {
            if (x.bytes == 2) multiply_blocks<T, int16_t>(from, count, k, x, rows, y + first, stride);
            else multiply_blocks<T, int8_t>(from, count, k, x, rows, y + first, stride);
        });
    });
}
