// What drawing a token asks of an instruction set.
#pragma once
#include <cstdint>

namespace kvshare {

constexpr int WEIGHT_BITS = 40;         // the largest logit weighs 2^40, and 2^23 tokens do not overflow their sum
constexpr int64_t WEIGHED_BLOCK = 128;  // logits, of which one knows the largest

struct Weighing {
    float most;     // the largest logit
    float inverse;  // log2(e) / temperature
};

struct SamplingOps {
    // to[i] = 2^40 * exp((x[i] - most) / temperature) to the nearest integer, to the bit what kvshare.kernels.sampling computes.
    void (*weigh)(const float* x, int64_t count, Weighing by, int64_t* to);
    int64_t (*weight_of)(const float* x, int64_t count, Weighing by);  // their sum
    int64_t (*num_above)(const float* x, int64_t count, float border);
};

}  // namespace kvshare
