// Asking for the bytes that come next, a few lines at a time, spread evenly over the work that goes on meanwhile: all at once they would fill the queues
// and stall it. Kernels work on a copy of their own, which stays in registers. Included once by the AVX512 files inside their namespace.
#pragma once

class Ahead {
  public:
    // `times`: how often kernels will ask.
    Ahead(const AttendRows& rows, int64_t times) : next_(rows.ahead), last_(rows.ahead + rows.runs) {
        int64_t lines = 0;
        for (const Run* run = next_; run != last_; run++) {
            lines += (run->end - line_of(run->at) + 63) / 64;
            for (const uint8_t* at = run->at; at < run->end; at += 4096) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
        }
        pace_ = times ? (lines * ONE + times - 1) / times : 0;
    }

    [[gnu::always_inline]] void ask(int times) {
        for (owed_ += times * pace_; owed_ >= ONE; owed_ -= ONE) one();
    }

    void finish() {
        while (at_ < end_ || next_ != last_) one();
    }

  private:
    static constexpr int64_t ONE = 1 << 16;

    static const uint8_t* line_of(const uint8_t* at) { return at - (reinterpret_cast<uintptr_t>(at) & 63); }

    [[gnu::always_inline]] void one() {
        if (at_ >= end_) {
            if (next_ == last_) return;
            at_ = line_of(next_->at);
            end_ = next_->end;
            next_++;
        }
        _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T0);
        at_ += 64;
    }

    int64_t pace_, owed_ = 0;  // in lines over ONE
    const uint8_t *at_ = nullptr, *end_ = nullptr;
    const Run *next_, *last_;
};
