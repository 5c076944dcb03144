// Scores of an indexer's keys, sum over heads of weight * max(0, q . k), for the queries of one token: heads are the lanes of vectors, as in the
// tile kernel, whose products these are. What a row scores depends on that row and that token alone.
// Included once by each file of a set inside that set's namespace, behind the products of rows and vectors.
#pragma once

constexpr int SCORED_ROWS = 48;  // at once: their products with 64 heads stay in the first-level cache
static_assert(TILE_ROWS % SCORED_ROWS == 0 && SCORED_ROWS % LANES == 0);

inline void score_rows_by_heads(const uint8_t* const* rows, const IndexQuery& query, float* scores) {
    alignas(64) float products[SCORED_ROWS * MOST_VECTORS * LANES];
    for (int begin = 0; begin < TILE_ROWS; begin += SCORED_ROWS) {
        Lanes sums[SCORED_ROWS] = {};
        for (int first = 0; first < query.vectors; first += MOST_VECTORS) {
            const int vectors = query.vectors - first < MOST_VECTORS ? query.vectors - first : MOST_VECTORS, stride = query.vectors * LANES;
            multiply_rows(rows + begin, SCORED_ROWS, query.packed + first * LANES, query.width / 2, vectors, stride, products);
            for (int vector = 0; vector < vectors; vector++) {
                const Lanes weight = load<Lanes>(query.weights + (first + vector) * LANES);
                for (int t = 0; t < SCORED_ROWS; t++) sums[t] += weight * larger(load<Lanes>(products + (t * MOST_VECTORS + vector) * LANES), Lanes{});
            }
        }
        for (int t = 0; t < SCORED_ROWS; t += LANES) {
            transpose(reinterpret_cast<Words*>(sums + t));
            Lanes total = sums[t];
            for (int i = 1; i < LANES; i++) total += sums[t + i];
            store(scores + begin + t, total);
        }
    }
}
