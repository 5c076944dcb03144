// Calls of kernels, recorded once and run again. Every binding that computes does so through `perform`, or says with `not_recorded` why it cannot
// be run again: then no half of a recording passes for the whole.
#pragma once
#include <nanobind/nanobind.h>

#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "step_spans.h"
#include "stopwatch.h"
#include "team.h"

namespace kvshare {

class Program {
  public:
    // What a call was given is in it: addresses whose memory must outlive the program. The instruction set and where the step's tokens stand are not.
    using Call = std::function<void(const Isa&, const StepSpans&)>;

    explicit Program(StepSpans recorded_from) : recorded_from_(recorded_from) {}

    void append(Call call, const Reads& reads = {}) {
        if (reads.shared) shared_ = calls_.size();
        else if (shared_ < calls_.size()) calls_[shared_].behind.insert(calls_[shared_].behind.end(), reads.alone.begin(), reads.alone.end());
        calls_.push_back({std::move(call), reads.shared, {}});
    }
    void append(const StepSpans& spans, Call call) {
        if (spans.spans == recorded_from_.spans) append(std::move(call));
        else refuse("rows of another step");
    }
    void refuse(const char* why) {
        if (refusal_.empty()) refusal_ = why;
    }
    const std::string& refusal() const { return refusal_; }  // empty: everything that was computed is in it
    int64_t size() const { return int64_t(calls_.size()); }

    void run(int64_t begin, int64_t end, const StepSpans& spans) const {
        const Isa& isa = active_isa();
        const auto lead = [&] {
            for (int64_t i = begin, next = begin; i < end; i++) {
                if (next == i)
                    for (next++; next < end && !calls_[size_t(next)].first_read;) next++;
                const Recorded& call = calls_[size_t(i)];
                if (team) team->expect({next < end ? &calls_[size_t(next)].first_read : nullptr, &call.behind});
                call.run(isa, spans);
            }
        };
        if (end - begin < LEAST_CALLS) lead();
        else Team::open(lead);
    }

  private:
    static constexpr int64_t LEAST_CALLS = 4;  // fewer take their threads one by one sooner than they open a team

    StepSpans recorded_from_;
    struct Recorded {
        Call run;
        FirstRead first_read;     // of work that is shared, where it is known
        std::vector<Run> behind;  // what operations between this and the next one of that kind read
    };
    size_t shared_ = SIZE_MAX;  // the last call with a `first_read`
    std::vector<Recorded> calls_;
    std::string refusal_;
};

inline thread_local Program* recording = nullptr;  // what the kernels that this thread calls are added to

enum class Gil { kept, released };  // while a call runs; released where it takes long

// Runs call(isa), and records it where this thread records. Called with the GIL held; an object that must stay alive may be captured as nb::object.
// `work` is what a stopwatch counts its time as, `reads` what threads may ask for before.
template <typename Call>
void perform(Gil gil, Call call, Work work = Work::small, const Reads& reads = {}) {
    auto timed = [call = std::move(call), work](const Isa& isa) {
        const Timed timer(work);
        call(isa);
    };
    {
        std::optional<nanobind::gil_scoped_release> released;
        if (gil == Gil::released) released.emplace();
        timed(active_isa());
    }
    if (recording) recording->append([timed = std::move(timed)](const Isa& isa, const StepSpans&) { timed(isa); }, reads);
}

// The same for call(isa, spans): what it does with the step's tokens and rows.
template <typename Call>
void perform(Gil gil, const StepSpans& spans, Call call, Work work = Work::small) {
    auto timed = [call = std::move(call), work](const Isa& isa, const StepSpans& own) {
        const Timed timer(work);
        call(isa, own);
    };
    {
        std::optional<nanobind::gil_scoped_release> released;
        if (gil == Gil::released) released.emplace();
        timed(active_isa(), spans);
    }
    if (recording) recording->append(spans, std::move(timed));
}

inline void not_recorded(const char* what) {
    if (recording) recording->refuse(what);
}

}  // namespace kvshare
