// What the operations in front of the first layer and behind the last are asked to do.
#pragma once
#include <cstdint>

#include "sampling_tasks.h"

namespace kvshare {

// factor * cos and factor * sin of position * inverse: [rows, pairs] each.
struct TurnTask {
    const int64_t* positions;  // [rows]
    const float* inverse;      // [pairs] radians a position
    int64_t pairs;
    float factor;
    void *cos, *sin;
};

// Some rows of a table, in the type of `out`, times `scale`, which is rounded to that type first.
struct GatherTask {
    const void* table;  // its rows begin `stride` numbers apart
    bool table_bf16;
    int64_t stride, width;
    const int64_t* rows;  // nullptr: row after row
    void* out;            // [rows, width]
    float scale;
};

struct EdgeOps {
    void (*turn)(const TurnTask& task, bool bf16, int64_t begin, int64_t end);
    void (*gather)(const GatherTask& task, bool bf16, int64_t begin, int64_t end);
    float (*largest)(const float* x, int64_t count);                  // a NaN counts as infinity
    int64_t (*first_of)(const float* x, int64_t count, float value);  // where `value`, which `largest` gave, stands first
    SamplingOps sampling;
};

}  // namespace kvshare
