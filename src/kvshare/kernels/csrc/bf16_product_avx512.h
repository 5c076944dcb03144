// Products of bfloat16 weights with few rows of activations for AVX512-BF16; both are read as they are. Sixteen sums at a time, each a whole register:
// of four rows of weights and up to four of activations. Activations are taken a block of numbers at a time that stays in the first-level cache
// while rows of weights go by; what is summed up so far waits in memory for the next block, so that a result does not depend on the blocks,
// and with them on the rows beside it. Included once by the AVX512 files inside their namespace.
#pragma once

namespace bf16_product {

constexpr int TOGETHER = 4;                // rows of weights in a tile, and of activations at most
constexpr int64_t BLOCK_BYTES = 24 << 10;  // of activations: with the weights of two tiles they fit the first-level cache
constexpr int64_t STRIP = 32;              // rows of weights whose sums wait at the same time
constexpr int64_t LINE = 32;               // numbers in a cache line, and in a register

// Asks for the rows of weights that come next: one row behind another, as they lie in memory, where that is what limits; where each is used
// twice, Rows of them side by side, each line as long before it is used as any other.
template <int Rows>
class RowsAhead;

template <>
class RowsAhead<TOGETHER> {
  public:
    RowsAhead(const uint16_t* at, int64_t k, int64_t numbers) : at_(at), end_(at + numbers), skip_(k - numbers), k_(k) {}
    [[gnu::always_inline]] void ask() {
        each<TOGETHER>([&](auto i) __attribute__((always_inline)) { _mm_prefetch(reinterpret_cast<const char*>(at_ + i * LINE), _MM_HINT_T0); });
        if ((at_ += TOGETHER * LINE) >= end_) at_ += skip_, end_ += k_;
    }

  private:
    const uint16_t *at_, *end_;
    int64_t skip_, k_;
};

template <int Rows>
class RowsAhead {
  public:
    RowsAhead(const uint16_t* at, int64_t k, int64_t) : at_(at), k_(k) {}
    [[gnu::always_inline]] void ask() {
        each<Rows>([&](auto i) __attribute__((always_inline)) { _mm_prefetch(reinterpret_cast<const char*>(at_ + i * k_), _MM_HINT_T0); });
        at_ += LINE;
    }

  private:
    const uint16_t* at_;
    int64_t k_;
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

// One tile and one block. Meanwhile `ahead`, rows of the next tile, is asked for: all of it, or Asked of its rows.
template <int Rows, int Asked>
void multiply_tile(const uint16_t* weights, int64_t k, const uint16_t* x, const Block& block, const uint16_t* ahead, const Sums& to) {
    const uint16_t* w[TOGETHER];
    each<TOGETHER>([&](auto j) __attribute__((always_inline)) { w[j] = weights + (j < to.count ? int(j) : to.count - 1) * k; });
    __m512 sums[TOGETHER * Rows];
    each<TOGETHER * Rows>([&](auto i) __attribute__((always_inline)) { sums[i] = block.first ? _mm512_setzero_ps() : to.waiting[i]; });
    const auto add = [&](auto load, int64_t i) __attribute__((always_inline)) {
        __m512i row[TOGETHER];
        each<TOGETHER>([&](auto j) __attribute__((always_inline)) { row[j] = load(w[j] + i); });
        each<Rows>([&](auto r) __attribute__((always_inline)) {
            const __m512i numbers = load(x + r * k + i);
            each<TOGETHER>([&](auto j) __attribute__((always_inline)) { add_pairs(sums[r * TOGETHER + j], row[j], numbers); });
        });
    };
    RowsAhead<Asked> lines(ahead, k, block.whole);
    for (int64_t i = 0; i < block.whole; i += LINE) {
        lines.ask();
        add([](const uint16_t* p) __attribute__((always_inline)) { return _mm512_loadu_si512(p); }, i);
    }
    if (block.rest) add([&](const uint16_t* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_epi16(block.rest, p); }, block.whole);
    if (!block.last) {
        each<TOGETHER * Rows>([&](auto i) __attribute__((always_inline)) { to.waiting[i] = sums[i]; });
        return;
    }
    __m512 all[16];  // a copy: an array that loops index would keep the sums in memory all the time
    each<16>([&](auto i) __attribute__((always_inline)) { all[i] = i < TOGETHER * Rows ? sums[i < TOGETHER * Rows ? int(i) : 0] : _mm512_setzero_ps(); });
    const __m512 totals = sums_of(all);
    const uint32_t present = (1u << to.count) - 1;
    each<Rows>([&](auto r) { _mm512_mask_storeu_ps(to.y + r * to.stride - r * TOGETHER, __mmask16(present << (r * TOGETHER)), totals); });
}

template <int Asked>
constexpr decltype(&multiply_tile<1, Asked>) of_rows[] = {nullptr, multiply_tile<1, Asked>, multiply_tile<2, Asked>, multiply_tile<3, Asked>, multiply_tile<4, Asked>};

inline void multiply(const uint16_t* weights, int64_t count, int64_t k, const uint16_t* x, int rows, float* y, int64_t stride, const uint16_t* ahead) {
    const bool twice = rows > TOGETHER;
    const int first = twice ? (rows + 1) / 2 : rows;
    const auto multiply_first = twice ? of_rows<TOGETHER / 2>[first] : of_rows<TOGETHER>[first], multiply_others = of_rows<TOGETHER / 2>[rows - first];
    const int64_t most = BLOCK_BYTES / 2 / rows, blocks = (k + most - 1) / most, unit = TOGETHER * LINE, step = (k + unit * blocks - 1) / (unit * blocks) * unit;
    alignas(64) __m512 waiting[STRIP * MAX_ROWS];
    for (int64_t strip = 0; strip < count; strip += STRIP) {
        const int64_t end = std::min(count, strip + STRIP);
        for (int64_t begin = 0; begin < k; begin += step) {
            const int64_t numbers = std::min(step, k - begin);
            const Block block{numbers / LINE * LINE, (1u << numbers % LINE) - 1, begin == 0, begin + numbers == k};
            __m512* waits = waiting;
            for (int64_t n = strip; n < end; n += TOGETHER, waits += TOGETHER * rows) {
                const uint16_t* next = n + TOGETHER < end ? weights + (n + TOGETHER) * k + begin : !block.last ? weights + strip * k + begin + step : end < count ? weights + end * k : ahead;
                const uint16_t* here = weights + n * k + begin;
                const int present = int(std::min<int64_t>(TOGETHER, end - n));
                multiply_first(here, k, x + begin, block, next, {waits, y + n, stride, present});
                if (twice) multiply_others(here, k, x + first * k + begin, block, next + TOGETHER / 2 * k, {waits + TOGETHER * first, y + first * stride + n, stride, present});
            }
        }
    }
}

}  // namespace bf16_product

inline void multiply_bf16_avx512(const uint8_t* weights, int64_t count, int64_t k, const void* x, bool bf16, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    if (!bf16) return multiply_bf16(weights, count, k, x, bf16, rows, y, stride, ahead);
    bf16_product::multiply(reinterpret_cast<const uint16_t*>(weights), count, k, static_cast<const uint16_t*>(x), rows, y, stride, reinterpret_cast<const uint16_t*>(ahead));
}
