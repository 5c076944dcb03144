// Layers that carry a state from token to token, over the sequences of a step of one token each; and products by groups.
#pragma once
#include "quantized_weight.h"
#include "small_ops_calls.h"
#include "step_states.h"

namespace kvshare {

// DeepSeek V4's compressor: what a token adds to its open block, and the entry of a block that it completes.
struct CompressorTask {
    StatePlace values, gates;  // float32 [lead + ratio, projected]: the block before (where entries overlap), then the open one
    const void *x, *gate;      // [sequences, projected], strides in numbers
    int64_t x_stride, gate_stride;
    const float* place_bias;   // [ratio, projected], on gates
    int64_t ratio, width;
    bool overlap;              // `projected` is twice the width: a block takes part in the entry behind it, and in its own
    const void *cos, *sin;     // float32 [sequences, pairs] of the first position of each token's block
    int64_t pairs;
    void* out;                 // [sequences, width]; zeros for a token that completes none
};
void run_compressor(const Isa& isa, const StepSpans& step, const CompressorTask& task, const Norm& norm, bool bf16);

// ZAYA: queries and keys mixed over time, and values of which half are those of the token before.
struct CcaTask {
    StatePlace conv, delayed;  // [channels, taps + grouped_taps - 2], [half]; in `state_bf16` or float32
    bool state_bf16;
    const void* x;             // [sequences, channels + 2 * half]: queries and keys, current values, delayed ones
    int64_t half, taps, grouped_taps, query_heads, kv_heads, width;
    const void *depthwise, *depthwise_bias;  // [taps, channels], [channels]
    const void *grouped, *grouped_bias;      // [heads, grouped_taps * width, width], [heads, width]
    const void* temperature;                 // [kv_heads]
    const void* first_delayed;               // [half] what stands before a sequence's first token, or nullptr for zeros
    void *heads, *values;                    // [sequences, channels], [sequences, 2 * half]
};
void run_cca(const Isa& isa, const StepSpans& step, const CcaTask& task, bool bf16);

void run_spread(const Isa& isa, const SpreadTask& task, int64_t groups, bool bf16);
void run_channels(const Isa& isa, const ChannelsTask& task, bool bf16, int64_t rows);
void run_layer_norm(const Isa& isa, const LayerNormTask& task, bool bf16, int64_t rows);
void run_residual(const Isa& isa, const ResidualTask& task, bool bf16, int64_t rows);

// out[t, g] = rows [first + g * step, first + g * step + outputs) of `weight` . x[t, g]: x [rows, groups, in_features], strides in numbers.
struct GroupsTask {
    const void* x;
    int64_t x_row, x_group;
    int64_t rows, groups, first, step, outputs;
    void* out;  // [rows, groups, outputs]
};
void run_groups(const Isa& isa, const QuantizedWeight& weight, const GroupsTask& task, bool bf16);

}  // namespace kvshare
