// Products with blocks for AVX512 with VNNI and VBMI: 64 weights at a time, read from the file's own bytes by one or two loads and a permutation.
// Weights become unsigned bytes in their natural order. What an offset or a minimum adds is the same for all weights of a block, so it is
// left to the end of a row: a dot product of the blocks' 16-bit floats with the activations' sums. Nothing is read behind a row: the last load is masked.
#pragma once

using Bytes = __m512i;

inline __m512i shifts(short low, short high) {  // 16-bit shift counts by 256-bit half
    return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}

// Two blocks of 32: lanes of d hold the scale of the block that the lane's four weights belong to.
struct Pair {
    Bytes q;
    __m512 d;
};

// Byte permutation that spreads the 16 bytes at `quants` of each of two blocks over 32 lanes each.
inline __m512i spread(int quants, int block_bytes) {
    alignas(64) uint8_t at[64];
    for (int i = 0; i < 64; i++) at[i] = uint8_t(quants + (i & 15) + (i >> 5) * block_bytes);
    return _mm512_load_si512(at);
}

// Word permutation that puts the 16-bit number at `byte` of each of two blocks in 8 lanes each.
inline __m256i words(int byte, int block_bytes) {
    alignas(32) uint16_t at[16];
    for (int i = 0; i < 16; i++) at[i] = uint16_t((byte + (i >> 3) * block_bytes) / 2);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

template <BlockType T>
struct PairReader;

// Formats whose two blocks fit one register: Q4_0, Q4_1, Q5_0, Q5_1.
template <BlockType T>
struct NibblePairs {
    static constexpr int bytes = int(shape_of(T).bytes);
    static constexpr bool has_fifth = T == BlockType::Q5_0 || T == BlockType::Q5_1;
    static constexpr bool has_minimum = T == BlockType::Q4_1 || T == BlockType::Q5_1;
    static constexpr int rest_at = has_minimum ? 2 : 0;  // the 16-bit float that the activations' sums are multiplied by: the minimum, or the scale ...
    static constexpr float rest_factor = has_minimum ? 1.0f : has_fifth ? -16.0f : -8.0f;  // ... and how often
    const __m512i quants = spread(bytes - 16, bytes);
    // halves of each 32: counts by 128-bit lane 0, 4, 0, 4
    const __m512i counts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i d_at = _mm512_castsi256_si512(words(0, bytes));

    Pair read(const uint8_t* p, int blocks) const {
        const __mmask64 mask = (__mmask64(1) << (blocks * bytes)) - 1;
        const __m512i raw = _mm512_maskz_loadu_epi8(mask, p);
        Pair to;
        to.q = _mm512_and_si512(_mm512_srlv_epi16(_mm512_permutexvar_epi8(quants, raw), counts), low);
        if constexpr (has_fifth) {
            constexpr int at = has_minimum ? 4 : 2;
            uint32_t first, second = 0;
            memcpy(&first, p + at, 4);
            if (blocks == 2) memcpy(&second, p + bytes + at, 4);
            const __mmask64 fifth = __mmask64(first) | __mmask64(second) << 32;
            to.q = _mm512_mask_add_epi8(to.q, fifth, to.q, _mm512_set1_epi8(16));
        }
        to.d = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(d_at, raw)));
        return to;
    }
};
template <> struct PairReader<BlockType::Q4_0> : NibblePairs<BlockType::Q4_0> {};
template <> struct PairReader<BlockType::Q4_1> : NibblePairs<BlockType::Q4_1> {};
template <> struct PairReader<BlockType::Q5_0> : NibblePairs<BlockType::Q5_0> {};
template <> struct PairReader<BlockType::Q5_1> : NibblePairs<BlockType::Q5_1> {};

template <>
struct PairReader<BlockType::Q8_0> {
    static constexpr int bytes = 34;
    static constexpr int rest_at = 0;
    static constexpr float rest_factor = -128.0f;
    const __m512i flip = _mm512_set1_epi8(char(0x80));  // signed to unsigned

    Pair read(const uint8_t* p, int blocks) const {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2));
        const __m256i second = blocks == 2 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 36)) : _mm256_setzero_si256();
        uint16_t d0, d1 = 0;
        memcpy(&d0, p, 2);
        if (blocks == 2) memcpy(&d1, p + 34, 2);
        Pair to;
        to.q = _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), flip);
        to.d = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi16(short(d0))), _mm_set1_epi16(short(d1)), 1));
        return to;
    }
};

// Two numbers, each over eight lanes. (An array that holds them so would be read as fast, but crowd long rows out of the first-level cache.)
inline __m512 two_over_lanes(const float* p) {
    double both;
    memcpy(&both, p, 8);
    const __m512i at = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(at, _mm512_castpd_ps(_mm512_set1_pd(both)));
}

inline __m512i dot(Bytes w, const int8_t* x) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_loadu_si512(x)); }

constexpr int64_t AHEAD = 2048;  // bytes that are asked for before they are needed
constexpr int64_t STRETCH = 512;  // blocks of a row between two collections of the rest

// Sums of whole registers, sixteen rows of weights at a time: one after the other they would cost as much as several blocks.
template <int Rows>
class Collected {
  public:
    Collected(float* y, int64_t stride, int64_t count) : y_(y), stride_(stride), count_(count) {
        for (auto& row : kept_)
            for (auto& v : row) v = _mm512_setzero_ps();
    }
    void add(int64_t n, const __m512* sums) {  // n = 0, 1, ... count - 1
        for (int r = 0; r < Rows; r++) kept_[r][n % 16] = sums[r];
        if (n % 16 < 15 && n + 1 < count_) return;
        const __mmask16 present = __mmask16((2u << n % 16) - 1);
        for (int r = 0; r < Rows; r++) _mm512_mask_storeu_ps(y_ + r * stride_ + n / 16 * 16, present, sums_of(kept_[r]));
    }

  private:
    float* y_;
    int64_t stride_, count_;
    __m512 kept_[Rows][16];
};

template <BlockType T, int Rows>
void multiply_pairs(const uint8_t* weights, int64_t count, int64_t k, const Activations* x, float* y, int64_t stride) {
    using Reader = PairReader<T>;
    const Reader reader;
    constexpr int bytes = Reader::bytes;
    alignas(64) uint16_t rest[STRETCH];
    Collected<Rows> collected(y, stride, count);
    const uint8_t* p = weights;
    for (int64_t n = 0; n < count; n++) {
        __m512 sums[Rows], others[Rows], rests[Rows];  // two chains of additions: one would wait for itself
        for (int r = 0; r < Rows; r++) sums[r] = others[r] = rests[r] = _mm512_setzero_ps();
        for (int64_t start = 0, blocks = k / 32; start < blocks; start += STRETCH) {
            const int64_t end = start + STRETCH < blocks ? start + STRETCH : blocks;
            const auto add = [&](const Pair& w, int64_t block, __m512* to) {
                for (int r = 0; r < Rows; r++) {
                    const __m512 products = _mm512_cvtepi32_ps(dot(w.q, x[r].q + 32 * block));
                    to[r] = _mm512_fmadd_ps(_mm512_mul_ps(w.d, two_over_lanes(x[r].scale + block)), products, to[r]);
                }
            };
            const auto add_pair = [&](int64_t block, __m512* to) {
                _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD, _MM_HINT_T0);
                add(reader.read(p, 2), block, to);
                uint16_t first, second;
                memcpy(&first, p + Reader::rest_at, 2);
                memcpy(&second, p + bytes + Reader::rest_at, 2);
                const uint32_t both = first | uint32_t(second) << 16;  // one store; left to itself the compiler spends three shuffles
                memcpy(rest + block - start, &both, 4);
                p += 2 * bytes;
            };
            int64_t block = start;
            for (; block + 4 <= end; block += 4) {
                add_pair(block, sums);
                add_pair(block + 2, others);
            }
            if (block + 2 <= end) {
                add_pair(block, sums);
                block += 2;
            }
            if (block < end) {
                add(reader.read(p, 1), block, sums);
                memcpy(rest + block - start, p + Reader::rest_at, 2);
                p += bytes;
            }
            for (int64_t i = 0; i < end - start; i += 16) {
                const __mmask16 present = __mmask16(end - start - i >= 16 ? 0xffff : (1 << (end - start - i)) - 1);
                const __m512 factors = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present, rest + i));
                for (int r = 0; r < Rows; r++) rests[r] = _mm512_fmadd_ps(factors, _mm512_loadu_ps(x[r].sum + start + i), rests[r]);
            }
        }
        for (int r = 0; r < Rows; r++) sums[r] = _mm512_fmadd_ps(rests[r], _mm512_set1_ps(Reader::rest_factor), _mm512_add_ps(sums[r], others[r]));
        collected.add(n, sums);
    }
}

// Two registers of bfloat16 weights at a time, against the row before rounding.
template <int Rows>
void multiply_wide(const uint8_t* weights, int64_t count, int64_t k, const Activations* x, float* y, int64_t stride) {
    Collected<Rows> collected(y, stride, count);
    const uint8_t* p = weights;
    for (int64_t n = 0; n < count; n++, p += 2 * k) {
        __m512 low[Rows], high[Rows];
        for (int r = 0; r < Rows; r++) low[r] = high[r] = _mm512_setzero_ps();
        for (int64_t i = 0; i < k; i += 32) {
            _mm_prefetch(reinterpret_cast<const char*>(p) + 2 * i + AHEAD, _MM_HINT_T0);
            const __mmask32 present = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
            const __m512i raw = _mm512_maskz_loadu_epi16(present, p + 2 * i);
            const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(raw)), second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(raw, 1));
            const __m512 wide[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(first, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(second, 16))};
            for (int r = 0; r < Rows; r++) {
                low[r] = _mm512_fmadd_ps(wide[0], _mm512_loadu_ps(x[r].exact + i), low[r]);
                high[r] = _mm512_fmadd_ps(wide[1], _mm512_loadu_ps(x[r].exact + i + 16), high[r]);
            }
        }
        for (int r = 0; r < Rows; r++) low[r] = _mm512_add_ps(low[r], high[r]);
        collected.add(n, low);
    }
}

// Blocks of 256 (k-quants): four registers of 64 weights; scales of 32 (Q4_K, Q5_K, with minima) or of 16 (Q6_K).
template <BlockType T>
struct KBlock {
    static constexpr bool is_six = T == BlockType::Q6_K;
    const uint8_t* p;
    __m512 scales;   // 16 of them, or 8 in the lower half
    __m256 minima;   // 8 (Q4_K, Q5_K), negative

    explicit KBlock(const uint8_t* from) : p(from) {
        if constexpr (is_six) {
            const __m512i bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 192)));
            scales = _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(half_to_float(p + 208)));
        } else {
            uint32_t a, b, c;  // twelve bytes: scales 0-3, minima 0-3, and the lower halves of 4-7 whose upper bits are spread over the first eight
            memcpy(&a, p + 4, 4);
            memcpy(&b, p + 8, 4);
            memcpy(&c, p + 12, 4);
            const uint64_t six = uint64_t(a & 0x3f3f3f3f) | uint64_t((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
            const uint64_t low = uint64_t(b & 0x3f3f3f3f) | uint64_t((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
            const auto wide = [](uint64_t v) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(v)))); };
            scales = _mm512_castps256_ps512(_mm256_mul_ps(wide(six), _mm256_set1_ps(half_to_float(p))));
            minima = _mm256_mul_ps(wide(low), _mm256_set1_ps(-half_to_float(p + 2)));
        }
    }

    template <int J>
    Bytes quants() const {  // weights 64 * J ... 64 * J + 63
        const __m512i low = _mm512_set1_epi8(15);
        if constexpr (is_six) {
            const __m512i raw = _mm512_loadu_si512(p + 64 * (J / 2));
            const __m512i four = _mm512_and_si512(J % 2 ? _mm512_srli_epi16(raw, 4) : raw, low);
            const __m512i pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 128 + 32 * (J / 2))));
            const __m512i two = _mm512_and_si512(_mm512_srlv_epi16(pairs, J % 2 ? shifts(4, 6) : shifts(0, 2)), _mm512_set1_epi8(3));
            return _mm512_or_si512(four, _mm512_slli_epi16(two, 4));
        } else {
            constexpr int at = T == BlockType::Q4_K ? 16 : 48;
            const __m512i raw = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + at + 32 * J)));
            __m512i q = _mm512_and_si512(_mm512_srlv_epi16(raw, shifts(0, 4)), low);
            if constexpr (T == BlockType::Q5_K) {
                const __m512i bits = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
                const __m512i tested = _mm512_inserti64x4(_mm512_set1_epi8(char(1 << (2 * J))), _mm256_set1_epi8(char(1 << (2 * J + 1))), 1);
                q = _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, tested), q, _mm512_set1_epi8(16));
            }
            return q;
        }
    }

    __m512 scaled(const float* scale) const {  // the block's scales times those of the activations
        const __m256 eight = _mm256_loadu_ps(scale);
        if constexpr (is_six) {
            const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
            return _mm512_mul_ps(scales, _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(eight)));
        } else {
            return _mm512_castps256_ps512(_mm256_mul_ps(_mm512_castps512_ps256(scales), eight));
        }
    }

    __m512 rest(const Activations& x, int64_t at, __m512 sum) const {  // sum + what the minima (or, to be multiplied by it, the offset) add
        if constexpr (is_six) return _mm512_fmadd_ps(scales, _mm512_loadu_ps(x.sum16 + at / 16), sum);
        else return _mm512_fmadd_ps(_mm512_zextps256_ps512(minima), _mm512_loadu_ps(x.sum + at / 32), sum);
    }

    template <int J>
    static __m512 over_lanes(__m512 scaled) {  // the scale of each lane's four weights
        if constexpr (is_six)
            return _mm512_permutexvar_ps(_mm512_add_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(4 * J)), scaled);
        else
            return _mm512_permutexvar_ps(_mm512_add_epi32(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), _mm512_set1_epi32(2 * J)), scaled);
    }
};

template <BlockType T, int Rows>
void multiply_k(const uint8_t* weights, int64_t count, int64_t k, const Activations* x, float* y, int64_t stride) {
    using Block = KBlock<T>;
    constexpr int64_t bytes = shape_of(T).bytes;
    Collected<Rows> collected(y, stride, count);
    const uint8_t* p = weights;
    for (int64_t n = 0; n < count; n++) {
        __m512 sums[Rows], rests[Rows];
        for (int r = 0; r < Rows; r++) sums[r] = rests[r] = _mm512_setzero_ps();
        for (int64_t at = 0; at < k; at += 256, p += bytes) {
            for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD + line, _MM_HINT_T0);
            const Block block(p);
            __m512 scaled[Rows];
            for (int r = 0; r < Rows; r++) {
                scaled[r] = block.scaled(x[r].scale + at / 32);
                rests[r] = block.rest(x[r], at, rests[r]);
            }
            const auto add = [&]<int J>(std::integral_constant<int, J>) {
                const Bytes q = block.template quants<J>();
                for (int r = 0; r < Rows; r++) {
                    const __m512 products = _mm512_cvtepi32_ps(dot(q, x[r].q + at + 64 * J));
                    sums[r] = _mm512_fmadd_ps(Block::template over_lanes<J>(scaled[r]), products, sums[r]);
                }
            };
            add(std::integral_constant<int, 0>());
            add(std::integral_constant<int, 1>());
            add(std::integral_constant<int, 2>());
            add(std::integral_constant<int, 3>());
        }
        for (int r = 0; r < Rows; r++) sums[r] = _mm512_fmadd_ps(rests[r], _mm512_set1_ps(Block::is_six ? -32.0f : 1.0f), sums[r]);
        collected.add(n, sums);
    }
}

template <int Rows>
void multiply_avx512_rows(BlockType type, const uint8_t* weights, int64_t count, int64_t k, const Activations* x, float* y, int64_t stride) {
    switch (type) {
        case BlockType::BF16: multiply_wide<Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q4_0: multiply_pairs<BlockType::Q4_0, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q4_1: multiply_pairs<BlockType::Q4_1, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q5_0: multiply_pairs<BlockType::Q5_0, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q5_1: multiply_pairs<BlockType::Q5_1, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q8_0: multiply_pairs<BlockType::Q8_0, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q4_K: multiply_k<BlockType::Q4_K, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q5_K: multiply_k<BlockType::Q5_K, Rows>(weights, count, k, x, y, stride); break;
        case BlockType::Q6_K: multiply_k<BlockType::Q6_K, Rows>(weights, count, k, x, y, stride); break;
    }
}

inline void multiply_avx512(BlockType type, const uint8_t* weights, int64_t count, int64_t k, const Activations* x, int rows, float* y, int64_t stride) {
    switch (rows) {
        case 1: multiply_avx512_rows<1>(type, weights, count, k, x, y, stride); break;
        case 2: multiply_avx512_rows<2>(type, weights, count, k, x, y, stride); break;
        case 3: multiply_avx512_rows<3>(type, weights, count, k, x, y, stride); break;
        default: multiply_avx512_rows<4>(type, weights, count, k, x, y, stride); break;
    }
}
