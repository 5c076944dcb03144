// Heads as the bytes of cached rows, what kvshare.cache.codecs writes, in plain C++ that compilers vectorise.
// Included once by each file of a set inside that set's namespace.
#pragma once

constexpr float LARGEST_HALF = 65504.0f;

// The least float16 that is not below x; the largest finite one for what is beyond all of them. What is no number stays that.
inline uint16_t half_at_least(float x) {
    const float bounded = x > LARGEST_HALF ? LARGEST_HALF : x < -LARGEST_HALF ? -LARGEST_HALF : x;
    const uint16_t near = float_to_half(bounded);
    uint8_t bytes[2];
    memcpy(bytes, &near, 2);
    if (!(half_to_float(bytes) < bounded)) return near;
    if (near == 0x8000) return 1;  // minus zero: up to the smallest one
    return near & 0x8000 ? uint16_t(near - 1) : uint16_t(near + 1);
}

inline uint16_t half_at_most(float x) { return half_at_least(-x) ^ 0x8000; }

inline float half_value(uint16_t half) {
    uint8_t bytes[2];
    memcpy(bytes, &half, 2);
    return half_to_float(bytes);
}

inline float bounded(float code, float largest) { return code > largest ? largest : code < -largest ? -largest : code; }
inline int whole(float code) { return code == code ? int(rintf(code)) : 0; }

inline void put_scale(uint16_t half, uint8_t* to) { memcpy(to, &half, 2); }

template <RowKind Kind>
void encode_scaled(const float* x, int width, uint8_t* to) {  // INT8, INT9, FP8: codes of x over a scale that the largest fits
    constexpr float most = Kind == RowKind::INT8 ? 127.0f : Kind == RowKind::INT9 ? 255.0f : 448.0f;
    const uint16_t scale = half_at_least(largest_size(x, width) / most);
    const float divisor = half_value(scale) == 0 ? 1.0f : half_value(scale);
    if constexpr (Kind == RowKind::INT9) memset(to + width, 0, size_t(width + 7) / 8);
    for (int i = 0; i < width; i++) {
        const float code = bounded(x[i] / divisor, most);
        if constexpr (Kind == RowKind::FP8) {
            to[i] = float_to_fp8(code);
        } else if constexpr (Kind == RowKind::INT8) {
            to[i] = uint8_t(int8_t(whole(code)));
        } else {
            const int c = whole(code);
            to[i] = uint8_t(int8_t(c >> 1));
            to[width + i / 8] |= uint8_t((c & 1) << i % 8);
        }
    }
    put_scale(scale, to + code_bytes(Kind, width));
}

inline void encode_groups(const float* x, int width, uint8_t* to) {  // INT4
    uint8_t *scales = to + code_bytes(RowKind::INT4, width), *minima = scales + 2 * groups_of(width);
    memset(to, 0, size_t(code_bytes(RowKind::INT4, width)));
    for (int first = 0; first < width; first += INT4_GROUP, scales += 2, minima += 2) {
        const int end = first + INT4_GROUP < width ? first + INT4_GROUP : width;
        float low = x[first], high = x[first], all = 0;
        for (int i = first; i < end; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
            all += x[i] - x[i];
        }
        if (!(all == 0) && !(high == INFINITY || low == -INFINITY)) low = high = NAN;
        const uint16_t minimum = half_at_most(low), scale = half_at_least((high - half_value(minimum)) / 15.0f);
        const float divisor = half_value(scale) == 0 ? 1.0f : half_value(scale);
        for (int i = first; i < end; i++) {
            const int code = whole((x[i] - half_value(minimum)) / divisor);
            to[i / 2] |= uint8_t((code < 0 ? 0 : code > 15 ? 15 : code) << 4 * (i & 1));
        }
        put_scale(scale, scales);
        put_scale(minimum, minima);
    }
}

template <RowKind Kind>
void encode_levels(const float* x, int width, float unit, uint8_t* to) {  // x: the head over `unit`
    constexpr int bits = bits_of(Kind), count = 1 << bits;
    static constexpr Levels<Kind> levels;
    float squares = 0, products = 0, points = 0;
    for (int i = 0; i < width; i++) squares += x[i] * x[i];
    const float spread = sqrtf(squares / float(width)), divisor = spread == 0 ? 1.0f : spread;
    uint8_t each[WIDEST_HEAD];
    memset(to, 0, size_t(code_bytes(Kind, width)));
    for (int i = 0; i < width; i++) {
        const float value = x[i] / divisor;
        int code = 0;
        for (int border = 1; border < count; border++) code += value > (levels.of[border] + levels.of[border - 1]) / 2;
        each[i] = uint8_t(code);
    }
    for (int i = 0; i < width; i++) {
        const float point = levels.of[each[i]];
        products += x[i] * point;
        points += point * point;
        const int at = i * bits;
        to[at / 8] |= uint8_t(each[i] << at % 8);
        if (at % 8 + bits > 8) to[at / 8 + 1] |= uint8_t(each[i] >> (8 - at % 8));
    }
    const float scale = products / points * unit;
    put_scale(float_to_half(scale > LARGEST_HALF ? LARGEST_HALF : scale), to + code_bytes(Kind, width));
}

// One head of `width` <= WIDEST_HEAD numbers, rotated and balanced already, over `unit` where the kind has levels: to[head_bytes(kind, width)].
inline void encode_head(RowKind kind, int width, const float* x, float unit, uint8_t* to) {
    if (is_block(kind)) return encode_blocks(form_of(kind), width, x, to);
    switch (kind) {
        case RowKind::BF16:
            for (int i = 0; i < width; i++) {
                uint16_t bits;
                put(x[i], &bits);
                memcpy(to + 2 * i, &bits, 2);
            }
            return;
        case RowKind::FP32: memcpy(to, x, size_t(width) * 4); return;
        case RowKind::INT8: return encode_scaled<RowKind::INT8>(x, width, to);
        case RowKind::INT9: return encode_scaled<RowKind::INT9>(x, width, to);
        case RowKind::FP8: return encode_scaled<RowKind::FP8>(x, width, to);
        case RowKind::INT4: return encode_groups(x, width, to);
        case RowKind::LEVELS4: return encode_levels<RowKind::LEVELS4>(x, width, unit, to);
        case RowKind::LEVELS3: return encode_levels<RowKind::LEVELS3>(x, width, unit, to);
        case RowKind::LEVELS2: return encode_levels<RowKind::LEVELS2>(x, width, unit, to);
    }
}
