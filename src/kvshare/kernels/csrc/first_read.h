// What a piece of work reads first, asked for by threads that have nothing else to do until it comes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

namespace kvshare {

// Bytes that lie behind one another.
struct Run {
    const uint8_t *at, *end;
};

// Where member `thread` of a team of `threads` begins to read in a piece of work; nothing where that is not known before.
using FirstRead = std::function<Run(int thread, int threads)>;

// Asks the memory for the beginning of a run, a few lines at a time.
class Asking {
  public:
    Asking() = default;
    explicit Asking(Run run) : at_(run.at), end_(run.at + std::min<int64_t>(run.end - run.at, MOST)) {}
    bool some() {  // false: all has been asked for
        if (at_ >= end_) return false;
        for (const uint8_t* end = std::min(end_, at_ + AT_ONCE); at_ < end; at_ += LINE) __builtin_prefetch(at_, 0, 2);
        return true;
    }

  private:
    static constexpr int64_t LINE = 64, AT_ONCE = 8 * LINE;
    static constexpr int64_t MOST = 128 << 10;  // of the second-level cache: more does not come sooner, and drives out what the work between needs
    const uint8_t *at_ = nullptr, *end_ = nullptr;
};

}  // namespace kvshare
