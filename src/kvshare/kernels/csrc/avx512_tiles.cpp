// Attention of many queries, and rows of the cache one by one.
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
#include "vectors_avx512.h"
#include "small_floats.h"
#include "block_row_avx512.h"
#include "block_row.h"
#include "row_decode.h"
#include "row_encode.h"
#include "hadamard.h"
#include "hadamard_avx512.h"
#include "lanes_avx512.h"
#include "tile_softmax.h"
#include "tile_kernel.h"
#include "index_kernel.h"
#include "key_rebuild.h"
}  // namespace
const RowKernels rows = {decode_heads, encode_head, rebuild_key, hadamard_avx512};
const TileKernel tile = tile_kernel;
void score_rows(const uint8_t* const* rows, const IndexQuery& query, float* scores) { score_rows_by_heads(rows, query, scores); }
}  // namespace kvshare::avx512
