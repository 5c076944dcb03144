// Routers: scores of experts, the best of them and their weights. Included by small_ops.h.
#pragma once

// Largest of `count` numbers: the first of them where some are equal.
inline int64_t best_of(const float* x, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

// Experts outside the best groups are no choice any more. A group counts as much as its two best.
inline void keep_groups(const RouteTask& task, float* choice) {
    const int64_t size = task.experts / task.groups;
    float value[MAX_EXPERT_GROUPS];
    bool kept[MAX_EXPERT_GROUPS] = {};
    for (int64_t g = 0; g < task.groups; g++) {
        const float* own = choice + g * size;
        const int64_t best = best_of(own, size);
        float second = -INFINITY;
        for (int64_t i = 0; i < size; i++)
            if (i != best && own[i] > second) second = own[i];
        value[g] = size > 1 ? own[best] + second : own[best];
    }
    for (int64_t i = 0; i < task.kept; i++) {
        const int64_t best = best_of(value, task.groups);
        kept[best] = true;
        value[best] = -INFINITY;
    }
    for (int64_t e = 0; e < task.experts; e++)
        if (!kept[e / size]) choice[e] = -INFINITY;
}

inline void score_experts(const RouteTask& task, int64_t row, float* score) {
    const int64_t n = task.experts;
    for (int64_t e = 0; e < n; e++) score[e] = task.scores_bf16 ? number(static_cast<const uint16_t*>(task.scores)[row * n + e]) : static_cast<const float*>(task.scores)[row * n + e];
    if (task.softcap > 0)
        for (int64_t e = 0; e < n; e++) score[e] = task.softcap * tanhf(score[e] / task.softcap);
    if (task.scoring == Scoring::SIGMOID) {
        for (int64_t e = 0; e < n; e++) score[e] = 1.0f / (1.0f + exponential(-score[e]));
    } else if (task.scoring == Scoring::SQRT_SOFTPLUS) {
        for (int64_t e = 0; e < n; e++) score[e] = sqrtf(softplus_of(score[e]));
    } else {
        const float largest = score[best_of(score, n)];
        float total = 0;
        for (int64_t e = 0; e < n; e++) total += score[e] = exponential(score[e] - largest);
        for (int64_t e = 0; e < n; e++) score[e] /= total;
    }
}

inline void route(const RouteTask& task, int64_t begin, int64_t end) {
    float score[MAX_EXPERTS], choice[MAX_EXPERTS];
    for (int64_t row = begin; row < end; row++) {
        score_experts(task, row, score);
        int64_t* chosen = task.chosen + row * task.k;
        if (task.table) {
            memcpy(chosen, task.table + task.ids[row] * task.k, size_t(task.k) * sizeof(int64_t));
        } else {
            for (int64_t e = 0; e < task.experts; e++) choice[e] = task.bias ? score[e] + task.bias[e] : score[e];
            if (task.groups > 1) keep_groups(task, choice);
            for (int64_t j = 0; j < task.k; j++) {
                chosen[j] = best_of(choice, task.experts);
                choice[chosen[j]] = -INFINITY;
            }
        }
        float total = task.tiny;
        for (int64_t j = 0; j < task.k; j++) total += score[chosen[j]];
        const float divisor = task.tiny < 0 ? 1.0f : total;
        for (int64_t j = 0; j < task.k; j++) {
            float weight = score[chosen[j]] / divisor * task.scale;
            if (task.expert_scale) weight *= task.expert_scale_bf16 ? number(static_cast<const uint16_t*>(task.expert_scale)[chosen[j]]) : static_cast<const float*>(task.expert_scale)[chosen[j]];
            if (task.weights_bf16) static_cast<uint16_t*>(task.weights)[row * task.k + j] = stored<uint16_t>(weight);
            else static_cast<float*>(task.weights)[row * task.k + j] = weight;
        }
    }
}
