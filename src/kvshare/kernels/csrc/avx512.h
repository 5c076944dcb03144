// The parts of the AVX512 set (with VNNI, VBMI and BF16: Zen 4, Sapphire Rapids and later), each compiled from a file of its own, avx512_*.cpp.
#pragma once
#include "kernels.h"

namespace kvshare::avx512 {

extern const ProductKernels products;
extern const RowKernels rows;
extern const AttentionKernels attention;
extern const TileKernel tile;
extern const SmallOps small;
// The product with blocks where activations have one byte a number.
void multiply_bytes(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead);
void score_rows(const uint8_t* const* rows, const IndexQuery& query, float* scores);
uint64_t read(const uint8_t* from, int64_t bytes, int streams, int64_t run, int64_t ahead);

}  // namespace kvshare::avx512
