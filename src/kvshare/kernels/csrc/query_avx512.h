// How a query is spelled for each kind of keys: once a call, however many rows it meets.
#pragma once

constexpr int HEADS_TOGETHER = 8;

// Up to HEADS_TOGETHER heads stand together, so that what meets four bytes of a row lies side by side: for each four numbers of `row_tile`'s order, piece
// by piece and field by field, for each plane, the integers of all heads. They have 8 bits of the largest number of their group: of the 32 that share
// a scale in INT4, of 16 for INT8, whose keys have lost the least, else of the head. INT9 meets 16 bits, as high and low bytes in two planes, and its
// ninth bits half of the high ones, in a third. Keys are bytes 128 too large where codes are signed; the query's sum takes that back.
template <RowKind Kind>
struct SpelledQuery {
    static constexpr int passes = Kind == RowKind::INT9 ? 2 : 1, planes = passes + (Kind == RowKind::INT9);
    static constexpr bool grouped = Kind == RowKind::INT4 || Kind == RowKind::INT8;
    static_assert(!grouped || Codes<Kind>::numbers == (Kind == RowKind::INT4 ? INT4_GROUP : 16));  // a group is a piece
    static int64_t padded(int width) { return (width + Codes<Kind>::numbers - 1) / Codes<Kind>::numbers * Codes<Kind>::numbers; }
    static int groups(int width) { return grouped ? int(padded(width)) / Codes<Kind>::numbers : 1; }

    const int8_t* codes;   // [padded / 4, planes, heads, 4]
    const float* scale;    // [groups, heads]
    const float* sum;      // INT4: [groups, heads] of the exact numbers; INT8: [heads] -128 times the sum of scales times codes
    const int32_t* minus;  // [heads, passes] -128 times the sum of high, and of low; not for groups

    SpelledQuery(const uint8_t* at, int width, int heads) {
        codes = reinterpret_cast<const int8_t*>(at);
        scale = reinterpret_cast<const float*>(codes + padded(width) * planes * heads);
        sum = scale + groups(width) * heads;
        minus = reinterpret_cast<const int32_t*>(sum);
    }
};

template <RowKind Kind>
void spell_codes(int width, int heads, int head, const float* q, uint8_t* to) {
    using Form = Codes<Kind>;
    using Spelled = SpelledQuery<Kind>;
    const Spelled query(to, width, heads);
    constexpr float largest = Spelled::passes == 2 ? 127 * 256 + 127 : 127;
    const int group = Spelled::grouped ? Form::numbers : width, padded = int(Spelled::padded(width));
    auto* codes = const_cast<int8_t*>(query.codes);
    auto *scale = const_cast<float*>(query.scale), *sum = const_cast<float*>(query.sum);
    auto* minus = const_cast<int32_t*>(query.minus);
    alignas(64) int16_t integers[WIDEST_HEAD + 64];  // [padded], in the head's own order
    for (int i = width / 16 * 16; i < padded; i++) integers[i] = 0;
    float too_large = 0;
    for (int first = 0, index = head; first < width; first += group, index += heads) {
        const int end = first + group < width ? first + group : width;
        const auto sixteen = [&](int i) { return _mm512_maskz_loadu_ps(end - i >= 16 ? 0xffff : __mmask16((1 << (end - i)) - 1), q + i); };
        __m512 sizes = _mm512_setzero_ps(), totals = _mm512_setzero_ps();
        for (int i = first; i < end; i += 16) {
            sizes = _mm512_max_ps(sizes, _mm512_abs_ps(sixteen(i)));
            totals = _mm512_add_ps(totals, sixteen(i));
        }
        const float unit = _mm512_reduce_max_ps(sizes) / largest, inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
        scale[index] = unit / Form::levels_unit * (Kind == RowKind::INT9 ? 2.0f : 1.0f);
        if (Kind == RowKind::INT4) sum[index] = _mm512_reduce_add_ps(totals);
        for (int i = first; i < end; i += 16) {
            const __m512i sixteen_codes = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(i), _mm512_set1_ps(inverse)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + i), _mm512_cvtepi32_epi16(sixteen_codes));
            if (Kind == RowKind::INT8) too_large += unit * float(_mm512_reduce_add_epi32(sixteen_codes));
        }
    }
    if (Kind == RowKind::INT8) sum[head] = -128 * too_large;
    int32_t high_sum = 0, low_sum = 0;
    for (int word = 0; word < padded / 4; word++) {  // of four numbers that a dot product adds up: of one field, side by side
        const int at = 4 * word % Form::numbers;
        const int16_t* from = integers + 4 * word - at + at % 16 * Form::fields + at / 16;
        int8_t four[Spelled::planes][4];
        for (int i = 0; i < 4; i++) {
            const int code = from[i * Form::fields];
            int high = code;
            if constexpr (Spelled::passes == 2) {
                high = (code + 128) >> 8;
                const int low = code - high * 256;
                four[1][i] = int8_t(low);
                low_sum += low;
                if constexpr (Kind == RowKind::INT9) four[2][i] = int8_t((code + 256) >> 9);
            }
            four[0][i] = int8_t(high);
            high_sum += high;
        }
        for (int plane = 0; plane < Spelled::planes; plane++) memcpy(codes + ((word * Spelled::planes + plane) * heads + head) * 4, four[plane], 4);
    }
    if constexpr (!Spelled::grouped) {
        minus[head * Spelled::passes] = -128 * high_sum;
        if constexpr (Spelled::passes == 2) minus[head * 2 + 1] = -128 * low_sum;
    }
}

// bfloat16 [padded / 4, heads, 4]: of four numbers first 0 and 2, then 1 and 3.
inline void spell_eighths(int width, int heads, int head, const float* q, uint8_t* to) {
    auto* words = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < (width + 15) / 16 * 16; i++) words[(i / 4 * heads + head) * 4 + (i & 1) * 2 + (i >> 1 & 1)] = i < width ? float_to_bf16(q[i]) : 0;
}

// bfloat16 [pieces, heads, 32].
inline void spell_pieces(int width, int heads, int head, const float* q, uint8_t* to) {
    auto* words = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < (width + 31) / 32 * 32; i++) words[(i / 32 * heads + head) * 32 + i % 32] = i < width ? float_to_bf16(q[i]) : 0;
}

inline void spell_avx512(RowKind kind, int width, int group, int head, const float* q, uint8_t* to) {
    if (kind == RowKind::FP32 || is_block(kind)) return spell_plain(kind, width, group, head, q, to);
    const int slice = head / HEADS_TOGETHER * HEADS_TOGETHER, heads = group - slice < HEADS_TOGETHER ? group - slice : HEADS_TOGETHER;
    to += slice * query_bytes(width);
    head -= slice;
    switch (kind) {
        case RowKind::FP32: return;
        case RowKind::BF16: return spell_pieces(width, heads, head, q, to);
        case RowKind::INT8: return spell_codes<RowKind::INT8>(width, heads, head, q, to);
        case RowKind::INT9: return spell_codes<RowKind::INT9>(width, heads, head, q, to);
        case RowKind::INT4: return spell_codes<RowKind::INT4>(width, heads, head, q, to);
        case RowKind::LEVELS4: return spell_codes<RowKind::LEVELS4>(width, heads, head, q, to);
        case RowKind::LEVELS3: return spell_codes<RowKind::LEVELS3>(width, heads, head, q, to);
        case RowKind::LEVELS2: return spell_codes<RowKind::LEVELS2>(width, heads, head, q, to);
        case RowKind::FP8: return spell_eighths(width, heads, head, q, to);
    }
}
