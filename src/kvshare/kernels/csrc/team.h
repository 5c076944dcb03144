// Threads that share pieces of work. While a team is open (a whole replay), its members wait for the leader's next piece without leaving: posting one
// takes a tenth of what opening a parallel region does. Where none is open, a piece of work is a parallel region of its own.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>

#include "first_read.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvshare {

// Waiting for what another thread is about to do. Where it does not come soon, that thread may need this one's processor.
class Wait {
  public:
    void once() {
        if (times_++ >= SPINS) std::this_thread::yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }

  private:
    static constexpr int SPINS = 1 << 12;  // some 50 us: most pieces of a decode step are shorter
    int times_ = 0;
};

class Team;

// What one thread is of those that share a piece of work.
struct Share {
    int index, count;
    Team* team;  // nullptr: a parallel region's

    void wait_for_all() const;  // all must come here, and none goes on before
    // run(i) for this one's part of 0 ... count - 1.
    template <typename Run>
    void each(int64_t num, Run run) const {
        for (int64_t i = num * index / count; i < num * (index + 1) / count; i++) run(i);
    }
};

class Team {
  public:
    explicit Team(int most) : seats_(new Seat[size_t(most)]) {}

    // Runs lead() with as many threads at its service as a parallel region gets; what it throws is thrown here, when they have left.
    template <typename Lead>
    static void open(Lead lead);

    int size() const { return size_; }

    // What comes behind the next piece of work: members who are done with theirs ask the memory for it.
    void expect(const Coming& coming) { coming_ = coming; }

    // work(share) in the first `count` members, the leader among them. It must not throw: the others would wait for it forever.
    template <typename Run>
    void run(int count, const Run& work) {
        work_ = &work;
        call_ = [](const void* given, const Share& share) noexcept { (*static_cast<const Run*>(given))(share); };
        count_ = count;
        generation_++;
        for (int i = 1; i < count; i++) seats_[i].posted.store(generation_, std::memory_order_release);
        call_(work_, {0, count, this});
        Asking lines = coming_.ask(0, size_);
        for (int i = 1; i < count; i++)
            for (Wait wait; seats_[i].done.load(std::memory_order_acquire) != generation_;)
                if (!lines.some()) wait.once();
    }

    void wait_for_all(int count) {
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (Wait wait; phase_.load(std::memory_order_acquire) == phase;) wait.once();
    }

  private:
    void serve(int index) {
        Seat& seat = seats_[index];
        Asking lines;
        for (uint32_t seen = 0, posted;; seen = posted) {
            for (Wait wait; (posted = seat.posted.load(std::memory_order_acquire)) == seen;)
                if (!lines.some()) wait.once();
            if (posted == CLOSED) return;
            const Coming coming = coming_;  // before the leader, who waits for this one, names another
            call_(work_, {index, count_, this});
            seat.done.store(posted, std::memory_order_release);
            lines = coming.ask(index, size_);
        }
    }
    void close() {
        for (int i = 1; i < size_; i++) seats_[i].posted.store(CLOSED, std::memory_order_release);
    }

    static constexpr uint32_t CLOSED = UINT32_MAX;
    struct Seat {
        alignas(64) std::atomic<uint32_t> posted{0};  // the generation of the newest piece of work that this member takes part in
        alignas(64) std::atomic<uint32_t> done{0};
    };

    std::unique_ptr<Seat[]> seats_;
    Coming coming_;
    const void* work_ = nullptr;
    void (*call_)(const void*, const Share&) noexcept = nullptr;
    int count_ = 1, size_ = 1;
    uint32_t generation_ = 0;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

inline thread_local Team* team = nullptr;  // that this thread leads, while it waits for work

template <typename Lead>
void Team::open(Lead lead) {
    const int most = omp_get_max_threads();
    if (most < 2 || omp_in_parallel()) {
        lead();
        return;
    }
    Team own(most);
    std::exception_ptr error;
#pragma omp parallel num_threads(most)
    if (omp_get_thread_num()) {
        own.serve(omp_get_thread_num());
    } else {
        own.size_ = omp_get_num_threads();
        team = &own;
        try {
            lead();
        } catch (...) {
            error = std::current_exception();
        }
        team = nullptr;
        own.close();
    }
    if (error) std::rethrow_exception(error);
}

inline void Share::wait_for_all() const {
    if (count == 1) return;
    if (team) {
        team->wait_for_all(count);
    } else {
#pragma omp barrier
    }
}

// How many threads can share a piece of work.
inline int most_threads() { return team ? team->size() : omp_get_max_threads(); }

// work(share) in up to `threads` threads at once, this one among them.
template <typename Run>
void in_parallel(int64_t threads, const Run& work) {
    if (threads < 2) {
        work(Share{0, 1, nullptr});
        return;
    }
    if (Team* own = team) {
        team = nullptr;  // within the work, it is busy
        own->run(int(std::min<int64_t>(threads, own->size())), work);
        team = own;
        return;
    }
#pragma omp parallel num_threads(int(threads))
    work(Share{omp_get_thread_num(), omp_get_num_threads(), nullptr});
}

// run(i) for 0 ... count - 1, each by the next thread that is free.
template <typename Run>
void in_turn(int64_t count, Run run) {
    std::atomic<int64_t> next{0};
    in_parallel(std::min<int64_t>(count, most_threads()), [&](const Share&) {
        for (int64_t i = next++; i < count; i = next++) run(i);
    });
}

}  // namespace kvshare
