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

// A whole strip, as the products read it: each row's numbers to to[row * k], a few lines at a time: sixteen streams of single lines are slow.
template <BlockType T>
void decode_strip(const uint8_t* from, int64_t k, uint16_t* to) {
    using Format = Reader<T>;
    constexpr int halves = Format::halves, unit = Format::unit * 32, at_once = 256;
    const int64_t blocks = k / shape_of(T).weights;
    InterleavedStrip<T> strip(from, blocks);
    LinesAhead lines(from + STREAM_AHEAD, STREAM_AHEAD);  // into the strip behind this one, which is decoded next
    Format reader;
    constexpr bool looked_up = Format::levels <= 32;  // in a table of a group's numbers, which fits a register
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 first_levels = _mm512_cvtepi32_ps(count), other_levels = _mm512_add_ps(first_levels, _mm512_set1_ps(16));
    __m512i quarter[4];  // 16 bytes, spread: of one register over 32-bit lanes, or of two over 16-bit ones
    for (int i = 0; i < 4; i++) {
        const __m256i words = _mm512_cvtepi32_epi16(_mm512_add_epi32(count, _mm512_set1_epi32(16 * i)));
        if (looked_up) quarter[i] = _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_add_epi16(words, _mm256_set1_epi16(64)), 1);
        else quarter[i] = _mm512_add_epi32(count, _mm512_set1_epi32(16 * i));
    }
    alignas(64) uint16_t numbers[LANES][at_once];
    int filled = 0;
    for (int64_t block = 0; block < blocks; block++) {
        strip.open(block);
        reader.open(strip);
        for (int i = 0; i < Format::groups / Format::unit; i++) {
            lines.ask<int(LANES * shape_of(T).bytes * Format::unit / Format::groups)>();
            Unpacked<Format::unit, halves> unpacked;
            reader.unpack(strip, i, unpacked);
            each<Format::unit>([&](auto g) __attribute__((always_inline)) {
                alignas(64) float scales[halves][LANES], rests[halves][LANES];
                each<halves>([&](auto h) __attribute__((always_inline)) {
                    const __m512 scale = unpacked.scale[halves * g + h];
                    _mm512_store_ps(scales[h], scale);
                    if constexpr (Format::has_minimum) _mm512_store_ps(rests[h], unpacked.minimum[g]);
                    else _mm512_store_ps(rests[h], _mm512_mul_ps(scale, _mm512_set1_ps(-float(Format::offset))));
                });
                asm("" : "+m"(scales), "+m"(rests));  // broadcast from memory: gcc 12 would permute the registers instead, which is what limits this loop
                transpose_quarters(unpacked.w + 8 * g);
                transpose_quarters(unpacked.w + 8 * g + 4);
                each<LANES>([&](auto i) __attribute__((always_inline)) {
                    if constexpr (looked_up) {
                        const __m512 scale = _mm512_set1_ps(scales[0][i]), rest = _mm512_set1_ps(rests[0][i]), first = _mm512_fmadd_ps(first_levels, scale, rest);
                        const __m512i table = Format::levels > 16 ? (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(other_levels, scale, rest), first)
                                                                  : _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(first));
                        const __m512i q = _mm512_permutex2var_epi8(unpacked.w[8 * g + i % 4], quarter[i / 4], unpacked.w[8 * g + 4 + i % 4]);
                        _mm512_store_si512(numbers[i] + filled + 32 * g, _mm512_permutexvar_epi16(q, table));  // (which looks at five bits of each 16)
                        return;
                    }
                    __m512 half[2];
                    each<2>([&](auto h) __attribute__((always_inline)) {
                        const __m512i q = _mm512_maskz_permutexvar_epi8(0x1111111111111111, quarter[i / 4], unpacked.w[8 * g + 4 * h + i % 4]);
                        half[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scales[h % halves][i]), _mm512_set1_ps(rests[h % halves][i]));
                    });
                    _mm512_store_si512(numbers[i] + filled + 32 * g, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
                });
            });
            if ((filled += unit) == at_once || (i == Format::groups / Format::unit - 1 && block == blocks - 1)) {
                for (int row = 0; row < LANES; row++)
                    for (int n = 0; n < filled; n += 32) _mm512_storeu_si512(to + row * k + n, _mm512_load_si512(numbers[row] + n));
                to += filled;
                filled = 0;
            }
        }
    }
}

inline void decode_avx512(const WeightRows& weights, int64_t k, void* to, bool bf16) {
    if (!bf16 || weights.type == BlockType::BF16) return decode_rows(weights, k, to, bf16);
    uint16_t* out = static_cast<uint16_t*>(to);
    with_format(weights.type, [&]<BlockType T>() {
        const int64_t strip_bytes = STRIP * (k / shape_of(T).weights) * shape_of(T).bytes;
        for (WeightRows rest = weights; rest.count > 0;) {
            const bool whole = rest.interleaved && !rest.skip && rest.count >= STRIP;
            const int64_t count = whole ? STRIP : rest.interleaved && rest.count > STRIP - rest.skip ? STRIP - rest.skip : rest.count;
            if (whole) decode_strip<T>(rest.data, k, out);
            else in_file_order<T>({T, rest.interleaved, rest.data, rest.skip, count}, k, [&](const uint8_t* rows, int64_t first, int64_t many) {
                if constexpr (shape_of(T).weights == 256) decode_k<T>(rows, many, k, out + first * k);
                else decode_pairs<T>(rows, many, k, out + first * k);
            });
            rest = {T, rest.interleaved, rest.data + strip_bytes, 0, rest.count - count};
            out += count * k;
        }
    });
}
