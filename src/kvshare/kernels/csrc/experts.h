// A few rows through the few experts that their router chose: gated feed-forward layers whose weights are read where they lie.
#pragma once
#include "kernels.h"
#include "quantized_weight.h"

namespace kvshare {

struct ExpertsTask {
    const void* x;  // [rows, hidden]
    bool bf16;
    int64_t rows, k, num_experts;
    const int64_t* chosen;  // [rows, k]; num_experts stands for no expert, which adds nothing
    const void* weights;    // [rows, k]
    bool weights_bf16;
    Activation activation;
    float scale;
    const void* beside;  // [rows, hidden] or nullptr
    void* out;           // [rows, hidden]: scale * sum of weights * experts + beside
};

// gate_up [num_experts * 2 * width, hidden], of each expert its gates first; down [num_experts * hidden, width].
// Throws std::out_of_range for an expert that is not there, before anything is written.
void run_experts(const Isa& isa, const QuantizedWeight& gate_up, const QuantizedWeight& down, const ExpertsTask& task);

}  // namespace kvshare
