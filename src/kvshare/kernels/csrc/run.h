#pragma once
#include <cstdint>

namespace kvshare {

// Bytes that lie behind one another.
struct Run {
    const uint8_t *at, *end;
};

}  // namespace kvshare
