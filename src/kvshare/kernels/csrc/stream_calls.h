// Operations on several residual streams over all rows.
#pragma once
#include "small_ops_calls.h"

namespace kvshare {

void run_predict(const Isa& isa, const AltUpTask& task, bool bf16, int64_t rows);
void run_correct(const Isa& isa, const AltUpTask& task, bool bf16, int64_t rows);
void run_stream_sum(const Isa& isa, StreamSumTask task, const Norm& norm, bool bf16, int64_t rows);
void run_magnitude(const Isa& isa, const MagnitudeTask& task, bool bf16, int64_t rows);
// `task` without its products and its norm; fn[weights, streams * width].
void run_hyper_read(const Isa& isa, HyperTask task, const float* fn, const Norm& norm, bool bf16, int64_t rows);
void run_hyper_write(const Isa& isa, const HyperWriteTask& task, bool bf16, int64_t rows);

}  // namespace kvshare
