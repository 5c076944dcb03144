// Many like parts of one piece of work, shared among the threads where it is worth telling them.
#pragma once
#include "team.h"

namespace kvshare {

constexpr int64_t NUMBERS_OF_A_THREAD = 1 << 15;  // fewer are done before another thread has woken up
constexpr int64_t NUMBERS_OF_A_MEMBER = 1 << 13;  // of a team, which is awake

template <typename Run>  // (begin, end)
void over(int64_t count, int64_t numbers_each, Run run) {
    const int64_t enough = team ? NUMBERS_OF_A_MEMBER : NUMBERS_OF_A_THREAD;
    in_parallel(std::min<int64_t>({most_threads(), count, 1 + count * numbers_each / enough}), [&](const Share& share) {
        run(count * share.index / share.count, count * (share.index + 1) / share.count);
    });
}

}  // namespace kvshare
