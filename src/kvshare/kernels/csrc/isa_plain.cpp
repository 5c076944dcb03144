// Plain C++ for any processor.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
namespace kvshare {
namespace plain {
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
}  // namespace plain
const Isa isa_plain = {"plain", plain::round_row, plain::multiply_rows, plain::multiply_bf16, plain::decode_rows, plain::decode_heads, plain::encode_head, plain::spell_plain, plain::attend_plain, plain::tile_kernel, plain::score_rows_by_heads, plain::rebuild_key, plain::encode_row, plain::small_ops, plain::read_memory};
}  // namespace kvshare
