// Attention of one query a sequence.
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
#include "attention.h"
#include "codes_avx512.h"
#include "query_avx512.h"
#include "ahead_avx512.h"
#include "attention_bf16_avx512.h"
#include "code_scores_avx512.h"
#include "code_sums_avx512.h"
#include "attention_avx512.h"
}  // namespace
const AttentionKernels attention = {spell_avx512, attend_avx512, settle_avx512, merge_parts};
}  // namespace kvshare::avx512
