// Attention of many queries to a tile of rows: what the driver (tile_attention.cpp) and the instruction sets hand each other.
#pragma once
#include <cstdint>

namespace kvshare {

constexpr int LANES = 16;         // queries of one vector
constexpr int TILE_ROWS = 96;     // rows of the cache in a tile: scores and weights of 64 queries stay in the first-level cache
constexpr int MOST_VECTORS = 4;   // of the queries that are multiplied at once
constexpr int PANEL = 24;         // value columns that lie together, for every number of columns that a kernel takes at once

// Columns that there is room for in sums and packed values: whole panels, and whole tiles of 16.
constexpr int64_t padded(int64_t width) { return (width + 2 * PANEL - 1) / (2 * PANEL) * (2 * PANEL); }

// Up to 64 queries that attend to rows of the same head, one in each lane of `vectors` vectors, and what has been summed up for them.
struct TileQueries {
    int vectors, key_width, value_width;
    float scale, softcap;       // softcap 0: none
    uint32_t* packed;           // [key_width / 2, vectors * 16] pairs of bfloat16
    float *maximum, *weight;    // [vectors * 16] of the scores in powers of two, and sum of 2^(score - maximum)
    float* out;                 // [padded(value_width), vectors * 16] sum of 2^(score - maximum) * value
    const int32_t *first, *end;  // [vectors * 16] the rows that each query sees
};

// Rows `first ...` of the cache: addresses of one head's bfloat16 numbers. Entries behind the last row repeat it.
struct Tile {
    const uint8_t *k[TILE_ROWS], *v[TILE_ROWS];
    int first;
    uint32_t* values;  // [padded(value_width) * TILE_ROWS / 2] pairs of rows of v, as the set's own `pack_values` lays them: [panels, TILE_ROWS / 2, PANEL] for vectors
    const Tile* next;  // whose rows will be read after this one's; null: none
};

// The queries of one token's index heads, one in each lane of `vectors` vectors.
struct IndexQuery {
    int vectors, width;
    const uint32_t* packed;  // [width / 2, vectors * 16] pairs of bfloat16
    const float* weights;    // [vectors * 16] of the heads, zeros behind the last
};

struct TileKernel {
    // Rows of bfloat16 (`width` even), one a lane, to pairs: packed [width / 2, vectors * 16].
    void (*pack_pairs)(const uint16_t* const* rows, int width, int vectors, uint32_t* packed);
    // From rows of bfloat16, one a lane, to `queries.packed`; nothing summed up yet.
    void (*pack_queries)(const TileQueries& queries, const uint16_t* const* rows);
    // The values of rows `begin ... end` (begin even) in `tile.values`: each number beside that of the next row, zeros behind the last column.
    void (*pack_values)(const Tile& tile, int begin, int end, int value_width);
    // Rows `begin ... end` of the tile (begin even) take part in the softmax of the queries. `masked`: some query does not see all of them.
    void (*attend)(const Tile& tile, int begin, int end, bool masked, const TileQueries& queries);
    // What another part of the rows summed up joins `into`.
    void (*merge)(const TileQueries& into, const TileQueries& from);
    // Results, a row a lane, null for none. `sinks`: a logit a lane, or null.
    void (*write)(const TileQueries& queries, const float* sinks, uint16_t* const* rows);
};

}  // namespace kvshare
