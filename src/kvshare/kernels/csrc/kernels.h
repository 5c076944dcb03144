// What every instruction set provides: one table of functions, filled once per set by isa_NAME.cpp and chosen at run time.
#pragma once
#include <cstdint>

#include "row_form.h"
#include "run.h"
#include "tile.h"
#include "small_ops_tasks.h"

namespace kvshare {

// How the rows of a weight are spelled: the block formats of GGUF, and plain bfloat16.
enum class BlockType : int { BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

struct BlockShape {
    int64_t weights;  // numbers in a block
    int64_t bytes;
};

constexpr BlockShape shape_of(BlockType type) {
    switch (type) {
        case BlockType::BF16: return {1, 2};
        case BlockType::Q4_0: return {32, 18};
        case BlockType::Q4_1: return {32, 20};
        case BlockType::Q5_0: return {32, 22};
        case BlockType::Q5_1: return {32, 24};
        case BlockType::Q8_0: return {32, 34};
        case BlockType::Q4_K: return {256, 144};
        case BlockType::Q5_K: return {256, 176};
        case BlockType::Q6_K: return {256, 210};
    }
    return {0, 0};
}

// Rows of weights of one format: `count` rows behind `data`, as in the file; or interleaved (interleave.h), where `data` is the beginning of a strip and
// the first `skip` rows of that strip do not count.
struct WeightRows {
    BlockType type;
    bool interleaved;
    const uint8_t* data;
    int64_t skip, count;
};

// Rows of activations as signed integers of one or two bytes with a scale for every 32: x = scale * q, |q| <= largest(). Their length is a multiple of
// 32. Groups of 32 of all rows lie beside one another, so that a product of several rows finds them behind a single address.
struct Activations {
    int8_t* q;       // [k / 32, rows, 32] (AVX512 keeps two bytes of each 32 apart: 32 upper ones u, then 32 lower ones l, both signed, q = 256 u + l)
    float* scale;    // [k / 32, rows]
    float* sum;      // [k / 32, rows] scale times the sum of 32 q: what a minimum of the weights is multiplied by
    int32_t* sum32;  // [k / 32, rows] the sum of 32 q: what an offset of the weights is multiplied by
    int32_t* sum16;  // [k / 32, rows, 2] the same for 16
    int64_t rows;
    int bytes;  // of a number

    float largest() const { return bytes == 2 ? 127 * 256 + 127 : 127; }
    Activations from(int64_t row, int64_t group = 0) const {  // the same rows without those before `row`, and without the groups before `group`
        const int64_t at = group * rows + row;
        return {q + 32 * bytes * at, scale + at, sum + at, sum32 + at, sum16 + 2 * at, rows, bytes};
    }
};

constexpr float SMALLEST = 1e-30f;  // 32 numbers below count as zeros: their scale could not be divided by
constexpr int64_t MAX_ROWS = 8;     // rows of activations that one call multiplies
constexpr int64_t LONG_ROW = 4096;  // numbers: so long rows of BF16 weights are multiplied with twice as many
constexpr int64_t ATTEND_ROWS = 32;  // rows of the cache that one call attends to

// The queries of one sequence and what has been summed up for them so far.
struct AttendState {
    const uint8_t* q;  // [kv_heads, group * query_bytes] as `spell` wrote them for `keys`
    float* maximum;  // [kv_heads * group] of the scores
    float* weight;   // [kv_heads * group] sum of exp(score - maximum)
    float* out;      // [kv_heads * group, value_width] sum of exp(score - maximum) * value
    RowKind keys, values;
    int kv_heads, group, key_width, value_width;
    int64_t query_bytes;
    float scale, softcap;  // softcap 0: none
};

// What `count` parts of the rows gave, `stride` numbers apart: sums [heads, width] as AttendState's `out`, then their maxima and weights, [heads] each.
struct AttendedParts {
    const float* sums;
    int64_t count, stride;
};

// Addresses [ATTEND_ROWS] of up to ATTEND_ROWS rows [kv_heads, width]; entries behind `count` repeat the last row.
struct AttendRows {
    const uint8_t *const *k, *const *v;
    int count;
    Run ahead[2 * ATTEND_ROWS];  // what will be read after the keys, or after these rows: to be asked for meanwhile
    int runs;
};

// Bytes that one head of a query may take, whatever the keys: four a number, padded to whole pieces, and scalars for each group.
constexpr int64_t query_bytes(int width) { return int64_t(width + 63) / 64 * 64 * 4 + (groups_of(width) * 8 + 63) / 64 * 64 + 64; }

// Products with weights: quantized_weight.cpp.
struct ProductKernels {
    // Fill numbers [begin, end) of the first row, multiples of 32; x is float32, or bfloat16 where `bf16`.
    void (*round)(const void* x, bool bf16, int64_t begin, int64_t end, const Activations& to);
    // y[r * stride + n] = weights[n] . x[r] for rows of weights of k numbers, in any format but BF16, and the first `rows` <= MAX_ROWS rows
    // of activations. `ahead`: what will be read next. A result depends on its row of weights and its row of activations alone.
    void (*multiply)(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead);
    // Rows of activations as multiply_bf16 wants them, `together` rows a call: x itself, or memory of this thread until its next call. Those of a call
    // begin behind the rows before, of `*padded` numbers each.
    const void* (*arrange)(const void* x, bool bf16, int64_t rows, int64_t k, int64_t together, int64_t* padded);
    // `multiply` for BF16 weights and arranged activations as they are; `rows` <= MAX_ROWS, or twice as many where k is at least LONG_ROW.
    void (*multiply_bf16)(const uint8_t* weights, int64_t count, int64_t k, const void* x, bool bf16, int rows, float* y, int64_t stride, const uint8_t* ahead);
    // Rows of weights as numbers: to[count, k], bfloat16 or float32.
    void (*decode)(const WeightRows& weights, int64_t k, void* to, bool bf16);
    // One row of k numbers, bfloat16 or float32, as blocks: Q8_0, Q4_1 or Q4_K.
    void (*encode)(BlockType type, const void* numbers, bool bf16, int64_t k, uint8_t* to);
};

// Rows of the cache, one by one.
struct RowKernels {
    // Heads of cached rows as numbers: to[r * stride + i] is number i < width of the head at heads[r], bfloat16 or float32; rotated ones stay rotated.
    void (*decode_heads)(RowKind kind, int width, const uint8_t* const* heads, int count, void* to, int64_t stride, bool bf16);
    // One head, rotated and balanced already, as the bytes of a row; kinds with levels are given it divided by `unit`, its largest number.
    void (*encode_head)(RowKind kind, int width, const float* x, float unit, uint8_t* to);
    // One head of a key from the value of the same row, which stands at `position`; `rotated` is its rotated part, or null.
    void (*rebuild_key)(const KeyRebuild& rebuild, int width, int64_t position, const uint16_t* v, const uint16_t* rotated, uint16_t* k);
    // The normalised Walsh-Hadamard transform of x[size], in place; `size` is a power of two.
    void (*hadamard)(float* x, int size);
};

// Attention of one query a sequence: paged_attention.cpp.
struct AttentionKernels {
    // Head number `head` of the `group` that share a KV head as this set wants them for keys of some kind: to[group * query_bytes(width)], at a
    // multiple of 64, holds all of the group and is this head's only in part.
    void (*spell)(RowKind keys, int width, int group, int head, const float* q, uint8_t* to);
    void (*attend)(const AttendRows& rows, const AttendState& state);
    // After the last rows: `out`, which `attend` may keep in an order of its own, as columns in order.
    void (*settle)(const AttendState& state);
    // to[width]: what all parts give for head number `head` of `heads`, a softmax's output. `sink`: a score without a value, or null.
    void (*merge)(const AttendedParts& parts, int heads, int head, int width, const float* sink, float* to);
};

struct Isa {
    const char* name;
    const ProductKernels& products;
    const RowKernels& rows;
    const AttentionKernels& attention;
    const TileKernel& tile;
    const SmallOps& small;
    // scores[i] of TILE_ROWS rows of bfloat16: the sum over an indexer's heads of weight * max(0, q . row).
    void (*score_rows)(const uint8_t* const* rows, const IndexQuery& query, float* scores);
    // What bandwidth is measured with: the sum of words, read in blocks of `streams` runs of `run` bytes side by side.
    uint64_t (*read_memory)(const uint8_t* from, int64_t bytes, int streams, int64_t run, int64_t ahead);
};

// The sets that this build knows, best first; dispatch.cpp asks the processor.
extern const Isa isa_plain;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avx512, isa_amx;
#endif
const Isa* isa_named(const char* name);  // nullptr: unknown, or this processor lacks it
const Isa* best_isa();
const Isa& active_isa();  // that Python chose with `use_isa`; the best one before
bool use_isa(const char* name);

}  // namespace kvshare
