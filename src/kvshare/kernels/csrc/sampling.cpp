#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "over.h"
#include "small_ops_calls.h"

namespace kvshare {
namespace {

struct Candidate {
    uint32_t distance;  // from the largest logit, in floats between
    int32_t token;
    int64_t weight;
};

// Floats in their order; a NaN is as large as infinity, and the zeros are equal.
uint32_t in_order(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x == x ? x + 0.0f : INFINITY);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Which candidates reach a sum soonest, taken by distance and, of equal ones, in order: all nearer than `distance`, and those at it until theirs is `left`.
struct Border {
    uint32_t distance;
    int64_t left;
};

// Buckets of distances, each round of those in the bucket in which the sum is reached. What all add up to must reach it.
template <typename Measure>
Border border(const std::vector<Candidate>& candidates, int64_t sum, Measure measure) {
    static thread_local std::vector<Candidate> inside, before;
    uint32_t low = 0, furthest = 0;
    for (const Candidate& c : candidates) furthest = std::max(furthest, c.distance);
    const std::vector<Candidate>* left = &candidates;
    for (int shift = std::max(0, int(std::bit_width(furthest)) - 8);; shift = std::max(0, shift - 8)) {
        int64_t sums[256] = {};
        for (const Candidate& c : *left) sums[(c.distance - low) >> shift] += measure(c);
        uint32_t bucket = 0;
        while (bucket < 255 && sums[bucket] < sum) sum -= sums[bucket++];
        if (!shift) return {low + bucket, sum};
        inside.clear();
        for (const Candidate& c : *left)
            if ((c.distance - low) >> shift == bucket) inside.push_back(c);
        inside.swap(before);
        left = &before;
        low += bucket << shift;
    }
}

template <typename Measure>
void keep(std::vector<Candidate>& candidates, int64_t sum, Measure measure) {
    Border last = border(candidates, sum, measure);
    std::erase_if(candidates, [&](const Candidate& c) {
        if (c.distance != last.distance) return c.distance > last.distance;
        const bool kept = last.left > 0;
        last.left -= measure(c);
        return !kept;
    });
}

constexpr auto one = [](const Candidate&) -> int64_t { return 1; };
constexpr auto weight = [](const Candidate& c) { return c.weight; };

int64_t sum_of(const std::vector<Candidate>& candidates) {
    int64_t sum = 0;
    for (const Candidate& c : candidates) sum += c.weight;
    return sum;
}

int64_t place_in(double part, int64_t all) { return std::min(int64_t(part * double(all)), all - 1); }

// A row of logits in blocks, of which it knows the largest, and later the weight.
class Row {
  public:
    Row(const Isa& isa, Logits logits) : ops_(isa.small.edges.sampling), logits_(logits), largest_(size_t((logits.count + WEIGHED_BLOCK - 1) / WEIGHED_BLOCK)) {
        over(blocks(), WEIGHED_BLOCK, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) largest_[size_t(b)] = isa.small.edges.largest(block(b), length(b));
        });
        most_ = *std::max_element(largest_.begin(), largest_.end());
    }

    float most() const { return most_; }
    int64_t blocks() const { return int64_t(largest_.size()); }

    // The weights of all blocks, and their sum.
    int64_t weigh(float inverse, std::vector<int64_t>& of_blocks) const {
        of_blocks.resize(largest_.size());
        over(blocks(), 4 * WEIGHED_BLOCK, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) of_blocks[size_t(b)] = ops_.weight_of(block(b), length(b), {most_, inverse});
        });
        int64_t sum = 0;
        for (const int64_t own : of_blocks) sum += own;
        return sum;
    }

    // All tokens whose logit is at least `least`, in their order.
    void collect(float least, float inverse, std::vector<Candidate>& to) const {
        size_t count = 0;
        const uint32_t nearest = in_order(most_), furthest = nearest - std::min(nearest, in_order(least));
        int64_t weights[WEIGHED_BLOCK];
        for (int64_t b = 0; b < blocks(); b++) {
            if (nearest - in_order(largest_[size_t(b)]) > furthest) continue;
            const float* x = block(b);
            ops_.weigh(x, length(b), {most_, inverse}, weights);
            if (to.size() < count + WEIGHED_BLOCK) to.resize(2 * count + WEIGHED_BLOCK);
            for (int64_t i = 0; i < length(b); i++) {
                const uint32_t distance = nearest - in_order(x[i]);
                to[count] = {distance, int32_t(b * WEIGHED_BLOCK + i), weights[i]};
                count += distance <= furthest;
            }
        }
        to.resize(count);
    }

    // The `count` largest, of equal ones the first.
    void collect_largest(int64_t count, float inverse, std::vector<Candidate>& to) const {
        float least = -INFINITY;
        if (count <= blocks()) {  // as many blocks hold one that is not below
            to.clear();
            for (const float largest : largest_) to.push_back({in_order(most_) - in_order(largest), 0, 0});
            const uint32_t at = in_order(most_) - border(to, count, one).distance;
            least = std::bit_cast<float>(at >> 31 ? at & 0x7fffffff : ~at);
        }
        collect(least, inverse, to);
        keep(to, count, one);
    }

    // The token in whose weight `place` lies.
    int64_t find(int64_t place, const std::vector<int64_t>& of_blocks, float inverse) const {
        int64_t b = 0;
        while (place >= of_blocks[size_t(b)]) place -= of_blocks[size_t(b++)];
        int64_t weights[WEIGHED_BLOCK], i = 0;
        ops_.weigh(block(b), length(b), {most_, inverse}, weights);
        while (place >= weights[i]) place -= weights[i++];
        return b * WEIGHED_BLOCK + i;
    }

    // The token in whose weight `part` of those that reach `wanted` soonest lies, where these may be many: tokens are summed by how far below the largest
    // their logits are, and only those of the step in which `wanted` is reached ranked.
    int64_t find_in_nucleus(double part, int64_t wanted, float inverse) const {
        static thread_local std::vector<Candidate> last;
        float least = most_;
        for (int64_t i = 0; i < logits_.count; i++) least = logits_.at[i] < least && logits_.at[i] > -INFINITY ? logits_.at[i] : least;
        const double range = std::min((WEIGHT_BITS + 2.0) / inverse, double(most_) - least);  // what is further weighs nothing
        const float steps = range > 0 ? float(std::min((STEPS - 1) / range, 1e30)) : 0.0f;
        int64_t sums[2][STEPS] = {};  // of every other token: neighbours are often of the same step
        each_block(steps, inverse, [&](int64_t, int64_t count, const int32_t* step, const int64_t* weights) {
            for (int64_t i = 0; i < count; i++) sums[i & 1][step[i]] += weights[i];
            return true;
        });
        int32_t border = 0;
        int64_t nearer = 0;
        while (border < STEPS - 1 && nearer + sums[0][border] + sums[1][border] < wanted) nearer += sums[0][border] + sums[1][border], border++;
        last.clear();
        each_block(steps, inverse, [&](int64_t first, int64_t count, const int32_t* step, const int64_t* weights) {
            for (int64_t i = 0; i < count; i++)
                if (step[i] == border) last.push_back({in_order(most_) - in_order(logits_.at[first + i]), int32_t(first + i), weights[i]});
            return true;
        });
        keep(last, wanted - nearer, weight);
        int64_t token = 0, place = place_in(part, nearer + sum_of(last));
        auto kept = last.begin();
        each_block(steps, inverse, [&](int64_t first, int64_t count, const int32_t* step, const int64_t* weights) {
            for (int64_t i = 0; i < count; i++) {
                const bool ranked = kept != last.end() && kept->token == first + i;
                kept += ranked;
                if (!ranked && step[i] >= border) continue;
                token = first + i;
                if ((place -= weights[i]) < 0) return false;
            }
            return true;
        });
        return token;
    }

  private:
    static constexpr int32_t STEPS = 256;

    // see(first token, count, steps below the largest logit, weights) for each block until it returns false.
    template <typename See>
    void each_block(float steps, float inverse, See see) const {
        int64_t weights[WEIGHED_BLOCK];
        int32_t step[WEIGHED_BLOCK];
        for (int64_t b = 0; b < blocks(); b++) {
            const float* x = block(b);
            ops_.weigh(x, length(b), {most_, inverse}, weights);
            for (int64_t i = 0; i < length(b); i++) {
                const float below = (x[i] == most_ || x[i] != x[i] ? 0.0f : most_ - x[i]) * steps;
                step[i] = below < STEPS - 1 ? int32_t(below) : STEPS - 1;
            }
            if (!see(b * WEIGHED_BLOCK, length(b), step, weights)) return;
        }
    }

    const float* block(int64_t b) const { return logits_.at + b * WEIGHED_BLOCK; }
    int64_t length(int64_t b) const { return std::min(WEIGHED_BLOCK, logits_.count - b * WEIGHED_BLOCK); }

    const SamplingOps& ops_;
    Logits logits_;
    std::vector<float> largest_;
    float most_;
};

// The logit whose probability relative to the best one's is 2^doublings, or one a little below.
float with_weight(const Row& row, double doublings, float inverse) {
    const double at = double(row.most()) + doublings * 1.0001 / inverse;
    return std::isnan(at) ? -INFINITY : std::nextafter(float(at), -INFINITY);
}

constexpr int RARITIES[] = {10, 13};  // no more than 2^10 tokens are as probable as 2^-10: first one looks whether these suffice

int64_t share(double part, int64_t of) { return std::clamp(int64_t(std::ceil(part * double(of))), int64_t(1), of); }

}  // namespace

int64_t draw(const Isa& isa, Logits logits, const Draw& how) {
    static thread_local std::vector<Candidate> candidates;
    static thread_local std::vector<int64_t> of_blocks;
    const Row row(isa, logits);
    const bool few = how.top_k > 0 && how.top_k < logits.count;
    if (few || how.least_weight > 0) {
        const double doublings = how.least_weight > 0 ? std::log2(double(how.least_weight) - 0.5) - WEIGHT_BITS - 0.001 : 0;
        if (few) row.collect_largest(how.top_k, how.inverse, candidates);
        else row.collect(with_weight(row, doublings, how.inverse), how.inverse, candidates);
        std::erase_if(candidates, [&](const Candidate& c) { return c.weight < how.least_weight; });
        if (how.top_p < 1) keep(candidates, share(how.top_p, sum_of(candidates)), weight);
    } else {
        const int64_t all = row.weigh(how.inverse, of_blocks);
        if (how.top_p >= 1) return row.find(place_in(how.place, all), of_blocks, how.inverse);
        const int64_t wanted = share(how.top_p, all);
        for (const int rarity : RARITIES) {
            const double doublings = std::min(std::log2(double(all)) - WEIGHT_BITS - rarity, 0.0);
            row.collect(with_weight(row, doublings, how.inverse), how.inverse, candidates);
            if (sum_of(candidates) >= wanted) break;
        }
        if (sum_of(candidates) < wanted) return row.find_in_nucleus(how.place, wanted, how.inverse);
        keep(candidates, wanted, weight);
    }
    int64_t place = place_in(how.place, sum_of(candidates));
    auto at = candidates.begin();
    while (place >= at->weight) place -= (at++)->weight;
    return at->token;
}

Leading leading(const Isa& isa, Logits logits, int64_t token, int64_t count) {
    constexpr float LOG2_E = 1.44269504088896341f;
    static thread_local std::vector<Candidate> candidates;
    static thread_local std::vector<int64_t> of_blocks;
    const Row row(isa, logits);
    Leading found = {row.most(), row.weigh(LOG2_E, of_blocks), 1 + isa.small.edges.sampling.num_above(logits.at, logits.count, logits.at[token]), {}, {}};
    if (count) {
        row.collect_largest(std::min(count, logits.count), LOG2_E, candidates);
        std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.distance < b.distance; });
    } else {
        candidates.clear();
    }
    for (const Candidate& c : candidates) {
        found.tokens.push_back(c.token);
        found.logits.push_back(logits.at[c.token]);
    }
    return found;
}

void penalise(float* logits, int64_t vocabulary, const int64_t* tokens, const int64_t* times, int64_t count, const Penalties& by) {
    check_rows(tokens, count, vocabulary);
    for (int64_t i = 0; i < count; i++) {
        float& x = logits[tokens[i]];
        if (by.repetition != 1) x = x > 0 ? x / by.repetition : x * by.repetition;
        if (!times[i]) continue;
        x -= by.presence + by.frequency * float(times[i]);
    }
}

}  // namespace kvshare
