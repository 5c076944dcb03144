// Several residual streams: what the operations that mix them are asked to do. X is [rows, streams, width], everything in one piece.
#pragma once
#include <cstdint>

namespace kvshare {

constexpr int64_t MAX_STREAMS = 8;

// AltUp (Gemma 3n). m = tanh(routed * scale).
struct AltUpTask {
    const void* x;
    const void* routed;  // [rows, streams]
    const void* matrix;  // predict: [streams * streams, streams], correct: [streams, streams]; both of x's type
    const void* active;  // correct: [rows, width], what the block made of the first stream
    const void* gain;    // correct: [width], or nullptr: a weight on what is seen of the first stream
    void *out, *seen;    // [rows, streams, width]; correct: [rows, width]
    int64_t streams, width;
    float scale;
};

// Streams 1 ... of x become x + norm(y), in place: y [rows, width].
struct StreamSumTask {
    void* x;
    const void* y;
    const float* weight;  // [width]
    float eps;
    int64_t streams, width;
};

// Rows with the root mean square of `first`.
struct MagnitudeTask {
    const void* first;   // [rows, width], `first_stride` numbers apart
    int64_t first_stride;
    const void* others[MAX_STREAMS];  // [rows, width] each, `others_stride` numbers apart
    int64_t others_stride;
    void* out;  // [rows, streams, width], or their mean [rows, width]
    int64_t streams, width;
    bool mean;
};

// Manifold-constrained hyper-connections (DeepSeek V4): what a block reads, and how it will write.
struct HyperTask {
    const void* x;
    const float* projected;  // [rows, weights] products of `fn` with all streams, and behind them the sum of their squares
    const float *base, *scale;  // [weights]; [3], [1] where the streams are only read
    const float* weight;        // [width] of the norm of what is read
    float norm_eps;
    void* out;           // [rows, width], normed
    float *post, *comb;  // [rows, streams], [rows, streams, streams]; nullptr: the streams are only read
    int64_t streams, width, iterations;
    float rms_eps, eps;
};

struct HyperWriteTask {
    const void *x, *y;  // y [rows, width] is what the block says
    const float *post, *comb;
    void* out;
    int64_t streams, width;
};

struct StreamOps {
    void (*predict)(const AltUpTask& task, bool bf16, int64_t begin, int64_t end);
    void (*correct)(const AltUpTask& task, bool bf16, int64_t begin, int64_t end);
    void (*add)(const StreamSumTask& task, bool bf16, int64_t begin, int64_t end);
    void (*magnitude)(const MagnitudeTask& task, bool bf16, int64_t begin, int64_t end);
    // to = fn[weight] . x for the weights [begin, end), of `length` numbers; weight `weights` itself is the sum of squares
    void (*project)(const void* x, bool bf16, const float* fn, int64_t weights, int64_t length, float* to, int64_t begin, int64_t end);
    void (*read)(const HyperTask& task, bool bf16, int64_t begin, int64_t end);
    void (*write)(const HyperWriteTask& task, bool bf16, int64_t begin, int64_t end);
};

}  // namespace kvshare
