// Blocks as bfloat16 for AVX512, with the readers of blocks_avx512.h. Float32 and bfloat16 weights take the plain way.
#pragma once

// 32 of 64 bytes of weights as bfloat16: q * scale + rest, with a scale and a rest for each 16.
template <int Half>
inline void put_numbers(Bytes q, const float* scale, const float* rest, uint16_t* to) {
    const __m256i bytes = _mm512_extracti64x4_epi64(q, Half);
    __m512 numbers[2];
    for (int h = 0; h < 2; h++) {
        const __m128i sixteen = h ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
        numbers[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen)), _mm512_set1_ps(scale[h]), _mm512_set1_ps(rest[h]));
    }
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(numbers[1], numbers[0]));
}

template <BlockType T>
void decode_pairs(const uint8_t* weights, int64_t count, int64_t k, uint16_t* to) {
    using Reader = PairReader<T>;
    const Reader reader;
    constexpr int bytes = Reader::bytes;
    const int64_t blocks = count * k / 32;  // of all rows: nothing is different at their ends
    const uint8_t* p = weights;
    for (int64_t block = 0; block < blocks; block += 2, p += 2 * bytes, to += 64) {
        const bool both = block + 1 < blocks;
        const Pair pair = reader.read(p, both ? 2 : 1);
        const float d = half_to_float(p), rest = Reader::rest_factor * half_to_float(p + Reader::rest_at);
        const float scales[2] = {d, d}, rests[2] = {rest, rest};
        put_numbers<0>(pair.q, scales, rests, to);
        if (!both) break;
        const float d1 = half_to_float(p + bytes), rest1 = Reader::rest_factor * half_to_float(p + bytes + Reader::rest_at);
        const float scales1[2] = {d1, d1}, rests1[2] = {rest1, rest1};
        put_numbers<1>(pair.q, scales1, rests1, to + 32);
    }
}

template <BlockType T>
void decode_k(const uint8_t* weights, int64_t count, int64_t k, uint16_t* to) {
    using Block = KBlock<T>;
    const uint8_t* p = weights;
    for (int64_t i = 0; i < count * k / 256; i++, p += shape_of(T).bytes) {
        const Block block(p);
        alignas(64) float scales[16], rests[16];  // for each 16 weights
        if constexpr (Block::is_six) {
            _mm512_store_ps(scales, block.scales);
            _mm512_store_ps(rests, _mm512_mul_ps(block.scales, _mm512_set1_ps(-32.0f)));
        } else {
            const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
            _mm512_store_ps(scales, _mm512_permutexvar_ps(twice, block.scales));
            _mm512_store_ps(rests, _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(block.minima)));
        }
        const auto put = [&]<int J>(std::integral_constant<int, J>) {
            const Bytes q = block.template quants<J>();
            put_numbers<0>(q, scales + 4 * J, rests + 4 * J, to);
            put_numbers<1>(q, scales + 4 * J + 2, rests + 4 * J + 2, to + 32);
            to += 64;
        };
        put(std::integral_constant<int, 0>());
        put(std::integral_constant<int, 1>());
        put(std::integral_constant<int, 2>());
        put(std::integral_constant<int, 3>());
    }
}

inline void decode_avx512(BlockType type, const uint8_t* weights, int64_t count, int64_t k, void* to, bool bf16) {
    uint16_t* out = static_cast<uint16_t*>(to);
    if (!bf16 || type == BlockType::BF16) return decode_rows(type, weights, count, k, to, bf16);
    switch (type) {
        case BlockType::BF16: break;
        case BlockType::Q4_0: decode_pairs<BlockType::Q4_0>(weights, count, k, out); break;
        case BlockType::Q4_1: decode_pairs<BlockType::Q4_1>(weights, count, k, out); break;
        case BlockType::Q5_0: decode_pairs<BlockType::Q5_0>(weights, count, k, out); break;
        case BlockType::Q5_1: decode_pairs<BlockType::Q5_1>(weights, count, k, out); break;
        case BlockType::Q8_0: decode_pairs<BlockType::Q8_0>(weights, count, k, out); break;
        case BlockType::Q4_K: decode_k<BlockType::Q4_K>(weights, count, k, out); break;
        case BlockType::Q5_K: decode_k<BlockType::Q5_K>(weights, count, k, out); break;
        case BlockType::Q6_K: decode_k<BlockType::Q6_K>(weights, count, k, out); break;
    }
}
