// Where the tokens of a step stand in their sequences, and the pages that hold each sequence's rows. All of this changes from step to step.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kvshare {

// The pages of one (owner, stream) of one sequence, as Python keeps them: 64-bit integers.
struct PageRun {
    const int32_t* pages;
    int64_t first_page, num_pages;

    // Throws std::out_of_range unless rows [begin, end), of which a page holds `rows_per_page`, have their pages.
    void check(int64_t begin, int64_t end, int64_t rows_per_page) const {
        const int64_t first = begin / rows_per_page, last = (end - 1) / rows_per_page;
        if (begin < end && (first < first_page || last >= first_page + num_pages))
            throw std::out_of_range("rows of pages " + std::to_string(first) + " to " + std::to_string(last) + ", but the sequence holds " + std::to_string(first_page) +
                                    " to " + std::to_string(first_page + num_pages - 1));
    }
};

// The new tokens of one sequence: rows row ... row + count - 1 of the batch, at positions first ... first + count - 1.
struct StepSpan {
    const PageRun* runs;  // of all its tables
    int64_t first, count, row;
};

struct StepSpans {
    const StepSpan* spans;
    int64_t count;

    const StepSpan* begin() const { return spans; }
    const StepSpan* end() const { return spans + count; }
};

}  // namespace kvshare
