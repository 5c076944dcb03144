// What the operations between the products are asked to do. Strides count numbers; the last dimension of everything is in one piece.
#pragma once
#include <cstdint>

#include "edge_tasks.h"
#include "recurrent_tasks.h"
#include "routing_tasks.h"
#include "stream_tasks.h"

namespace kvshare {

// Heads of x, normed if `weight` is given and then rotated if there are `pairs`: [rows, heads, width] -> `out`, in one piece.
struct HeadsTask {
    const void* x;
    void* out;
    int64_t row_stride, head_stride, heads, width;
    const float* weight;  // [width], with whatever its model adds to it; nullptr: no norm
    float eps;
    const void *cos, *sin;  // [rows, pairs]
    bool precise;           // these two are float32 whatever x is: then a rotation is rounded once
    int64_t pairs;
    bool interleaved;  // pairs (2i, 2i + 1) of the last numbers instead of (i, i + pairs) of the first
};

// sum = (x + norm(y)) * scale, and normed = norm(sum): [rows, width] each, where either norm may be missing.
struct SumTask {
    const void *x, *y;
    void *sum, *normed;  // normed only where there is `weight`
    int64_t width;
    const float *y_weight, *weight;  // [width] or nullptr
    float y_eps, eps, scale;
};

struct Activation {
    bool gelu;         // in its tanh form; otherwise SiLU
    float limit;       // gates are at most that, the others' magnitude, too; infinity: no limit
    float deviations;  // gates lose their row's mean plus that many of its standard deviations, and what is then negative; -infinity: they lose nothing
};

// out = activation(gate) * up: [rows, width], out in one piece.
struct GateTask {
    const void *gate, *up;
    void* out;
    int64_t gate_stride, up_stride, width;
    Activation activation;
};

// out = sum over k of weights * y, each sum rounded, then times `scale` and plus `beside`: y[rows, k, width] -> out[rows, width].
struct CombineTask {
    const void *y, *weights;  // weights[rows, k], of y's type or float32
    bool weights_bf16;
    const void* beside;  // [rows, width] or nullptr
    void* out;
    int64_t k, width;
    float scale;
};

// x * softplus(gate), the gate rounded first: heads of x [rows, heads, width], gates [rows, heads] or one for each number.
struct SoftplusTask {
    const void *x, *gate;
    void* out;
    int64_t heads, width;
    bool per_head;
};

// x = x * factor + bias: [rows, width], in place.
struct AffineTask {
    void* x;
    const void* bias;  // [width] or nullptr
    int64_t width;
    float factor;
};

// What every instruction set provides: rows [begin, end) of a task, in bfloat16 or float32.
struct SmallOps {
    void (*heads)(const HeadsTask& task, bool bf16, int64_t begin, int64_t end);
    void (*sum)(const SumTask& task, bool bf16, int64_t begin, int64_t end);
    void (*gate)(const GateTask& task, bool bf16, int64_t begin, int64_t end);
    void (*affine)(const AffineTask& task, bool bf16, int64_t begin, int64_t end);
    void (*cap)(float* x, int64_t count, float cap);  // x = cap * tanh(x / cap)
    void (*combine)(const CombineTask& task, bool bf16, int64_t begin, int64_t end);
    void (*softplus)(const SoftplusTask& task, bool bf16, int64_t begin, int64_t end);
    void (*route)(const RouteTask& task, int64_t begin, int64_t end);
    StreamOps streams;
    EdgeOps edges;
    RecurrentOps recurrent;
};

}  // namespace kvshare
