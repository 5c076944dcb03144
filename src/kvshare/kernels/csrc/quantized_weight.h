// A matrix that stays in the blocks of its file, as one or more runs of rows (projections that lie behind one another may differ in format).
#pragma once
#include <vector>

#include "kernels.h"

namespace kvshare {

struct Segment {
    const uint8_t* rows;
    int64_t count;
    BlockType type;
    bool interleaved;  // as many rows as are whole strips; the others lie behind them as in the file
};

class QuantizedWeight {
  public:
    // Throws std::invalid_argument where `in_features` is not whole blocks of every segment.
    QuantizedWeight(std::vector<Segment> segments, int64_t in_features, int activation_bytes);

    // out[r, n - begin] = weight[n] . x[r] for n in [begin, end); x and out are float32, or bfloat16 where so said. Where weights are blocks, x is
    // rounded to integers of `activation_bytes` first.
    void multiply(const Isa& isa, const void* x, bool x_bf16, void* out, bool out_bf16, int64_t rows, int64_t begin, int64_t end) const;

    // What one of the threads of a team reads first in `multiply`.
    Run first_read(int64_t begin, int64_t end, int thread, int threads) const;

    // Rows [begin, end) as bfloat16 or float32.
    void decode(const Isa& isa, int64_t begin, int64_t end, void* to, bool bf16) const;

    int64_t in_features() const { return in_features_; }
    int64_t out_features() const { return out_features_; }
    int64_t bytes() const { return bytes_; }

  private:
    int threads_for(int64_t rows_of_weights, int most) const;

    std::vector<Segment> segments_;
    int64_t in_features_, out_features_ = 0, bytes_ = 0;
    int activation_bytes_;  // 1 or 2
    bool has_blocks_ = false, has_bf16_ = false;  // segments in blocks, and those that are not
};

}  // namespace kvshare
