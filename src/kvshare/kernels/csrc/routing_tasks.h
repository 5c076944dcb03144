// What a router is asked to do with its scores.
#pragma once
#include <cstdint>

namespace kvshare {

enum class Scoring : int { SOFTMAX, SIGMOID, SQRT_SOFTPLUS };

// The k experts of each row that score best, and their weights. Of equal scores the earlier expert.
struct RouteTask {
    const void* scores;  // [rows, experts], as the product left them
    bool scores_bf16;
    int64_t experts, k;
    Scoring scoring;
    float softcap;          // on the scores first; 0: none
    const float* bias;      // [experts] or nullptr: added for the choice, not for the weights
    int64_t groups, kept;   // experts are chosen from the `kept` groups whose two best are the largest; 1 and 1: from all
    const int64_t* table;   // [ids, k] or nullptr: experts are not chosen but looked up
    const int64_t* ids;     // [rows]
    float tiny;             // added to the sum that weights are divided by; negative: they are not divided
    float scale;
    const void* expert_scale;  // [experts] or nullptr: a factor of each expert's weight
    bool expert_scale_bf16;
    int64_t* chosen;  // [rows, k]
    void* weights;    // [rows, k]
    bool weights_bf16;
};

constexpr int64_t MAX_EXPERTS = 1024, MAX_EXPERT_GROUPS = 64;

}  // namespace kvshare
