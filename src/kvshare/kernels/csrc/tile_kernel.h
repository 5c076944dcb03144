// Attention of up to 64 queries to a tile of rows, queries in the lanes of vectors: scores are (rows of K) x (Q transposed) and results
// (V transposed) x (weights transposed), so that rows are read where they lie, a pair of numbers at a time for all queries, and softmax
// (running maximum, Milakov and Gimelshein 2018) needs no sum across lanes. What a query gets depends on where tiles begin and on the rows
// that it sees, never on the queries beside it: a hidden row adds exactly nothing.
// Included once by each file of a set inside that set's namespace, behind its lanes_*.h.
#pragma once

constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -1e30f;         // a maximum of nothing
constexpr int64_t PAIRS_AT_ONCE = 128;  // of 64 packed queries: 32 KB
constexpr int TILE_PAIRS = TILE_ROWS / 2;

template <typename T>
inline T load(const void* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <typename T>
inline void store(void* to, T x) {
    memcpy(to, &x, sizeof x);
}

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

inline Lanes hyperbolic_tangent_of(Lanes x) {  // (1 - e) / (1 + e), e = exp(-2 |x|)
    const Lanes size = larger(x, -x), e = power_of_two(size * (-2.0f * LOG2E)), tangent = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -tangent : tangent;
}

// From scores to weights of one vector of queries, in pairs of rows, with their maximum and weight brought along; `shrink` is by how much
// what was summed up before weighs less.
template <bool Masked>
inline void weigh(float* scores, int begin, int end, int first_row, const TileQueries& queries, int vector, int32_t* weights, float* shrink) {
    const int stride = queries.vectors * LANES, lane = vector * LANES;
    float scale = queries.scale * LOG2E;
    if (queries.softcap > 0) {
        const float inner = queries.scale / queries.softcap, outer = queries.softcap * LOG2E;
        for (int t = begin; t < end; t++) {
            float* at = scores + t * stride + lane;
            store(at, hyperbolic_tangent_of(load<Lanes>(at) * inner) * outer);
        }
        scale = 1;
    }
    const Words first = load<Words>(queries.first + lane), last = load<Words>(queries.end + lane);
    const auto visible = [&](int t) { return (first <= first_row + t) & (last > first_row + t); };
    Lanes largest[2] = {all(LOWEST), all(LOWEST)};
    for (int t = begin; t < end; t++) {
        Lanes score = load<Lanes>(scores + t * stride + lane) * scale;
        if (Masked) score = visible(t) ? score : all(LOWEST);
        largest[t & 1] = larger(largest[t & 1], score);
    }
    const Lanes before = load<Lanes>(queries.maximum + lane), maximum = larger(before, larger(largest[0], largest[1]));
    Lanes sums[2] = {};
    const auto weight = [&](int t) {
        Lanes w = power_of_two(load<Lanes>(scores + t * stride + lane) * scale - maximum);
        if (Masked) w = visible(t) ? w : Lanes{};
        sums[t & 1] += w;
        return w;
    };
    int t = begin;
    for (; t + 1 < end; t += 2) {
        const Lanes even = weight(t), odd = weight(t + 1);
        store(weights + t / 2 * stride + lane, pairs_of(even, odd));
    }
    if (t < end) store(weights + t / 2 * stride + lane, pairs_of(weight(t), Lanes{}));
    const Lanes less = power_of_two(before - maximum);
    store(shrink + lane, less);
    store(queries.maximum + lane, maximum);
    store(queries.weight + lane, load<Lanes>(queries.weight + lane) * less + (sums[0] + sums[1]));
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

inline void pack_pairs(const uint16_t* const* rows, int width, int vectors, uint32_t* packed) {
    const int pairs = width / 2, stride = vectors * LANES, whole = pairs / 16 * 16;
    for (int lane = 0; lane < stride; lane += LANES) {
        for (int i = 0; i < whole; i += 16) {
            Words block[16];
            for (int l = 0; l < LANES; l++) block[l] = load<Words>(rows[lane + l] + 2 * i);
            transpose(block);
            for (int j = 0; j < 16; j++) store(packed + (i + j) * stride + lane, block[j]);
        }
        for (int i = whole; i < pairs; i++)
            for (int l = 0; l < LANES; l++) packed[i * stride + lane + l] = load<uint32_t>(rows[lane + l] + 2 * i);
    }
}

inline void pack_queries(const TileQueries& queries, const uint16_t* const* rows) {
    const int stride = queries.vectors * LANES;
    pack_pairs(rows, queries.key_width, queries.vectors, queries.packed);
    for (int i = 0; i < stride; i++) {
        queries.maximum[i] = LOWEST;
        queries.weight[i] = 0;
    }
    const int64_t sums = int64_t((queries.value_width + PANEL - 1) / PANEL) * PANEL * stride;
    memset(queries.out, 0, size_t(sums) * sizeof(float));
}

inline void pack_values(const Tile& tile, int begin, int end, int value_width) {
    for (int pair = begin / 2; pair < (end + 1) / 2; pair++) {
        const auto* even = reinterpret_cast<const uint16_t*>(tile.v[2 * pair]);
        const auto* odd = reinterpret_cast<const uint16_t*>(tile.v[2 * pair + 1]);
        uint32_t* to = tile.values + pair * PANEL;
        for (int c = 0; c < value_width; c += PANEL, to += TILE_PAIRS * PANEL) interleave(even + c, odd + c, value_width - c < PANEL ? value_width - c : PANEL, to);
    }
}

inline void merge_tiles(const TileQueries& into, const TileQueries& from) {
    const int stride = into.vectors * LANES;
    for (int lane = 0; lane < stride; lane += LANES) {
        const Lanes a = load<Lanes>(into.maximum + lane), b = load<Lanes>(from.maximum + lane), maximum = larger(a, b);
        const Lanes mine = power_of_two(a - maximum), other = power_of_two(b - maximum);
        store(into.maximum + lane, maximum);
        store(into.weight + lane, load<Lanes>(into.weight + lane) * mine + load<Lanes>(from.weight + lane) * other);
        for (int c = 0; c < into.value_width; c++) {
            const int at = c * stride + lane;
            store(into.out + at, load<Lanes>(into.out + at) * mine + load<Lanes>(from.out + at) * other);
        }
    }
}

inline void write_results(const TileQueries& queries, const float* sinks, uint16_t* const* rows) {
    const int stride = queries.vectors * LANES, width = queries.value_width, whole = width / 16 * 16;
    for (int lane = 0; lane < stride; lane += LANES) {
        Lanes weight = load<Lanes>(queries.weight + lane), share = all(1.0f);
        if (sinks) {  // a logit that takes part in the softmax and carries no value
            const Lanes sink = load<Lanes>(sinks + lane) * LOG2E, before = load<Lanes>(queries.maximum + lane), maximum = larger(before, sink);
            share = power_of_two(before - maximum);
            weight = weight * share + power_of_two(sink - maximum);
        }
        const Lanes factor = weight > 0.0f ? share / weight : Lanes{};
        for (int c = 0; c < whole; c += 16) {
            Words block[16];
            for (int j = 0; j < 16; j++) block[j] = (Words)(load<Lanes>(queries.out + (c + j) * stride + lane) * factor);
            transpose(block);
            for (int l = 0; l < LANES; l++)
                if (rows[lane + l]) store_bf16(rows[lane + l] + c, (Lanes)block[l]);
        }
        for (int c = whole; c < width; c++) {
            uint16_t column[LANES];
            store_bf16(column, load<Lanes>(queries.out + c * stride + lane) * factor);
            for (int l = 0; l < LANES; l++)
                if (rows[lane + l]) rows[lane + l][c] = column[l];
        }
    }
}

constexpr TileKernel tile_kernel = {pack_pairs, pack_queries, pack_values, attend_tile, merge_tiles, write_results};
