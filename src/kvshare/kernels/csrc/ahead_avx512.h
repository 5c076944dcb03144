// Asking for the bytes that come next, a few lines at a time, spread evenly over the work that goes on meanwhile: all at once they would fill the queues
// and stall it. Even so a core drops some while as many as it can wait for are under way: kernels that are done sooner than their memory ask twice. They
// work on a copy of their own, which stays in registers. Included once by the AVX512 files inside their namespace.
#pragma once

class Ahead {
  public:
    // `times`: how often kernels will ask. `pages`: whether the beginnings of all pages are asked for right away.
    Ahead(const AttendRows& rows, int64_t times, bool pages) : next_(rows.ahead), last_(rows.ahead + rows.runs) {
        int64_t lines = 0;
        for (const Run* run = next_; run != last_; run++) {
            lines += (run->end - line_of(run->at) + 63) / 64;
            for (const uint8_t* at = run->at; pages && at < run->end; at += 4096) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
        }
        pace_ = times ? (lines * ONE + times - 1) / times : 0;
        once_ = pace_ < ONE ? pace_ / (ONE / 64) : 64;
        eight_ = pace_ / (ONE / 64) * 16 - 8 * once_;
        eight_lines_ = (eight_ + 32) / 64;
        if (eight_ > 64 * eight_lines_) eight_ = 64 * eight_lines_;
    }

    template <bool Twice = false>
    [[gnu::always_inline]] void ask(int times) {
        for (owed_ += times * pace_; owed_ >= ONE; owed_ -= ONE) one<Twice>();
    }

    // As `ask` eight times, or once or twice, without branches that depend on what is owed: at most one line for each of the latter, where eight are
    // asked for so much the more. What is left over is `finish`'s.
    [[gnu::always_inline]] void evenly_eight() {
        if (at_ >= end_ && !begin()) return;
        for (int64_t i = 0; i < eight_lines_; i++) _mm_prefetch(reinterpret_cast<const char*>(at_ + 64 * i), _MM_HINT_T0);
        at_ += eight_;
    }
    template <int Times>
    [[gnu::always_inline]] void evenly() {
        if (at_ >= end_ && !begin()) return;
        for (int i = 0; i < Times; i++, at_ += once_) _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T0);
    }

    void finish() {
        while (at_ < end_ || next_ != last_) one<false>();
    }

  private:
    static constexpr int64_t ONE = 1 << 16;
    static constexpr int64_t AGAIN = 2 << 10;  // so many bytes behind, a run is asked for again

    static const uint8_t* line_of(const uint8_t* at) { return at - (reinterpret_cast<uintptr_t>(at) & 63); }

    bool begin() {  // the next run
        if (next_ == last_) return false;
        at_ = begin_ = line_of(next_->at);
        end_ = next_->end;
        next_++;
        return true;
    }

    template <bool Twice>
    [[gnu::always_inline]] void one() {
        if (at_ >= end_ && !begin()) return;
        _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T0);
        if (Twice && at_ - begin_ >= AGAIN) _mm_prefetch(reinterpret_cast<const char*>(at_ - AGAIN), _MM_HINT_T0);
        at_ += 64;
    }

    int64_t pace_, owed_ = 0;  // in lines over ONE
    int64_t once_, eight_, eight_lines_;  // `evenly`: bytes to the next place that is asked for, and how many lines eight times are
    const uint8_t *begin_ = nullptr, *at_ = nullptr, *end_ = nullptr;
    const Run *next_, *last_;
};
