// Strips: sixteen rows of blocks in the order in which the products want them. The bytes are the file's, only their places change: first the 16-bit
// floats of a block of all sixteen rows, then its other bytes, four of each row beside those of the next row. So a product reads one stream of whole
// cache lines instead of sixteen. Blocks with a single float go by twos, whose floats fill a line together; a last odd block stays alone.
// Included once by whoever needs it inside a namespace of its own.
#pragma once

constexpr int64_t STRIP = 16;  // rows

struct StripShape {
    int floats, floats_at;  // 16-bit floats of a block, and where in the block they lie
    int words, words_at;    // of four bytes: all the others
    int together;           // blocks of a row whose floats lie together
};

constexpr StripShape strip_shape(BlockType type) {
    const int floats = type == BlockType::Q4_1 || type == BlockType::Q5_1 || type == BlockType::Q4_K || type == BlockType::Q5_K ? 2 : 1;
    const bool behind = type == BlockType::Q6_K;
    return {floats, behind ? 208 : 0, (int(shape_of(type).bytes) - 2 * floats) / 4, behind ? 0 : 2 * floats, 3 - floats};
}

// Where the fields of a block of all rows lie: float f of row i at floats + 32 f + 2 i, word w at words + 64 w + 4 i.
template <typename Byte>
struct StripBlock {
    Byte *floats, *words;
};

template <BlockType T, typename Byte>
inline StripBlock<Byte> strip_block(Byte* strip, int64_t blocks, int64_t block) {
    constexpr StripShape shape = strip_shape(T);
    if constexpr (shape.together == 1) {
        Byte* at = strip + block * STRIP * shape_of(T).bytes;
        return {at, at + 2 * STRIP * shape.floats};
    } else {
        const int64_t second = block & 1, first = block - second;
        Byte* at = strip + first * STRIP * shape_of(T).bytes;
        return {at + 2 * STRIP * second, at + (first + 1 < blocks ? 4 : 2) * STRIP + second * 4 * STRIP * shape.words};
    }
}

// Sixteen rows of the file as a strip.
template <BlockType T>
inline void strip_of_rows(const uint8_t* rows, int64_t blocks, uint8_t* strip) {
    constexpr StripShape shape = strip_shape(T);
    for (int64_t block = 0; block < blocks; block++) {
        const StripBlock<uint8_t> to = strip_block<T>(strip, blocks, block);
        for (int64_t i = 0; i < STRIP; i++) {
            const uint8_t* from = rows + (i * blocks + block) * shape_of(T).bytes;
            for (int f = 0; f < shape.floats; f++) memcpy(to.floats + 2 * (STRIP * f + i), from + shape.floats_at + 2 * f, 2);
            for (int w = 0; w < shape.words; w++) memcpy(to.words + 4 * (STRIP * w + i), from + shape.words_at + 4 * w, 4);
        }
    }
}

// Rows begin ... end - 1 of a strip as in the file.
template <BlockType T>
void rows_of_strip(const uint8_t* strip, int64_t blocks, int64_t begin, int64_t end, uint8_t* rows) {
    constexpr StripShape shape = strip_shape(T);
    for (int64_t block = 0; block < blocks; block++) {
        const StripBlock<const uint8_t> from = strip_block<T>(strip, blocks, block);
        for (int64_t i = begin; i < end; i++) {
            uint8_t* to = rows + ((i - begin) * blocks + block) * shape_of(T).bytes;
            for (int f = 0; f < shape.floats; f++) memcpy(to + shape.floats_at + 2 * f, from.floats + 2 * (STRIP * f + i), 2);
            for (int w = 0; w < shape.words; w++) memcpy(to + shape.words_at + 4 * w, from.words + 4 * (STRIP * w + i), 4);
        }
    }
}

// f<T>() for the format `type`, unless it is BF16, which has no blocks.
template <typename F>
inline void with_format(BlockType type, F&& f) {
    switch (type) {
        case BlockType::BF16: break;
        case BlockType::Q4_0: f.template operator()<BlockType::Q4_0>(); break;
        case BlockType::Q4_1: f.template operator()<BlockType::Q4_1>(); break;
        case BlockType::Q5_0: f.template operator()<BlockType::Q5_0>(); break;
        case BlockType::Q5_1: f.template operator()<BlockType::Q5_1>(); break;
        case BlockType::Q8_0: f.template operator()<BlockType::Q8_0>(); break;
        case BlockType::Q4_K: f.template operator()<BlockType::Q4_K>(); break;
        case BlockType::Q5_K: f.template operator()<BlockType::Q5_K>(); break;
        case BlockType::Q6_K: f.template operator()<BlockType::Q6_K>(); break;
    }
}

// Memory that a thread keeps.
class Scratch {
  public:
    ~Scratch() { free(at_); }
    uint8_t* room(int64_t bytes) {
        if (bytes > bytes_) {
            free(at_);
            at_ = static_cast<uint8_t*>(malloc(size_t(bytes))), bytes_ = bytes;
        }
        return at_;
    }

  private:
    uint8_t* at_ = nullptr;
    int64_t bytes_ = 0;
};

// f(rows, first, count) for weights of k numbers as they lie in the file: all at once, or strip by strip.
template <BlockType T, typename F>
inline void in_file_order(const WeightRows& weights, int64_t k, F&& f) {
    static thread_local Scratch scratch;
    const int64_t blocks = k / shape_of(T).weights, row_bytes = blocks * shape_of(T).bytes;
    if (!weights.interleaved) return f(weights.data, 0, weights.count);
    uint8_t* rows = scratch.room(STRIP * row_bytes);
    for (int64_t n = 0; n < weights.count;) {
        const int64_t at = weights.skip + n, lane = at % STRIP, count = STRIP - lane < weights.count - n ? STRIP - lane : weights.count - n;
        rows_of_strip<T>(weights.data + (at - lane) * row_bytes, blocks, lane, lane + count, rows);
        f(static_cast<const uint8_t*>(rows), n, count);
        n += count;
    }
}
