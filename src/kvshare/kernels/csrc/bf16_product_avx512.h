// Products of bfloat16 weights with few rows of activations for AVX512-BF16; both are read as they are. One row of activations meets short rows of
// weights one by one. Otherwise there are sixteen sums at a time, each a whole register: of four rows of weights and up to four of activations, or of
// two and up to eight. Activations are taken a block of numbers at a time that stays in the first-level cache while rows of weights go by; what is
// summed up so far waits in memory for the next block, so that a result does not depend on the blocks, and with them on the rows beside it.
// Included once by avx512_products.cpp inside its namespace.
#pragma once

namespace bf16_product {

constexpr int SUMS = 16;
constexpr int64_t BLOCK_BYTES = 24 << 10;  // of activations: with the weights of two tiles they fit the first-level cache
constexpr int64_t WHOLE_BYTES = 32 << 10;  // up to so many are better off in one block: each row of weights is read in one go
constexpr int64_t STRIP = 32;              // rows of weights whose sums wait at the same time
constexpr int64_t LINE = 32;               // numbers in a cache line, and in a register
constexpr int64_t SHORT_ROW = 4096;        // numbers: one row of activations meets so short rows of weights one by one, longer ones by fours
constexpr int64_t IN_ORDER_AHEAD = 4096;   // numbers that are asked for before their turn where rows go one by one

constexpr int rows_together(int rows) { return rows > 4 ? 2 : 4; }  // of weights, for so many of activations

// Asks for the rows of weights that come next, one row behind another, as they lie in memory.
template <int Rows>
class RowsAhead {
  public:
    RowsAhead(const uint16_t* at, int64_t k, int64_t numbers) : at_(at), end_(at + numbers), skip_(k - numbers), k_(k) {}
    [[gnu::always_inline]] void ask() {
        each<Rows>([&](auto i) __attribute__((always_inline)) { _mm_prefetch(reinterpret_cast<const char*>(at_ + i * LINE), _MM_HINT_T0); });
        if ((at_ += Rows * LINE) >= end_) at_ += skip_, end_ += k_;
    }

  private:
    const uint16_t *at_, *end_;
    int64_t skip_, k_;
};

struct Block {
    int64_t whole;   // numbers in whole registers
    __mmask32 rest;  // of the register behind them
    bool first, last;
};

// Where the sums of a tile go: `waiting` from block to block, y behind the last one.
struct Sums {
    __m512* waiting;
    float* y;
    int64_t stride;
    int count;  // rows of weights that are there
};

[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512i a, __m512i b) {  // (gcc 12 copies the sums around its intrinsic)
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Rows of activations line by line beside one another: [lines, rows, 32], zeros behind their end. Where their length is a multiple of 4 KB, all of them
// and the rows of weights would fight for the same places of the first-level cache.
inline const uint16_t* side_by_side(const uint16_t* x, int rows, int64_t k) {
    static thread_local Scratch scratch;
    const int64_t lines = (k + LINE - 1) / LINE;
    uint8_t* memory = scratch.room((lines * rows + 1) * 64);
    uint16_t* to = reinterpret_cast<uint16_t*>(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64);
    for (int64_t line = 0; line < lines; line++) {
        const __mmask32 present = k - line * LINE < LINE ? (1u << k % LINE) - 1 : ~0u;
        for (int r = 0; r < rows; r++) _mm512_store_si512(to + (line * rows + r) * LINE, _mm512_maskz_loadu_epi16(present, x + r * k + line * LINE));
    }
    return to;
}

// One tile and one block; x [lines of the block, Rows, 32]. Meanwhile `ahead`, the next tile, is asked for.
template <int Rows>
void multiply_tile(const uint16_t* weights, int64_t k, const uint16_t* x, const Block& block, const uint16_t* ahead, const Sums& to) {
    constexpr int together = rows_together(Rows);
    const uint16_t* w[together];
    each<together>([&](auto j) __attribute__((always_inline)) { w[j] = weights + (j < to.count ? int(j) : to.count - 1) * k; });
    __m512 sums[together * Rows];
    each<together * Rows>([&](auto i) __attribute__((always_inline)) { sums[i] = block.first ? _mm512_setzero_ps() : to.waiting[i]; });
    const auto add = [&](auto load, int64_t i) __attribute__((always_inline)) {
        __m512i row[together];
        each<together>([&](auto j) __attribute__((always_inline)) { row[j] = load(w[j] + i); });
        each<Rows>([&](auto r) __attribute__((always_inline)) {
            const __m512i numbers = load(x + r * LINE);
            each<together>([&](auto j) __attribute__((always_inline)) { add_pairs(sums[r * together + j], row[j], numbers); });
        });
        x += Rows * LINE;
    };
    constexpr bool asks = Rows > 1;  // the processor foresees few long streams by itself, and reads faster when it is not asked
    RowsAhead<together> lines(ahead, k, block.whole);
    for (int64_t i = 0; i < block.whole; i += LINE) {
        if constexpr (asks) lines.ask();
        add([](const uint16_t* p) __attribute__((always_inline)) { return _mm512_loadu_si512(p); }, i);
    }
    if (block.rest) add([&](const uint16_t* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_epi16(block.rest, p); }, block.whole);
    if (!block.last) {
        each<together * Rows>([&](auto i) __attribute__((always_inline)) { to.waiting[i] = sums[i]; });
        return;
    }
    __m512 all[SUMS];  // a copy: an array that loops index would keep the sums in memory all the time
    each<SUMS>([&](auto i) __attribute__((always_inline)) { all[i] = i < together * Rows ? sums[i < together * Rows ? int(i) : 0] : _mm512_setzero_ps(); });
    const __m512 totals = sums_of(all);
    const uint32_t present = (1u << to.count) - 1;
    each<Rows>([&](auto r) { _mm512_mask_storeu_ps(to.y + r * to.stride - r * together, __mmask16(present << (r * together)), totals); });
}

constexpr decltype(&multiply_tile<1>) of_rows[] = {nullptr,          multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
                                                   multiply_tile<5>, multiply_tile<6>, multiply_tile<7>, multiply_tile<8>};

// One row of activations: rows of weights one behind another, as memory likes to be read. The sums are those of a tile, bit for bit.
inline void multiply_in_order(const uint16_t* weights, int64_t count, int64_t k, const uint16_t* x, float* y) {
    const int64_t whole = k / LINE * LINE;
    const __mmask32 rest = (1u << k % LINE) - 1;
    for (int64_t n = 0; n < count; n += SUMS) {
        const int present = int(std::min<int64_t>(SUMS, count - n));
        __m512 sums[SUMS];
        for (int j = 0; j < SUMS; j++) {
            sums[j] = _mm512_setzero_ps();
            if (j >= present) continue;
            const uint16_t* row = weights + (n + j) * k;
            __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int64_t i = 0; i < whole; i += LINE) {
                _mm_prefetch(reinterpret_cast<const char*>(row + i + IN_ORDER_AHEAD), _MM_HINT_T0);
                add_pairs(sum, _mm512_loadu_si512(row + i), _mm512_loadu_si512(x + i));
            }
            if (rest) add_pairs(sum, _mm512_maskz_loadu_epi16(rest, row + whole), _mm512_maskz_loadu_epi16(rest, x + whole));
            sums[j] = sum;
        }
        _mm512_mask_storeu_ps(y + n, __mmask16((1u << present) - 1), sums_of(sums));
    }
}

inline void multiply(const uint16_t* weights, int64_t count, int64_t k, const uint16_t* x, int rows, float* y, int64_t stride, const uint16_t* ahead) {
    if (rows == 1 && k <= SHORT_ROW) return multiply_in_order(weights, count, k, x, y);
    const int together = rows_together(rows);
    if (rows > 1) x = side_by_side(x, rows, k);
    const int64_t most = BLOCK_BYTES / 2 / rows, blocks = 2 * k * rows <= WHOLE_BYTES ? 1 : (k + most - 1) / most, unit = together * LINE;
    const int64_t step = (k + unit * blocks - 1) / (unit * blocks) * unit;
    alignas(64) __m512 waiting[STRIP * MAX_ROWS];
    for (int64_t strip = 0; strip < count; strip += STRIP) {
        const int64_t end = std::min(count, strip + STRIP);
        for (int64_t begin = 0; begin < k; begin += step) {
            const int64_t numbers = std::min(step, k - begin);
            const Block block{numbers / LINE * LINE, (1u << numbers % LINE) - 1, begin == 0, begin + numbers == k};
            __m512* waits = waiting;
            for (int64_t n = strip; n < end; n += together, waits += together * rows) {
                const uint16_t* next = n + together < end ? weights + (n + together) * k + begin : !block.last ? weights + strip * k + begin + step : end < count ? weights + end * k : ahead;
                of_rows[rows](weights + n * k + begin, k, x + begin * rows, block, next, {waits, y + n, stride, int(std::min<int64_t>(together, end - n))});
            }
        }
    }
}

}  // namespace bf16_product

inline void multiply_bf16_avx512(const uint8_t* weights, int64_t count, int64_t k, const void* x, bool bf16, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    if (!bf16) return multiply_bf16(weights, count, k, x, bf16, rows, y, stride, ahead);
    bf16_product::multiply(reinterpret_cast<const uint16_t*>(weights), count, k, static_cast<const uint16_t*>(x), rows, y, stride, reinterpret_cast<const uint16_t*>(ahead));
}
