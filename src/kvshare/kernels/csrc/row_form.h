// How the rows of a cache are spelled: what kvshare.cache.codecs writes, head by head.
#pragma once
#include <cstdint>

namespace kvshare {

// BF16 and FP32: plain numbers. INT8 and FP8: codes, then one float16 scale. INT4: codes, then a float16 scale for every 32, then as many minima.
// INT9: signed bytes of twice their value, then a bit each to be added, then the scale. LEVELS*: codes of 4, 3 or 2 bits that stand for the levels below, then one float16 scale. A head may begin at any address.
// Beyond them a RowKind is a `BlockForm` in one number.
enum class RowKind : int { BF16, FP32, INT8, INT9, FP8, INT4, LEVELS4, LEVELS3, LEVELS2 };

// DeepSeek's rows: floats of 8 (e4m3) or 4 bits (e2m1) with a power of two for every `group` of them, and `exact` bfloat16 numbers at the end.
// A head is codes | exact numbers | scales | padding; a scale is an exponent (1 byte) or a float32 (4).
struct BlockForm {
    int bits, group, scale_bytes, exact, align;

    constexpr int blocks(int width) const { return (width - exact + group - 1) / group; }
    constexpr int64_t codes_bytes(int width) const { return (int64_t(width - exact) * bits + 7) / 8; }
    constexpr int64_t bytes(int width) const {
        const int64_t used = codes_bytes(width) + 2 * exact + int64_t(blocks(width)) * scale_bytes;
        return (used + align - 1) / align * align;
    }
};

constexpr int BLOCK_KINDS = 1 << 30, MOST_GROUP = 255, MOST_EXACT = 4095, MOST_ALIGN = 63;

constexpr RowKind kind_of(const BlockForm& form) {
    return RowKind(BLOCK_KINDS | (form.bits == 8) | (form.scale_bytes == 4) << 1 | form.align << 2 | form.group << 8 | form.exact << 16);
}

constexpr bool is_block(RowKind kind) { return int(kind) & BLOCK_KINDS; }

constexpr BlockForm form_of(RowKind kind) {
    const int all = int(kind);
    return {all & 1 ? 8 : 4, all >> 8 & MOST_GROUP, all & 2 ? 4 : 1, all >> 16 & MOST_EXACT, all >> 2 & MOST_ALIGN};
}

constexpr int INT4_GROUP = 32;
constexpr int WIDEST_HEAD = 2048;  // numbers

constexpr int bits_of(RowKind kind) {  // of a code; INT9: of its byte
    switch (kind) {
        case RowKind::FP32: return 32;
        case RowKind::BF16: return 16;
        case RowKind::INT8:
        case RowKind::INT9:
        case RowKind::FP8: return 8;
        case RowKind::INT4:
        case RowKind::LEVELS4: return 4;
        case RowKind::LEVELS3: return 3;
        case RowKind::LEVELS2: return 2;
    }
    return 0;
}

constexpr bool is_plain(RowKind kind) { return kind == RowKind::BF16 || kind == RowKind::FP32; }

constexpr bool is_leveled(RowKind kind) { return kind == RowKind::LEVELS4 || kind == RowKind::LEVELS3 || kind == RowKind::LEVELS2; }

constexpr int64_t code_bytes(RowKind kind, int width) { return (int64_t(width) * bits_of(kind) + 7) / 8 + (kind == RowKind::INT9 ? (width + 7) / 8 : 0); }

constexpr int groups_of(int width) { return (width + INT4_GROUP - 1) / INT4_GROUP; }

constexpr int64_t head_bytes(RowKind kind, int width) {
    if (is_block(kind)) return form_of(kind).bytes(width);
    return code_bytes(kind, width) + (is_plain(kind) ? 0 : kind == RowKind::INT4 ? 4 * groups_of(width) : 2);
}

// What keys are made from where only values are stored, or these and the `moving` numbers of each half that a rotation moves: all bfloat16.
struct KeyRebuild {
    const uint16_t* weight;       // [width] of the keys' norm
    const uint16_t *cos, *sin;    // [positions, moving]; null where the rotated part is stored
    int moving;
};

// The levels of LEVELS4, LEVELS3 and LEVELS2, those above zero (Max 1960, table I); code c is -levels[half - 1 - c], or levels[c - half] from `half` on.
constexpr float LEVELS_4_BITS[] = {0.128395f, 0.388048f, 0.656759f, 0.942340f, 1.256231f, 1.618046f, 2.069017f, 2.732590f};
constexpr float LEVELS_3_BITS[] = {0.245094f, 0.756005f, 1.343909f, 2.151946f};
constexpr float LEVELS_2_BITS[] = {0.452780f, 1.510418f};

constexpr float level(RowKind kind, int code) {
    const float* positive = kind == RowKind::LEVELS4 ? LEVELS_4_BITS : kind == RowKind::LEVELS3 ? LEVELS_3_BITS : LEVELS_2_BITS;
    const int half = 1 << (bits_of(kind) - 1);
    return code < half ? -positive[half - 1 - code] : positive[code - half];
}

}  // namespace kvshare
