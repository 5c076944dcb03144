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
    }

    template <bool Twice = false>
    [[gnu::always_inline]] void ask(int times) {
        for (owed_ += times * pace_; owed_ >= ONE; owed_ -= ONE) one<Twice>();
    }

    // As `ask` so many times, without a branch that depends on what is owed: a little more is left for `finish`.
    template <int Times>
    [[gnu::always_inline]] void evenly() {
        if (at_ >= end_ && !begin()) return;
        const int64_t bytes = Times * pace_ >> 10, whole = (bytes + 40) / 64, lines = whole ? whole : 1;
        for (int64_t i = 0; i < lines; i++) _mm_prefetch(reinterpret_cast<const char*>(at_ + 64 * i), _MM_HINT_T0);
        at_ += bytes < 64 * lines ? bytes : 64 * lines;
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
    const uint8_t *begin_ = nullptr, *at_ = nullptr, *end_ = nullptr;
    const Run *next_, *last_;
};
