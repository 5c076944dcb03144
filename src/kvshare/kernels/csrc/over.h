// Many like parts of one piece of work, shared among the threads where it is worth waking them.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace kvshare {

constexpr int64_t NUMBERS_OF_A_THREAD = 1 << 15;  // fewer are done before another thread has woken up

template <typename Run>  // (begin, end)
void over(int64_t count, int64_t numbers_each, Run run) {
    const int64_t threads = std::min<int64_t>({omp_get_max_threads(), count, 1 + count * numbers_each / NUMBERS_OF_A_THREAD});
    if (threads < 2) {
        run(0, count);
        return;
    }
#pragma omp parallel num_threads(int(threads))
    {
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        run(count * part / parts, count * (part + 1) / parts);
    }
}

}  // namespace kvshare
