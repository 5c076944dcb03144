// Products with weights.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "avx512.h"
namespace kvshare::avx512 {
namespace {
#include "floats.h"
#include "interleave.h"
#include "blocks.h"
#include "encode_blocks.h"
#include "vectors_avx512.h"
#include "product.h"
#include "strips_avx512.h"
#include "product_avx512.h"
#include "bf16_product_avx512.h"
#include "blocks_avx512.h"
#include "decode_avx512.h"
#include "read_memory.h"

void multiply_either(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    if (x.bytes == 1) multiply_bytes(weights, k, x, rows, y, stride, ahead);
    else multiply_avx512<2>(weights, k, x, rows, y, stride, ahead);
}
}  // namespace
const ProductKernels products = {round_avx512, multiply_either, arrange_avx512, multiply_bf16_avx512, decode_avx512, encode_row};
uint64_t read(const uint8_t* from, int64_t bytes, int streams, int64_t run, int64_t ahead) { return read_memory(from, bytes, streams, run, ahead); }
}  // namespace kvshare::avx512
