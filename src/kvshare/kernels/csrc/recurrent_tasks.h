// Layers that carry a state from token to token, and the products between them: what instruction sets are asked to do.
#pragma once
#include <cstdint>

namespace kvshare {

constexpr int64_t WIDEST_UNIT = 512;  // numbers of a head

// out[i] = sum over slots j of softmax_j(gates[j][i]) * values[j][i].
struct PoolTask {
    const float *const *values, *const *gates;  // [slots] addresses of `width` numbers
    int64_t slots, width;
    float* out;
};

// out[t, g] = bias[g] + x[t, g] w[g] for groups of matrices [inputs, outputs] of bfloat16 or, where x is float32, float32. Strides count numbers.
struct SpreadTask {
    const void* x;
    int64_t x_row, x_group;
    const void* weights;
    int64_t weights_group;
    const void* bias;  // [groups, outputs] or nullptr
    void* out;
    int64_t out_row, out_group;
    int64_t rows, inputs, outputs;
};

// x becomes its gelu (with the error function), that times weight, and times factor, and y more: each step rounded, those not asked for left out.
struct ChannelsTask {
    const void *x, *weight, *y;  // [rows, width], [width], [rows, width]
    void* out;                   // [rows, width]; may be x
    int64_t width;
    float factor;
    bool gelu;
};

// (x - mean) / deviation * weight + bias: a layer norm of rows `stride` numbers apart.
struct LayerNormTask {
    const void *x, *weight, *bias;  // [rows, width], [width], [width]
    int64_t stride;
    void* out;  // [rows, width], in one piece
    int64_t width;
    float eps;
};

// total = (x + bias) * scale + (residual + residual_bias) * residual_scale, channel by channel in float32; `rounded` is the same in x's type.
struct ResidualTask {
    const void* x;          // [rows, width]
    const float *residual;  // [rows, width]
    const float *bias, *scale, *residual_bias, *residual_scale;  // [width]
    float* total;
    void* rounded;
    int64_t width;
};

// Compressed convolutional attention (ZAYA), one token: what its convolutions and means make of heads of queries and keys. Channels are heads * width.
struct ConvTask {
    const void* window;          // [taps + grouped_taps - 1, channels], oldest first, the token itself last
    const void *weight, *bias;   // [taps, channels], [channels] of the depthwise convolution
    void* inputs;                // [heads, grouped_taps * width], for the grouped one
    int64_t taps, grouped_taps, heads, width;
};
struct UnitTask {
    const void *packed, *mixed;  // [heads, width] of the token before, and behind, its convolutions
    const void* temperature;     // [kv_heads]
    void* out;                   // [heads, width]
    int64_t query_heads, kv_heads, width;
};

struct RecurrentOps {
    void (*pool)(const PoolTask& task);
    void (*spread)(const SpreadTask& task, bool bf16, int64_t begin, int64_t end);  // groups
    void (*channels)(const ChannelsTask& task, bool bf16, int64_t begin, int64_t end);
    void (*layer_norm)(const LayerNormTask& task, bool bf16, int64_t begin, int64_t end);
    void (*residual)(const ResidualTask& task, bool bf16, int64_t begin, int64_t end);
    void (*depthwise)(const ConvTask& task, bool bf16);
    void (*unit)(const UnitTask& task, bool bf16);
};

}  // namespace kvshare
