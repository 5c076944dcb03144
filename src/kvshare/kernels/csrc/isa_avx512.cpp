// AVX512 with VNNI, VBMI and BF16 (Zen 4, Sapphire Rapids and later).
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels.h"
namespace kvshare {
namespace avx512 {
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
#include "small_floats.h"
#include "block_row_avx512.h"
#include "block_row.h"
#include "row_decode.h"
#include "row_encode.h"
#include "attention.h"
#include "codes_avx512.h"
#include "query_avx512.h"
#include "ahead_avx512.h"
#include "attention_bf16_avx512.h"
#include "attention_codes_avx512.h"
#include "attention_avx512.h"
#include "lanes_avx512.h"
#include "tile_kernel.h"
#include "index_kernel.h"
#include "key_rebuild.h"
#include "read_memory.h"
#include "small_ops.h"
}  // namespace avx512
const Isa isa_avx512 = {"avx512", avx512::round_avx512, avx512::multiply_avx512, avx512::multiply_bf16_avx512, avx512::decode_avx512, avx512::decode_heads, avx512::encode_head, avx512::spell_avx512, avx512::attend_avx512, avx512::tile_kernel, avx512::score_rows_by_heads, avx512::rebuild_key, avx512::encode_row, avx512::small_ops, avx512::read_memory};
}  // namespace kvshare
