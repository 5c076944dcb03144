// A fixed state of each sequence of a step: bytes of its state pages, which lie end to end.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "step_spans.h"

namespace kvshare {

struct StatePlace {
    uint8_t* arena;
    int64_t page_bytes;
    int64_t run;         // which of a sequence's runs its state pages are
    int64_t begin, end;  // bytes
};

// The state of one sequence. Throws std::out_of_range where it lacks the pages.
class State {
  public:
    State(const StatePlace& place, const StepSpan& span) : place_(place), pages_(span.runs[place.run]) { pages_.check(place.begin, place.end, place.page_bytes); }

    void read(int64_t first, int64_t size, void* to) const {
        each(first, size, [&](uint8_t* at, int64_t count) { to = static_cast<uint8_t*>(memcpy(to, at, size_t(count))) + count; });
    }
    void write(int64_t first, int64_t size, const void* from) const {
        each(first, size, [&](uint8_t* at, int64_t count) {
            memcpy(at, from, size_t(count));
            from = static_cast<const uint8_t*>(from) + count;
        });
    }
    // Where bytes `first ... first + size` lie, or `kept` with a copy of them where a page ends between.
    const void* view(int64_t first, int64_t size, void* kept) const {
        const int64_t begin = place_.begin + first;
        if (begin / place_.page_bytes == (begin + size - 1) / place_.page_bytes) return at(begin);
        read(first, size, kept);
        return kept;
    }

  private:
    uint8_t* at(int64_t byte) const { return place_.arena + pages_.pages[byte / place_.page_bytes - pages_.first_page] * place_.page_bytes + byte % place_.page_bytes; }
    template <typename Use>  // (address, bytes)
    void each(int64_t first, int64_t size, Use use) const {
        for (int64_t byte = place_.begin + first, end = byte + size; byte < end;) {
            const int64_t count = std::min(end - byte, place_.page_bytes - byte % place_.page_bytes);
            use(at(byte), count);
            byte += count;
        }
    }

    const StatePlace& place_;
    const PageRun& pages_;
};

}  // namespace kvshare
