// Attention of many queries with AMX: scores are tiles of (rows of K) x (Q transposed), results tiles of (V transposed) x (weights transposed), and what lies
// between them is AVX512's. On a processor without AMX this runs in an emulator (tests/kernels/amx_emulator.c); it was never timed.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "amx.h"
namespace kvshare::amx {
namespace {
#include "lanes_avx512.h"
#include "tile_softmax.h"
#include "products_amx.h"

constexpr int BLOCKS = TILE_ROWS / LANES;     // of 16 rows of K
constexpr int STEPS = TILE_PAIRS / STEP;      // of 16 pairs of rows of V
constexpr int TILE_WORDS = STEP * LANES;
constexpr int SLACK = 8;  // sums in float32 have room for weights up to 2^8

inline __mmask16 lanes_below(int64_t count) { return count >= LANES ? __mmask16(-1) : __mmask16((1u << count) - 1); }

// Sixteen rows' pairs `begin ... begin + pairs`: where they lie, if they lie evenly, otherwise (page borders, rows that an indexer selected, ends of rows that
// do not fill a tile) in `copy` [16, PAIRS_AT_ONCE], filled up with zeros.
inline TileOperand rows_of(const uint8_t* const* rows, int64_t begin, int64_t pairs, uint32_t* copy) {
    const int64_t row_bytes = rows[1] - rows[0];
    bool even = pairs % STEP == 0;
    for (int r = 2; r < LANES; r++) even &= rows[r] - rows[r - 1] == row_bytes;
    if (even) return {rows[0] + 4 * begin, row_bytes, STEP * 4};
    for (int r = 0; r < LANES; r++)
        for (int64_t i = 0; i < pairs; i += STEP)
            store(copy + r * PAIRS_AT_ONCE + i, _mm512_maskz_loadu_epi32(lanes_below(pairs - i), rows[r] + 4 * (begin + i)));
    return {reinterpret_cast<const uint8_t*>(copy), PAIRS_AT_ONCE * 4, STEP * 4};
}

// scores [16 * (end - first), to_stride] of blocks `first ... end` of 16 rows; rows of the next tile (null: none) are asked for meanwhile.
inline void score_blocks(const uint8_t* const* rows, const Tile* next, int first, int end, const uint32_t* queries, int64_t pairs, int vectors, int stride, float* scores,
                         int to_stride) {
    alignas(64) uint32_t copies[MOST_TOGETHER][LANES * PAIRS_AT_ONCE], tail[STEP * MOST_VECTORS * LANES];
    const int together = tiles_together(vectors);
    for (int64_t begin = 0, count; begin < pairs; begin += count) {
        const int64_t rest = pairs - begin;
        count = std::min(rest < STEP ? rest : rest / STEP * STEP, PAIRS_AT_ONCE);
        const uint32_t* b = queries + begin * stride;
        int b_stride = stride;
        if (count < STEP) {
            b_stride = vectors * LANES;
            memset(tail, 0, sizeof tail);
            for (int64_t i = 0; i < count; i++) memcpy(tail + i * b_stride, b + i * stride, size_t(b_stride) * 4);
            b = tail;
        }
        for (int block = first; block < end; block += together) {
            const int blocks = std::min(together, end - block);
            TileOperand a[MOST_TOGETHER];
            for (int i = 0; i < blocks; i++) a[i] = rows_of(rows + (block + i) * LANES, begin, count, copies[i]);
            const auto ask = [&](int vector, int step) {  // the keys beside the first products with these rows, the values beside the second ones
                if (!next || vector > 2) return;
                const int64_t at = (begin + step * STEP) * 4;
                for (int r = block * LANES; r < (block + blocks) * LANES; r++) {
                    if (vector == 0) __builtin_prefetch(next->k[r] + at, 0, 2);
                    if (vector == 2 || vectors <= 2) __builtin_prefetch(next->v[r] + at, 0, 2);
                }
            };
            multiply_rows_of_tiles(a, blocks, b, b_stride, vectors, int((count + STEP - 1) / STEP), begin > 0, scores + block * LANES * to_stride, to_stride, ask);
        }
    }
}

// What was summed up before, where a maximum has grown.
inline void shrink_sums(const TileQueries& queries, const float* shrink) {
    const int stride = queries.vectors * LANES;
    for (int lane = 0; lane < stride; lane += LANES) {
        const Lanes less = load<Lanes>(shrink + lane);
        if (_mm512_cmp_ps_mask((__m512)less, _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) continue;
        for (float* at = queries.out + lane; at < queries.out + int64_t(queries.value_width) * stride; at += stride) store(at, load<Lanes>(at) * less);
    }
}

// out [columns, lanes] += values x weights, over steps `first ... end` of 16 pairs of rows.
inline void sum_blocks(const Tile& tile, int first, int end, const TileQueries& queries, const int32_t* weights) {
    const int stride = queries.vectors * LANES, columns = (queries.value_width + LANES - 1) / LANES, together = tiles_together(queries.vectors);
    for (int column = 0; column < columns; column += together) {
        const int count = std::min(together, columns - column);
        TileOperand a[MOST_TOGETHER];
        for (int i = 0; i < count; i++) a[i] = {reinterpret_cast<const uint8_t*>(tile.values + ((column + i) * STEPS + first) * TILE_WORDS), STEP * 4, TILE_WORDS * 4};
        multiply_rows_of_tiles(a, count, reinterpret_cast<const uint32_t*>(weights) + first * STEP * stride, stride, queries.vectors, end - first, true,
                               queries.out + int64_t(column) * LANES * stride, stride, [](int, int) {});
    }
}

void attend_tile(const Tile& tile, int begin, int end, bool masked, const TileQueries& queries) {
    alignas(64) float scores[TILE_ROWS * MOST_VECTORS * LANES], shrink[MOST_VECTORS * LANES];
    alignas(64) int32_t weights[TILE_PAIRS * MOST_VECTORS * LANES];
    const int stride = queries.vectors * LANES, first_step = begin / 2 / STEP, end_step = ((end + 1) / 2 + STEP - 1) / STEP;
    const Tiles tiles;
    score_blocks(tile.k, tile.next, begin / LANES, (end + LANES - 1) / LANES, queries.packed, queries.key_width / 2, queries.vectors, stride, scores, stride);
    for (int vector = 0; vector < queries.vectors; vector++)
        (masked ? weigh<true, SLACK> : weigh<false, SLACK>)(scores, begin, end, tile.first, queries, vector, weights, shrink);
    std::fill(weights + first_step * STEP * stride, weights + begin / 2 * stride, 0);
    std::fill(weights + (end + 1) / 2 * stride, weights + end_step * STEP * stride, 0);
    shrink_sums(queries, shrink);
    sum_blocks(tile, first_step, end_step, queries, weights);
}

// V transposed, tile by tile: [columns / 16, STEPS, 16 columns, 16 pairs of rows], zeros for rows and columns that there are not.
void pack_values(const Tile& tile, int begin, int end, int value_width) {
    const __m512i paired = _mm512_load_si512(PAIRED);
    for (int step = begin / 2 / STEP; step * STEP < (end + 1) / 2; step++)
        for (int c = 0; c < value_width; c += LANES) {
            const __mmask16 real = lanes_below(value_width - c);
            Words block[16] = {};
            for (int pair = std::max(begin / 2, step * STEP); pair < std::min((end + 1) / 2, (step + 1) * STEP); pair++) {
                const auto row = [&](int t) { return _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(real, reinterpret_cast<const uint16_t*>(tile.v[t]) + c)); };
                block[pair - step * STEP] = (Words)_mm512_permutex2var_epi16(row(2 * pair), paired, row(2 * pair + 1));
            }
            transpose(block);
            uint32_t* to = tile.values + (c / LANES * STEPS + step) * TILE_WORDS;
            for (int i = 0; i < LANES; i++) store(to + i * STEP, block[i]);
        }
}

// products [count, MOST_VECTORS * LANES] of rows and queries, for any number of rows that is divisible by 16.
inline void multiply_rows(const uint8_t* const* rows, int count, const uint32_t* queries, int pairs, int vectors, int stride, float* products) {
    score_blocks(rows, nullptr, 0, count / LANES, queries, pairs, vectors, stride, products, MOST_VECTORS * LANES);
}

#include "index_kernel.h"
}  // namespace

const TileKernel tile = {pack_pairs, pack_queries, pack_values, attend_tile, merge_tiles, write_results};

void score_rows(const uint8_t* const* rows, const IndexQuery& query, float* scores) {
    const Tiles tiles;
    score_rows_by_heads(rows, query, scores);
}
}  // namespace kvshare::amx
