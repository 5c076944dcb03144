// Choosing a token from logits without sorting them: kvshare/kernels/sampling.py says what is computed.
#pragma once
#include <utility>
#include <vector>

#include "kernels.h"

namespace kvshare {

struct Logits {
    const float* at;
    int64_t count;
};

struct Draw {
    float inverse;         // log2(e) / temperature
    int64_t top_k;         // 0: all
    int64_t least_weight;  // min-p as a weight; 0: any
    double top_p;
    double place;  // in [0, 1): where the token lies among what is kept
};

int64_t draw(const Isa& isa, Logits logits, const Draw& how);

// Of an ordinary softmax: what the probabilities of a token and of the `count` most probable ones are made of.
struct Leading {
    float most;      // the largest logit
    int64_t weight;  // of all tokens
    int64_t rank;    // of the token: 1 where no logit is larger
    std::vector<int64_t> tokens;
    std::vector<float> logits;  // theirs
};
Leading leading(const Isa& isa, Logits logits, int64_t token, int64_t count);

// Penalties over `count` different tokens, which occurred `times` in the output. Throws std::out_of_range.
struct Penalties {
    float repetition, presence, frequency;
};
void penalise(float* logits, int64_t vocabulary, const int64_t* tokens, const int64_t* times, int64_t count, const Penalties& by);

}  // namespace kvshare
