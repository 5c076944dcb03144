// Where a step's time goes: what the kernels took, by kind of work. Off unless a thread has started a stopwatch.
#pragma once
#include <array>
#include <chrono>
#include <cstdint>

namespace kvshare {

enum class Work : int { product, attention, small };  // weights times activations; cached rows; everything else
constexpr int NUM_WORKS = 3;

struct Stopwatch {
    struct Lap {
        double seconds = 0;
        int64_t calls = 0;
    };
    std::array<Lap, NUM_WORKS> laps;
};

inline thread_local Stopwatch* stopwatch = nullptr;  // of the kernels that this thread calls

class Timed {
  public:
    explicit Timed(Work work) : lap_(stopwatch ? &stopwatch->laps[size_t(work)] : nullptr) {
        if (lap_) begun_ = std::chrono::steady_clock::now();
    }
    ~Timed() {
        if (!lap_) return;
        lap_->seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun_).count();
        lap_->calls++;
    }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

  private:
    Stopwatch::Lap* lap_;
    std::chrono::steady_clock::time_point begun_;
};

}  // namespace kvshare
