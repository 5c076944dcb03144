// Heads of cached rows as numbers, in plain C++ that compilers vectorise. Included once by each file of a set inside that set's namespace.
#pragma once

template <RowKind Kind>
struct Levels {
    float of[1 << bits_of(Kind)];
    constexpr Levels() : of() {
        for (int code = 0; code < 1 << bits_of(Kind); code++) of[code] = level(Kind, code);
    }
};

template <RowKind Kind, typename To>
void decode_one(const uint8_t* p, int width, To* to) {
    const uint8_t* end = p + code_bytes(Kind, width);
    if constexpr (is_plain(Kind)) {
        for (int i = 0; i < width; i++) {
            if constexpr (Kind == RowKind::BF16) {
                uint16_t bits;
                memcpy(&bits, p + 2 * i, 2);
                put(bf16_to_float(bits), to + i);
            } else {
                float f;
                memcpy(&f, p + 4 * i, 4);
                put(f, to + i);
            }
        }
    } else if constexpr (Kind == RowKind::INT4) {
        const int groups = groups_of(width);
        for (int group = 0; group < groups; group++) {
            const float scale = half_to_float(end + 2 * group), minimum = half_to_float(end + 2 * (groups + group));
            const int first = group * INT4_GROUP, last = first + INT4_GROUP < width ? first + INT4_GROUP : width;
            for (int i = first; i < last; i++) put(float(p[i / 2] >> 4 * (i & 1) & 15) * scale + minimum, to + i);
        }
    } else {
        const float scale = half_to_float(end);
        if constexpr (Kind == RowKind::INT8)
            for (int i = 0; i < width; i++) put(float(int8_t(p[i])) * scale, to + i);
        else if constexpr (Kind == RowKind::INT9)
            for (int i = 0; i < width; i++) put(float(2 * int8_t(p[i]) + (p[width + i / 8] >> i % 8 & 1)) * scale, to + i);
        else if constexpr (Kind == RowKind::FP8)
            for (int i = 0; i < width; i++) put(fp8_to_float(p[i]) * scale, to + i);
        else {
            static constexpr Levels<Kind> levels;
            constexpr int bits = bits_of(Kind), mask = (1 << bits) - 1;
            for (int i = 0; i < width; i++) {  // the byte behind the last code is the scale's
                const int at = i * bits, word = p[at / 8] | p[at / 8 + 1] << 8;
                put(levels.of[word >> at % 8 & mask] * scale, to + i);
            }
        }
    }
}

template <typename To>
void decode_heads_to(RowKind kind, int width, const uint8_t* const* heads, int count, To* to, int64_t stride) {
    if (is_block(kind)) {
        for (int r = 0; r < count; r++) decode_blocks(form_of(kind), width, heads[r], to + r * stride);
        return;
    }
    const auto all = [&]<RowKind Kind>() {
        for (int r = 0; r < count; r++) decode_one<Kind>(heads[r], width, to + r * stride);
    };
    switch (kind) {
        case RowKind::BF16: return all.template operator()<RowKind::BF16>();
        case RowKind::FP32: return all.template operator()<RowKind::FP32>();
        case RowKind::INT8: return all.template operator()<RowKind::INT8>();
        case RowKind::INT9: return all.template operator()<RowKind::INT9>();
        case RowKind::FP8: return all.template operator()<RowKind::FP8>();
        case RowKind::INT4: return all.template operator()<RowKind::INT4>();
        case RowKind::LEVELS4: return all.template operator()<RowKind::LEVELS4>();
        case RowKind::LEVELS3: return all.template operator()<RowKind::LEVELS3>();
        case RowKind::LEVELS2: return all.template operator()<RowKind::LEVELS2>();
    }
}

inline void decode_heads(RowKind kind, int width, const uint8_t* const* heads, int count, void* to, int64_t stride, bool bf16) {
    if (bf16) decode_heads_to(kind, width, heads, count, static_cast<uint16_t*>(to), stride);
    else decode_heads_to(kind, width, heads, count, static_cast<float*>(to), stride);
}
