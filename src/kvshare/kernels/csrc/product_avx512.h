// Products with blocks for AVX512 with VNNI. A row of activations is one or two signed bytes a number: sixteen rows of weights meet one broadcast word
// of it in each instruction; of two bytes first the upper ones, then, with the sum shifted by 8, the lower ones. The sums of a group are exact.
#pragma once

// Sixteen numbers from `at` on.
[[gnu::always_inline]] inline __m512 sixteen(const void* x, bool bf16, int64_t at) {
    if (!bf16) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Up to sixteen groups from `start` on: what is computed once a group is computed for all of them at once.
template <bool Bf16, int Width>
void round_groups(const void* x, int64_t start, int count, const Activations& to) {
    __m512 peaks[LANES];
    for (int g = 0; g < LANES; g++) {
        const int64_t at = start + 32 * (g < count ? g : 0);
        peaks[g] = _mm512_max_ps(_mm512_abs_ps(sixteen(x, Bf16, at)), _mm512_abs_ps(sixteen(x, Bf16, at + 16)));
    }
    const __m512 largest = largest_of(peaks), most = _mm512_set1_ps(to.largest()), scale = _mm512_div_ps(largest, most);
    alignas(64) float inverse[LANES], scales[LANES], sums[LANES];
    alignas(64) int32_t sums32[LANES], sums16[2][LANES];
    _mm512_store_ps(inverse, _mm512_maskz_div_ps(_mm512_cmp_ps_mask(largest, _mm512_set1_ps(SMALLEST), _CMP_GT_OQ), most, largest));
    __m512 rounded[2][LANES];
    for (int g = 0; g < LANES; g++) {
        const int64_t at = start + 32 * (g < count ? g : 0);
        int8_t* upper = to.from(0, at / 32).q;
        int8_t* lower = upper + 32 * (Width - 1);
        for (int h = 0; h < 2; h++) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(x, Bf16, at + 16 * h), _mm512_set1_ps(inverse[g < count ? g : 0])));
            if (Width == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(upper + 16 * h), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(lower + 16 * h), _mm512_cvtepi32_epi8(q));
            rounded[h][g] = _mm512_castsi512_ps(q);
        }
    }
    __m512i halves[2];
    for (int h = 0; h < 2; h++) {
        halves[h] = _mm512_castps_si512(folded(rounded[h], [](__m512 a, __m512 b) __attribute__((always_inline)) {
            return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
        }));
        _mm512_store_si512(sums16[h], halves[h]);
    }
    const __m512i sum = _mm512_add_epi32(halves[0], halves[1]);
    _mm512_store_si512(sums32, sum);
    _mm512_store_ps(scales, scale);
    _mm512_store_ps(sums, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
    for (int g = 0; g < count; g++) {
        const Activations group = to.from(0, start / 32 + g);
        *group.scale = scales[g];
        *group.sum = sums[g];
        *group.sum32 = sums32[g];
        for (int h = 0; h < 2; h++) group.sum16[h] = sums16[h][g];
    }
}

inline void round_avx512(const void* x, bool bf16, int64_t begin, int64_t end, const Activations& to) {
    const auto round = to.bytes == 2 ? bf16 ? round_groups<true, 2> : round_groups<false, 2> : bf16 ? round_groups<true, 1> : round_groups<false, 1>;
    for (int64_t start = begin; start < end; start += 32 * LANES) round(x, start, int(std::min<int64_t>(LANES, (end - start) / 32)), to);
}

// Asks for what is multiplied next, in the order in which it lies in memory and evenly over the work that goes on meanwhile.
class LinesAhead {
  public:
    LinesAhead(const uint8_t* from, int64_t bytes) : at_(from), near_(bytes <= FIRST_LEVEL) {}
    // For work that goes from `begin` to `end`, always `distance` before it, and then on to `next`.
    LinesAhead(const uint8_t* begin, const uint8_t* end, const uint8_t* next, int64_t distance) : at_(begin), left_(end - begin), next_(next), near_(distance <= FIRST_LEVEL) {
        pass(distance);
    }
    template <int Bytes>
    void ask() {
        if (near_)
            for (int i = 0; i < Bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at_ + i), _MM_HINT_T0);
        else
            for (int i = 0; i < Bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(at_ + i), _MM_HINT_T1);
        pass(Bytes);
    }
    // The Part-th of Parts equal parts of so many bytes, near enough for the first level; behind the last one, `pass` them.
    template <int Bytes, int Part, int Parts>
    [[gnu::always_inline]] void ask_part() const {
        constexpr int lines = (Bytes + 63) / 64;
        each<lines>([&](auto i) __attribute__((always_inline)) {
            if constexpr (i * Parts / lines == Part) _mm_prefetch(reinterpret_cast<const char*>(at_ + 64 * i), _MM_HINT_T0);
        });
    }
    void pass(int64_t bytes) {
        at_ += bytes;
        if ((left_ -= bytes) <= 0) at_ = next_ - left_, left_ = INT64_MAX;
    }

  private:
    static constexpr int64_t FIRST_LEVEL = 16 << 10;  // more would drive out of the first-level cache what is multiplied now
    const uint8_t* at_;
    int64_t left_ = INT64_MAX;
    const uint8_t* next_ = nullptr;
    bool near_;
};

constexpr int64_t STREAM_AHEAD = 8 << 10;  // bytes that interleaved weights are asked for before they are multiplied: 4 and 16 KB are slower

// Sixteen rows of weights by Rows of activations of Width bytes a number: totals[r], a row of weights a lane.
template <BlockType T, int Width, int Rows, typename Strip>
inline __attribute__((always_inline)) void multiply_strip(Strip strip, int64_t blocks, Activations x, LinesAhead& lines, __m512* totals) {
    using Format = Reader<T>;
    constexpr int halves = Format::halves, words = 8 / halves, bytes = LANES * shape_of(T).bytes / Format::groups;  // bytes: of a group
    // Beside the sums of more rows, the weights of several groups would not fit the registers: they are unpacked anew for each, and of that what
    // concerns the others falls away. Those of the file are transposed, which costs more. (Of four groups, gcc 12 keeps too much of the others beside the
    // sums of five rows of bytes.)
    constexpr int first = Width == 2 ? 3 : 8 / Format::unit + 1, last = Width == 1 && Format::unit == 4 ? 4 : int(MAX_ROWS);
    constexpr bool anew = Rows >= first && Rows <= last && std::is_same_v<Strip, InterleavedStrip<T>>;
    constexpr bool evenly = std::is_same_v<Strip, InterleavedStrip<T>>;  // asked for line by line: many at once would fill the queues, and some be dropped
    each<Rows>([&](auto r) __attribute__((always_inline)) { totals[r] = _mm512_setzero_ps(); });
    x.bytes = Width;
    Format reader;
    for (int64_t block = 0; block < blocks; block++) {
        strip.open(block);
        reader.open(strip);
        for (int unit = 0; unit < Format::groups / Format::unit; unit++) {
            if constexpr (!evenly) lines.ask<bytes * Format::unit>();
            Unpacked<Format::unit, halves> unpacked;
            const auto multiply = [&](auto g) __attribute__((always_inline)) {
                asm("" : "+r"(x.q), "+r"(x.scale), "+r"(x.sum), "+r"(x.sum32), "+r"(x.sum16));  // one address each: gcc 12 would keep and count up one for each word
                each<halves>([&](auto h) __attribute__((always_inline)) {
                    const int8_t* q = x.q + 4 * words * h;
                    __m512i sums[Rows][Width];
                    each<Rows>([&](auto r) __attribute__((always_inline)) {
                        each<Width>([&](auto b) __attribute__((always_inline)) { sums[r][b] = _mm512_setzero_si512(); });
                    });
                    each<words>([&](auto i) __attribute__((always_inline)) {
                        if constexpr (evenly) lines.template ask_part<bytes, words * h + i, 8>();
                        const Bytes w = unpacked.w[8 * g + words * h + i];
                        each<Rows>([&](auto r) __attribute__((always_inline)) {
                            each<Width>([&](auto b) __attribute__((always_inline)) { add_products(sums[r][b], w, q + 32 * (Width * r + b) + 4 * i); });
                        });
                    });
                    each<Rows>([&](auto r) __attribute__((always_inline)) {
                        __m512i sum = sums[r][Width - 1];
                        if constexpr (Width == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(sums[r][0], 8), sum);
                        if constexpr (Format::offset > 0)
                            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(Format::offset * (halves == 2 ? x.sum16[2 * r + h] : x.sum32[r])));
                        const __m512 scale = _mm512_mul_ps(unpacked.scale[halves * g + h], _mm512_set1_ps(x.scale[r]));
                        totals[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), totals[r]);
                        if constexpr (Format::has_minimum && h == 0) totals[r] = _mm512_fmadd_ps(unpacked.minimum[g], _mm512_set1_ps(x.sum[r]), totals[r]);
                    });
                });
                if constexpr (evenly) lines.pass(bytes);
                x = x.from(0, 1);
            };
            if constexpr (anew)
                each<Format::unit>([&](auto g) __attribute__((always_inline)) {
                    asm volatile("" ::: "memory");
                    reader.unpack(strip, unit, unpacked);
                    multiply(g);
                });
            else {
                reader.unpack(strip, unit, unpacked);
                for (int g = 0; g < Format::unit; g++) multiply(g);
            }
        }
    }
}

template <BlockType T, int Width, int Rows>
void multiply_strips(const WeightRows& weights, int64_t k, const Activations& x, float* y, int64_t stride, const uint8_t* ahead) {
    const int64_t blocks = k / shape_of(T).weights, strip_bytes = LANES * blocks * shape_of(T).bytes, end = weights.skip + weights.count;
    LinesAhead lines(weights.data, weights.data + end * (strip_bytes / LANES), ahead, weights.interleaved ? STREAM_AHEAD : strip_bytes);
    for (int64_t n = 0; n < end; n += LANES) {
        const uint8_t* at = weights.data + n / LANES * strip_bytes;
        __m512 totals[Rows];
        if (weights.interleaved) multiply_strip<T, Width, Rows>(InterleavedStrip<T>(at, blocks), blocks, x, lines, totals);
        else multiply_strip<T, Width, Rows>(FileStrip<T>(at, blocks, end - n), blocks, x, lines, totals);
        const int64_t first = n < weights.skip ? weights.skip - n : 0, last = end - n < LANES ? end - n : LANES;
        const __mmask16 wanted = __mmask16((1u << last) - (1u << first));
        for (int r = 0; r < Rows; r++) _mm512_mask_storeu_ps(y + r * stride + n - weights.skip, wanted, totals[r]);
    }
}

template <BlockType T, int Width>
void multiply_format(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    switch (rows) {
        case 1: multiply_strips<T, Width, 1>(weights, k, x, y, stride, ahead); break;
        case 2: multiply_strips<T, Width, 2>(weights, k, x, y, stride, ahead); break;
        case 3: multiply_strips<T, Width, 3>(weights, k, x, y, stride, ahead); break;
        case 4: multiply_strips<T, Width, 4>(weights, k, x, y, stride, ahead); break;
        case 5: multiply_strips<T, Width, 5>(weights, k, x, y, stride, ahead); break;
        case 6: multiply_strips<T, Width, 6>(weights, k, x, y, stride, ahead); break;
        case 7: multiply_strips<T, Width, 7>(weights, k, x, y, stride, ahead); break;
        default: multiply_strips<T, Width, 8>(weights, k, x, y, stride, ahead); break;
    }
}

// With activations of Width bytes a number, a file each: they compile side by side.
template <int Width>
inline void multiply_avx512(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    with_format(weights.type, [&]<BlockType T>() { multiply_format<T, Width>(weights, k, x, rows, y, stride, ahead); });
}
