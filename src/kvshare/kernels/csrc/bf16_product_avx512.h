// Products of bfloat16 weights with few rows of activations for AVX512-BF16; both are read as they are. One row of activations meets rows of weights one
// by one, long ones by fours. More rows meet one row of weights or two at a time, whose lines stay in registers meanwhile. Activations are taken a block
// of numbers at a time that stays in the first-level cache while rows of weights go by; what is summed up so far waits in memory for the next block. A
// sum goes through its row from the front whatever the blocks are: a result does not depend on them, and so not on the rows beside it.
// Included once by avx512_products.cpp inside its namespace.
#pragma once

namespace bf16_product {

constexpr int SUMS = 16;                   // that are folded into numbers at once
constexpr int64_t BLOCK_BYTES = 16 << 10;  // of activations: they, what waits and the weights to come fit the first-level cache
constexpr int64_t WHOLE_BYTES = 24 << 10;  // up to so many are better off in one block: each row of weights is read in one go
constexpr int64_t WAITING = 256;           // sums that wait for the next block at the same time
constexpr int64_t LINE = 32;               // numbers in a cache line, and in a register
constexpr int64_t SHORT_ROW = 4096;        // numbers: one row of activations meets so short rows of weights one by one, longer ones by fours
constexpr int64_t IN_ORDER_AHEAD = 4096;   // numbers that are asked for before their turn where rows go one by one
constexpr int64_t LINES_AHEAD = 144;       // the same in lines where there are more rows of activations
constexpr int64_t LONG_CHUNK = 64;         // lines of a row in a block: shorter ones are asked for again one row behind,
constexpr int64_t LINES_AGAIN = 16;        // longer ones so many lines behind

constexpr int rows_together(int rows) { return rows == 1 ? 4 : rows > 4 ? 2 : 1; }  // of weights, for so many of activations

// Asks for lines of weights in the order in which blocks of columns go through strips of rows, from one piece of a matrix into the next. A core drops
// what is asked for while it waits for as many lines as it can, so each is asked for again a little later.
class ChunksAhead {
  public:
    ChunksAhead(const uint16_t* weights, int64_t count, int64_t k, int64_t strip, int64_t step, const uint16_t* next)
        : again(step <= LONG_CHUNK * LINE ? k : LINES_AGAIN * LINE), weights_(weights), next_(next), count_(count), k_(k), strip_(strip), step_(step) {
        go();
        for (int64_t left = LINES_AHEAD * LINE; left > 0; turn()) {
            const int64_t numbers = end - at;
            if (numbers > left) {
                at += left;
                break;
            }
            left -= numbers;
        }
    }
    [[gnu::noinline]] void turn() {  // to the next row, block or strip
        if (++row_ == std::min(first_ + strip_, count_)) {
            if ((begin_ += step_) >= k_) {
                begin_ = 0;
                if ((first_ += strip_) >= count_) weights_ = next_, first_ = 0, count_ = INT64_MAX;
            }
            row_ = first_;
        }
        go();
    }

    const int64_t again;       // numbers behind `at` that are asked for again
    const uint16_t *at, *end;  // of the chunk that is asked for

  private:
    void go() {
        at = weights_ + row_ * k_ + begin_;
        end = at + std::min(step_, k_ - begin_);
    }
    const uint16_t *weights_, *next_;
    int64_t count_, k_, strip_, step_, first_ = 0, row_ = 0, begin_ = 0;
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

// Rows of activations in groups of `together`, each line by line beside one another: [lines, rows, 32], zeros behind their end. Where their length is a
// multiple of 4 KB, all of them and the rows of weights would fight for the same places of the first-level cache.
inline const uint16_t* side_by_side(const uint16_t* x, int64_t rows, int64_t k, int64_t together) {
    static thread_local Scratch scratch;
    const int64_t lines = (k + LINE - 1) / LINE;
    uint8_t* memory = scratch.room((lines * rows + 1) * 64);
    uint16_t* const begin = reinterpret_cast<uint16_t*>(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64);
    for (int64_t first = 0; first < rows; first += together) {
        const int64_t count = std::min(together, rows - first);
        uint16_t* to = begin + first * lines * LINE;
        for (int64_t r = 0; r < count; r++)
            for (int64_t line = 0; line < lines; line++) {
                const __mmask32 present = k - line * LINE < LINE ? (1u << k % LINE) - 1 : ~0u;
                _mm512_store_si512(to + (line * count + r) * LINE, _mm512_maskz_loadu_epi16(present, x + (first + r) * k + line * LINE));
            }
    }
    return begin;
}

// Rows of weights with a block of activations: x [lines of the block, stride, 32], of which Rows are taken. 
// Meanwhile so many lines of the chunks ahead are asked for with each line of a row.
template <int Rows, int Together, int Asks>
[[gnu::always_inline]] inline void multiply_tile(const uint16_t* const* w, const uint16_t* x, int64_t stride, const Block& block, ChunksAhead* ahead, const Sums& to) {
    __m512 sums[Together * Rows];
    each<Together * Rows>([&](auto i) __attribute__((always_inline)) { sums[i] = block.first ? _mm512_setzero_ps() : to.waiting[i]; });
    const auto add = [&](auto load, int64_t i) __attribute__((always_inline)) {
        __m512i row[Together];
        each<Together>([&](auto j) __attribute__((always_inline)) { row[j] = load(w[j] + i); });
        each<Rows>([&](auto r) __attribute__((always_inline)) {
            const __m512i numbers = load(x + r * LINE);
            each<Together>([&](auto j) __attribute__((always_inline)) { add_pairs(sums[r * Together + j], row[j], numbers); });
        });
        x += stride * LINE;
    };
    const uint16_t *at = nullptr, *end = nullptr;
    int64_t again = 0;
    if constexpr (Asks) at = ahead->at, end = ahead->end, again = ahead->again;
    for (int64_t i = 0; i < block.whole; i += LINE) {
        each<Asks>([&](auto) __attribute__((always_inline)) {
            _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(at - again), _MM_HINT_T0);
            if ((at += LINE) >= end) [[unlikely]] {
                ahead->turn();
                at = ahead->at, end = ahead->end;
            }
        });
        add([](const uint16_t* p) __attribute__((always_inline)) { return _mm512_loadu_si512(p); }, i);
    }
    if constexpr (Asks) ahead->at = at;
    if (block.rest) add([&](const uint16_t* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_epi16(block.rest, p); }, block.whole);
    if (!block.last) {
        each<Together * Rows>([&](auto i) __attribute__((always_inline)) { to.waiting[i] = sums[i]; });
        return;
    }
    __m512 all[SUMS];  // a copy: an array that loops index would keep the sums in memory all the time
    each<SUMS>([&](auto i) __attribute__((always_inline)) { all[i] = i < Together * Rows ? sums[i < Together * Rows ? int(i) : 0] : _mm512_setzero_ps(); });
    const __m512 totals = sums_of(all);
    const uint32_t present = (1u << to.count) - 1;
    each<Rows>([&](auto r) { _mm512_mask_storeu_ps(to.y + r * to.stride - r * Together, __mmask16(present << (r * Together)), totals); });
}

// The same for all rows of activations, First of them and then Second, for which the lines lie in the first-level cache.
template <int First, int Second>
void multiply_tiles(const uint16_t* weights, int64_t k, const uint16_t* x, const Block& block, ChunksAhead* ahead, const Sums& to) {
    constexpr int together = rows_together(First + Second), rows = First + Second;
    constexpr int asks = First == 1 ? 0 : Second ? together / 2 : together;  // the processor foresees few long streams by itself, and reads faster when it is not asked
    const uint16_t* w[together];
    each<together>([&](auto j) __attribute__((always_inline)) { w[j] = weights + (j < to.count ? int(j) : to.count - 1) * k; });
    multiply_tile<First, together, asks>(w, x, rows, block, ahead, to);
    if constexpr (Second)
        multiply_tile<Second, together, asks>(w, x + First * LINE, rows, block, ahead, {to.waiting + together * First, to.y + First * to.stride, to.stride, to.count});
}

constexpr decltype(&multiply_tiles<1, 0>) of_rows[] = {nullptr,
                                                       multiply_tiles<1, 0>,
                                                       multiply_tiles<2, 0>,
                                                       multiply_tiles<3, 0>,
                                                       multiply_tiles<4, 0>,
                                                       multiply_tiles<5, 0>,
                                                       multiply_tiles<6, 0>,
                                                       multiply_tiles<7, 0>,
                                                       multiply_tiles<8, 0>,
                                                       multiply_tiles<5, 4>,
                                                       multiply_tiles<5, 5>,
                                                       multiply_tiles<6, 5>,
                                                       multiply_tiles<6, 6>,
                                                       multiply_tiles<7, 6>,
                                                       multiply_tiles<7, 7>,
                                                       multiply_tiles<8, 7>,
                                                       multiply_tiles<8, 8>};

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
    const int64_t together = rows_together(rows), strip = WAITING / (rows > MAX_ROWS ? 2 * MAX_ROWS : MAX_ROWS);
    const int64_t most = BLOCK_BYTES / 2 / rows, blocks = 2 * k * rows <= WHOLE_BYTES ? 1 : (k + most - 1) / most;
    const int64_t step = (k + LINE * blocks - 1) / (LINE * blocks) * LINE;
    ChunksAhead lines(weights, count, k, strip, step, ahead);
    alignas(64) __m512 waiting[WAITING];
    for (int64_t first = 0; first < count; first += strip) {
        const int64_t end = std::min(count, first + strip);
        for (int64_t begin = 0; begin < k; begin += step) {
            const int64_t numbers = std::min(step, k - begin);
            const Block block{numbers / LINE * LINE, (1u << numbers % LINE) - 1, begin == 0, begin + numbers == k};
            for (int64_t n = first; n < end; n += together)
                of_rows[rows](weights + n * k + begin, k, x + begin * rows, block, &lines, {waiting + (n - first) * rows, y + n, stride, int(std::min(together, end - n))});
        }
    }
}

}  // namespace bf16_product

inline const void* arrange_avx512(const void* x, bool bf16, int64_t rows, int64_t k, int64_t together, int64_t* padded) {
    if (!bf16 || rows == 1) return as_they_are(x, bf16, rows, k, together, padded);
    *padded = (k + bf16_product::LINE - 1) / bf16_product::LINE * bf16_product::LINE;
    return bf16_product::side_by_side(static_cast<const uint16_t*>(x), rows, k, together);
}

inline void multiply_bf16_avx512(const uint8_t* weights, int64_t count, int64_t k, const void* x, bool bf16, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    if (!bf16) return multiply_bf16(weights, count, k, x, bf16, rows, y, stride, ahead);
    bf16_product::multiply(reinterpret_cast<const uint16_t*>(weights), count, k, static_cast<const uint16_t*>(x), rows, y, stride, reinterpret_cast<const uint16_t*>(ahead));
}
