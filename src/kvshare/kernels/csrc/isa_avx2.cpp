// The plain kernels compiled for AVX2, FMA and F16C.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
namespace kvshare {
namespace avx2 {
#include "floats.h"
#include "interleave.h"
#include "blocks.h"
#include "encode_blocks.h"
#include "product.h"
#include "small_floats.h"
#include "block_row.h"
#include "row_decode.h"
#include "row_encode.h"
#include "hadamard.h"
#include "attention.h"
#include "lanes_plain.h"
#include "tile_softmax.h"
#include "tile_kernel.h"
#include "index_kernel.h"
#include "key_rebuild.h"
#include "read_memory.h"
#include "small_ops.h"
const ProductKernels products = {round_row, multiply_rows, as_they_are, multiply_bf16, decode_rows, encode_row};
const RowKernels rows = {decode_heads, encode_head, rebuild_key, hadamard};
const AttentionKernels attention = {spell_plain, attend_plain, settle_plain, merge_parts};
}  // namespace avx2
const Isa isa_avx2 = {"avx2", avx2::products, avx2::rows, avx2::attention, avx2::tile_kernel, avx2::small_ops, avx2::score_rows_by_heads, avx2::read_memory};
}  // namespace kvshare
