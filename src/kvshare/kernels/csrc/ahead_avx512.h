// Asking for the rows that come next, a few lines at a time, spread over the work that goes on meanwhile: all at once they would fill the queues and
// stall it. With one KV head these are the values of this block and the keys of the next one; with several, whose vectors lie side by side in
// a row, the next block's keys and values. Included once by isa_avx512.cpp inside its namespace.
#pragma once

class Ahead {
  public:
    Ahead(const AttendRows& from, const AttendState& state) {
        static_assert(offsetof(AttendRows, next_k) == offsetof(AttendRows, v) + sizeof from.v && offsetof(AttendRows, next_v) == offsetof(AttendRows, next_k) + sizeof from.next_k);
        const int64_t key_bytes = state.kv_heads * head_bytes(state.keys, state.key_width), value_bytes = state.kv_heads * head_bytes(state.values, state.value_width);
        const bool single = state.kv_heads == 1;
        const uint8_t* const* rows = single ? from.v : from.next_k;
        const int64_t bytes[2] = {single ? value_bytes : key_bytes, single ? key_bytes : value_bytes};
        Piece* piece = pieces_;
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < ATTEND_ROWS; t++) {  // rows of a page lie behind one another
                const uint8_t* row = rows[half * ATTEND_ROWS + t];
                if (t && row == piece[-1].end) piece[-1].end += bytes[half];
                else if (!t || row + bytes[half] != piece[-1].end) *piece++ = {row - (reinterpret_cast<uintptr_t>(row) & 63), row + bytes[half]};
            }
        last_ = piece;
    }

    int64_t lines() const {
        int64_t count = 0;
        for (const Piece* piece = pieces_; piece != last_; piece++) count += (piece->end - piece->at + 63) / 64;
        return count;
    }

    [[gnu::always_inline]] void ask(int lines) {
        for (int i = 0; i < lines; i++) {
            if (next_ == last_) return;
            _mm_prefetch(reinterpret_cast<const char*>(next_->at), _MM_HINT_T0);
            if ((next_->at += 64) >= next_->end) next_++;
        }
    }

    void finish() { while (next_ != last_) ask(1); }

    int each = 1;  // lines that rows of bfloat16 ask for at once

  private:
    struct Piece {
        const uint8_t *at, *end;
    };
    Piece pieces_[2 * ATTEND_ROWS], *next_ = pieces_, *last_;
};
