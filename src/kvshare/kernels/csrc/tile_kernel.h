// Attention of up to 64 queries to a tile of rows with vectors: scores are (rows of K) x (Q transposed) and results (V transposed) x (weights
// transposed), so that rows are read where they lie, a pair of numbers at a time for all queries.
// Included once by each file of a set inside that set's namespace, behind tile_softmax.h.
#pragma once

inline Words all_words(const void* from) { return load<int32_t>(from) - Words{}; }

// Rows of the next tile, which are asked for a line at a time while this one is multiplied: all at once they would fill the queues.
struct NextRows {
    const uint8_t *k[16], *v[16];  // as many as are multiplied at once, and again the first ones

    NextRows(const Tile* next, int begin, int count) {
        for (int i = 0; next && i < 16; i++) {
            k[i] = next->k[begin + i % count];
            v[i] = next->v[begin + i % count];
        }
    }

    void ask(int64_t pair) const {  // 16 pairs of a row are a line
        __builtin_prefetch(k[pair & 15] + pair / 16 * 64, 0, 2);
        __builtin_prefetch(v[pair & 15] + pair / 16 * 64, 0, 2);
    }
};

// scores[t * to_stride + lane] (+)= the product of pairs `begin ... end` of row t and of the queries, for Rows rows and Vectors vectors of lanes.
template <int Rows, int Vectors, bool Asks>
inline void score(const uint8_t* const* rows, const uint32_t* queries, int64_t begin, int64_t end, int stride, const NextRows& next, float* scores, int to_stride) {
    const bool more = begin > 0;
    queries += begin * stride;
    Lanes sums[Rows][Vectors];
#pragma GCC unroll 24
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sums[r][v] = more ? load<Lanes>(scores + r * to_stride + v * LANES) : Lanes{};
    const uint8_t* at[Rows];
    for (int r = 0; r < Rows; r++) at[r] = rows[r];
    for (int64_t i = begin; i < end; i++, queries += stride) {
        if constexpr (Asks) next.ask(i);
        Words lanes[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) lanes[v] = load<Words>(queries + v * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < Rows; r++) {
            const Words pair = all_words(at[r] + 4 * i);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[r][v] = dot(sums[r][v], pair, lanes[v]);
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) store(scores + r * to_stride + v * LANES, sums[r][v]);
}

// out[c * stride + lane] = shrink[lane] * out + the sum over `pairs` pairs of rows of weights * values, for Columns columns of a panel.
template <int Columns, int Vectors>
inline void sum_values(const uint32_t* values, const int32_t* weights, int pairs, int stride, const float* shrink, float* out) {
    Lanes sums[Columns][Vectors];
#pragma GCC unroll 24
    for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sums[c][v] = load<Lanes>(out + c * stride + v * LANES) * load<Lanes>(shrink + v * LANES);
    for (int i = 0; i < pairs; i++, weights += stride, values += PANEL) {
        Words lanes[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) lanes[v] = load<Words>(weights + v * LANES);
#pragma GCC unroll 24
        for (int c = 0; c < Columns; c++) {
            const Words pair = all_words(values + c);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[c][v] = dot(sums[c][v], pair, lanes[v]);
        }
    }
#pragma GCC unroll 24
    for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) store(out + c * stride + v * LANES, sums[c][v]);
}

template <int Rows, int Vectors>
inline void score_tile(const Tile& tile, int begin, int end, const TileQueries& queries, int vector, float* scores) {
    const int stride = queries.vectors * LANES;
    const int64_t pairs = queries.key_width / 2;
    for (int64_t from = 0; from < pairs; from += PAIRS_AT_ONCE)
        for (int t = begin / Rows * Rows; t < end; t += Rows) {
            const NextRows next(tile.next, t, Rows);
            (tile.next ? score<Rows, Vectors, true> : score<Rows, Vectors, false>)(tile.k + t, queries.packed + vector * LANES, from,
                                                                                  pairs - from < PAIRS_AT_ONCE ? pairs : from + PAIRS_AT_ONCE, stride, next,
                                                                                  scores + t * stride + vector * LANES, stride);
        }
}

template <int Columns, int Vectors>
inline void sum_tile(const Tile& tile, int begin, int end, const TileQueries& queries, int vector, const int32_t* weights, const float* shrink) {
    const int stride = queries.vectors * LANES;
    for (int c = 0; c < queries.value_width; c += Columns)
        sum_values<Columns, Vectors>(tile.values + int64_t(c / PANEL) * TILE_PAIRS * PANEL + begin / 2 * PANEL + c % PANEL, weights + begin / 2 * stride + vector * LANES,
                                     (end - begin + 1) / 2, stride, shrink + vector * LANES, queries.out + int64_t(c) * stride + vector * LANES);
}

inline void attend_tile(const Tile& tile, int begin, int end, bool masked, const TileQueries& queries) {
    alignas(64) float scores[TILE_ROWS * MOST_VECTORS * LANES], shrink[MOST_VECTORS * LANES];
    alignas(64) int32_t weights[TILE_PAIRS * MOST_VECTORS * LANES];
    const auto score_all = [&] {
        if constexpr (WIDE) {
            switch (queries.vectors) {
                case 4: return score_tile<6, 4>(tile, begin, end, queries, 0, scores);
                case 3: return score_tile<8, 3>(tile, begin, end, queries, 0, scores);
                case 2: return score_tile<12, 2>(tile, begin, end, queries, 0, scores);
                default: return score_tile<12, 1>(tile, begin, end, queries, 0, scores);
            }
        } else {
            for (int vector = 0; vector < queries.vectors; vector++) score_tile<4, 1>(tile, begin, end, queries, vector, scores);
        }
    };
    const auto sum_all = [&] {
        if constexpr (WIDE) {
            switch (queries.vectors) {
                case 4: return sum_tile<6, 4>(tile, begin, end, queries, 0, weights, shrink);
                case 3: return sum_tile<8, 3>(tile, begin, end, queries, 0, weights, shrink);
                case 2: return sum_tile<12, 2>(tile, begin, end, queries, 0, weights, shrink);
                default: return sum_tile<12, 1>(tile, begin, end, queries, 0, weights, shrink);
            }
        } else {
            for (int vector = 0; vector < queries.vectors; vector++) sum_tile<4, 1>(tile, begin, end, queries, vector, weights, shrink);
        }
    };
    score_all();
    for (int vector = 0; vector < queries.vectors; vector++)
        (masked ? weigh<true> : weigh<false>)(scores, begin, end, tile.first, queries, vector, weights, shrink);
    sum_all();
}

inline void pack_values(const Tile& tile, int begin, int end, int value_width) {
    for (int pair = begin / 2; pair < (end + 1) / 2; pair++) {
        const auto* even = reinterpret_cast<const uint16_t*>(tile.v[2 * pair]);
        const auto* odd = reinterpret_cast<const uint16_t*>(tile.v[2 * pair + 1]);
        uint32_t* to = tile.values + pair * PANEL;
        for (int c = 0; c < value_width; c += PANEL, to += TILE_PAIRS * PANEL) interleave(even + c, odd + c, value_width - c < PANEL ? value_width - c : PANEL, to);
    }
}

// products [count, MOST_VECTORS * LANES] of rows and queries, for any number of rows that is divisible by 24.
inline void multiply_rows(const uint8_t* const* rows, int count, const uint32_t* queries, int pairs, int vectors, int stride, float* products) {
    const NextRows none(nullptr, 0, 1);
    const auto multiply = [&]<int Rows, int Vectors>(int vector) {
        for (int t = 0; t < count; t += Rows)
            score<Rows, Vectors, false>(rows + t, queries + vector * LANES, 0, pairs, stride, none, products + (t * MOST_VECTORS + vector) * LANES, MOST_VECTORS * LANES);
    };
    if constexpr (WIDE) {
        switch (vectors) {
            case 4: return multiply.template operator()<6, 4>(0);
            case 3: return multiply.template operator()<8, 3>(0);
            case 2: return multiply.template operator()<12, 2>(0);
            default: return multiply.template operator()<12, 1>(0);
        }
    } else {
        for (int vector = 0; vector < vectors; vector++) multiply.template operator()<4, 1>(vector);
    }
}

constexpr TileKernel tile_kernel = {pack_pairs, pack_queries, pack_values, attend_tile, merge_tiles, write_results};
