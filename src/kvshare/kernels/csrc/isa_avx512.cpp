// AVX512 with VNNI, VBMI and BF16.
#include "avx512.h"

namespace kvshare {
const Isa isa_avx512 = {"avx512", avx512::products, avx512::rows, avx512::attention, avx512::tile, avx512::small, avx512::score_rows, avx512::read};
}  // namespace kvshare
