// What attention to a tile of rows is whatever multiplies (tile_kernel.h with vectors, amx_tiles.cpp with tiles): queries in the lanes of vectors,
// scores to weights, sums that meet, results. Softmax (running maximum, Milakov and Gimelshein 2018) needs no sum across lanes. What a query gets
// depends on where tiles begin and on the rows that it sees, never on the queries beside it: a hidden row adds exactly nothing.
// Included once by each file of a set inside that set's namespace, behind its lanes_*.h.
#pragma once

constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -1e30f;        // a maximum of nothing
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

inline Lanes hyperbolic_tangent_of(Lanes x) {  // (1 - e) / (1 + e), e = exp(-2 |x|)
    const Lanes size = larger(x, -x), e = power_of_two(size * (-2.0f * LOG2E)), tangent = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -tangent : tangent;
}

// From scores to weights of one vector of queries, in pairs of rows, with their maximum and weight brought along; `shrink` is by how much
// what was summed up before weighs less. A maximum that would grow by less than `Slack` stays as it is: weights are powers of two up to 2^Slack then, and
// most tiles shrink nothing.
template <bool Masked, int Slack = 0>
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
    const Lanes before = load<Lanes>(queries.maximum + lane), found = larger(largest[0], largest[1]);
    const Lanes maximum = Slack == 0 ? larger(before, found) : found > before + float(Slack) ? found : before;
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
    memset(queries.out, 0, size_t(padded(queries.value_width)) * size_t(stride) * sizeof(float));
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
