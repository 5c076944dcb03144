// Asking for the rows that come next. Included once by isa_avx512.cpp inside its namespace.
#pragma once

// Asks for rows that will be needed a few lines at a time, spread evenly over the work that goes on meanwhile: all at once they would fill
// the queues and stall it. With one KV head these are the values of this block and the keys of the next one; with several, whose vectors lie
// side by side in a row, the next block's keys and values, in the order in which they lie in memory.
struct Ahead {
    const uint8_t* const* rows;  // 2 * ATTEND_ROWS
    int lines[2];                // of a row of the first half and of the second
    int each;                    // lines to ask for at once
    int row = 0, line = 0;

    Ahead(const AttendRows& from, const AttendState& state, int times) {
        static_assert(offsetof(AttendRows, next_k) == offsetof(AttendRows, v) + sizeof from.v && offsetof(AttendRows, next_v) == offsetof(AttendRows, next_k) + sizeof from.next_k);
        const int key_lines = int((state.kv_heads * head_bytes(state.keys, state.key_width) + 63) / 64);
        const int value_lines = int((state.kv_heads * head_bytes(state.values, state.value_width) + 63) / 64);
        const bool single = state.kv_heads == 1;
        rows = single ? from.v : from.next_k;
        lines[0] = single ? value_lines : key_lines;
        lines[1] = single ? key_lines : value_lines;
        each = (ATTEND_ROWS * (key_lines + value_lines) + times - 1) / times;
    }

    void ask() {
        for (int i = 0; i < each && row < 2 * ATTEND_ROWS; i++) {
            _mm_prefetch(reinterpret_cast<const char*>(rows[row]) + 64 * line, _MM_HINT_T0);
            if (++line == lines[row >= ATTEND_ROWS]) {
                line = 0;
                row++;
            }
        }
    }
};
