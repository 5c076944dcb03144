// What the AMX set (Sapphire Rapids and later) has of its own, compiled from amx_tiles.cpp; the rest is AVX512's.
#pragma once
#include "kernels.h"

namespace kvshare::amx {

extern const TileKernel tile;
void score_rows(const uint8_t* const* rows, const IndexQuery& query, float* scores);

}  // namespace kvshare::amx
