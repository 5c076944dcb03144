// AVX512 with VNNI, VBMI and BF16, and the same with the tiles of AMX where many queries are multiplied.
#include "amx.h"
#include "avx512.h"

namespace kvshare {
const Isa isa_avx512 = {"avx512", avx512::products, avx512::rows, avx512::attention, avx512::tile, avx512::small, avx512::score_rows, avx512::read};
const Isa isa_amx = {"amx", avx512::products, avx512::rows, avx512::attention, amx::tile, avx512::small, amx::score_rows, avx512::read};
}  // namespace kvshare
