// What calls of a program read first: it has lain still since the step before, and is asked for before its turn, by threads that have nothing else to do.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "run.h"

namespace kvshare {

// Where member `thread` of a team of `threads` begins to read in a piece of work.
using FirstRead = std::function<Run(int thread, int threads)>;

struct Reads {
    std::vector<Run> alone;  // of an operation that one thread does: all
    FirstRead shared;        // of work that is shared; neither where nothing is known
};

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

// What comes behind a piece of work.
struct Coming {
    const FirstRead* shared = nullptr;           // the next piece; it must stay until another is named
    const std::vector<Run>* alone = nullptr;  // the operations before that

    // The beginning of the next piece for one thread, of which some has been asked for; before that the leader asks for all of the operations between.
    Asking ask(int thread, int threads) const {
        if (alone && thread == 0)
            for (const Run& run : *alone)
                for (Asking lines(run); lines.some();) {}
        Asking lines = shared ? Asking((*shared)(thread, threads)) : Asking();
        for (int i = 0; i < AT_LEAST && lines.some(); i++) {}
        return lines;
    }

  private:
    static constexpr int AT_LEAST = 8;  // as many lines as one thread can wait for at a time
};

}  // namespace kvshare
