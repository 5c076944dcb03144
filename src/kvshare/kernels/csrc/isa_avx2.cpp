// The plain kernels compiled for AVX2, FMA and F16C.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
namespace kvshare {
namespace avx2 {
#include "interleave.h"
#include "blocks.h"
#include "encode_blocks.h"
#include "product.h"
#include "small_floats.h"
#include "block_row.h"
#include "row_decode.h"
#include "row_encode.h"
#include "attention.h"
#include "lanes_plain.h"
#include "tile_kernel.h"
#include "index_kernel.h"
#include "key_rebuild.h"
#include "read_memory.h"
#include "small_ops.h"
}  // namespace avx2
const Isa isa_avx2 = {"avx2", avx2::round_row, avx2::multiply_rows, avx2::multiply_bf16, avx2::decode_rows, avx2::decode_heads, avx2::encode_head, avx2::spell_plain, avx2::attend_plain, avx2::tile_kernel, avx2::score_rows_by_heads, avx2::rebuild_key, avx2::encode_row, avx2::small_ops, avx2::read_memory};
}  // namespace kvshare
