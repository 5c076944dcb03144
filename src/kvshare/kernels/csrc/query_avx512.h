// How a query is spelled for each kind of keys: once a call, however many rows it meets.
#pragma once

// Integers stand in the order of `row_tile`: piece by piece, field by field. Keys of 8 bits meet 16 bits of the query, as high and low bytes; those of
// fewer bits, which have lost far more, meet 8. Keys are bytes 128 too large where codes are signed; the query's sum takes that back.
template <RowKind Kind>
struct SpelledQuery {
    static constexpr int passes = bits_of(Kind) == 8 ? 2 : 1;
    static int64_t padded(int width) { return (width + Codes<Kind>::numbers - 1) / Codes<Kind>::numbers * Codes<Kind>::numbers; }

    const int8_t* high;    // [padded]
    const int8_t* low;     // [padded], of 16 bits
    const int8_t* half;    // [padded], INT9 only: half of high, which the ninth bits meet
    const float* scale;    // [1], INT4: [groups]
    const float* sum;      // [groups], INT4 only: of the exact numbers
    const int32_t* minus;  // [passes] -128 times the sum of high, and of low

    SpelledQuery(const uint8_t* at, int width) {
        high = reinterpret_cast<const int8_t*>(at);
        low = high + (passes == 2 ? padded(width) : 0);
        half = low + (Kind == RowKind::INT9 ? padded(width) : 0);
        scale = reinterpret_cast<const float*>(half + padded(width));
        minus = reinterpret_cast<const int32_t*>(scale + 1);
        sum = scale + groups_of(width);
    }
};

template <RowKind Kind>
void spell_codes(int width, const float* q, uint8_t* to) {
    using Form = Codes<Kind>;
    const SpelledQuery<Kind> query(to, width);
    constexpr float largest = SpelledQuery<Kind>::passes == 2 ? 127 * 256 + 127 : 127;
    const int group = Kind == RowKind::INT4 ? INT4_GROUP : width;
    auto *high = const_cast<int8_t*>(query.high), *low = const_cast<int8_t*>(query.low), *half = const_cast<int8_t*>(query.half);
    auto *scale = const_cast<float*>(query.scale), *sum = const_cast<float*>(query.sum);
    auto* minus = const_cast<int32_t*>(query.minus);
    memset(to, 0, size_t(reinterpret_cast<const uint8_t*>(query.scale) - to));
    int32_t high_sum = 0, low_sum = 0;
    for (int first = 0, g = 0; first < width; first += group, g++) {
        const int end = first + group < width ? first + group : width;
        float size = 0, total = 0;
        for (int i = first; i < end; i++) {
            size = fabsf(q[i]) > size ? fabsf(q[i]) : size;
            total += q[i];
        }
        const float unit = size / largest, inverse = unit > 1e-30f ? 1.0f / unit : 0.0f;
        scale[g] = unit / Form::levels_unit * (Kind == RowKind::INT9 ? 2.0f : 1.0f);
        if (Kind == RowKind::INT4) sum[g] = total;
        for (int i = first; i < end; i++) {
            const int code = int(lrintf(q[i] * inverse));
            const int at = i / Form::numbers * Form::numbers + i % Form::fields * 16 + i % Form::numbers / Form::fields;
            if constexpr (SpelledQuery<Kind>::passes == 2) {
                high[at] = int8_t((code + 128) >> 8);
                low[at] = int8_t(code - high[at] * 256);
                low_sum += low[at];
                if constexpr (Kind == RowKind::INT9) half[at] = int8_t((code + 256) >> 9);
            } else {
                high[at] = int8_t(code);
            }
            high_sum += high[at];
        }
    }
    if constexpr (Kind != RowKind::INT4) {
        minus[0] = -128 * high_sum;
        if constexpr (SpelledQuery<Kind>::passes == 2) minus[1] = -128 * low_sum;
    }
}

inline void spell_eighths(int width, const float* q, uint8_t* to) {  // bfloat16: of four numbers first 0 and 2, then 1 and 3
    auto* words = reinterpret_cast<uint16_t*>(to);
    memset(to, 0, size_t((width + 15) / 16 * 32));
    for (int i = 0; i < width; i++) words[i / 4 * 4 + (i & 1) * 2 + (i >> 1 & 1)] = float_to_bf16(q[i]);
}

inline void spell_avx512(RowKind kind, int width, const float* q, uint8_t* to) {
    if (is_block(kind)) return spell_plain(kind, width, q, to);
    switch (kind) {
        case RowKind::FP32: return spell_plain(kind, width, q, to);
        case RowKind::BF16:
            for (int i = 0; i < width; i++) reinterpret_cast<uint16_t*>(to)[i] = float_to_bf16(q[i]);
            return;
        case RowKind::INT8: return spell_codes<RowKind::INT8>(width, q, to);
        case RowKind::INT9: return spell_codes<RowKind::INT9>(width, q, to);
        case RowKind::INT4: return spell_codes<RowKind::INT4>(width, q, to);
        case RowKind::LEVELS4: return spell_codes<RowKind::LEVELS4>(width, q, to);
        case RowKind::LEVELS3: return spell_codes<RowKind::LEVELS3>(width, q, to);
        case RowKind::LEVELS2: return spell_codes<RowKind::LEVELS2>(width, q, to);
        case RowKind::FP8: return spell_eighths(width, q, to);
    }
}
