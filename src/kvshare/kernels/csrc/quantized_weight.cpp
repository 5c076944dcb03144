#include "quantized_weight.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "team.h"

namespace kvshare {

namespace {

#include "interleave.h"

constexpr int64_t PIECE_BYTES = 192 << 10;          // of weights that a thread takes at once: they stay in its cache for further rows of activations
constexpr int64_t PIECE_ROWS = 256;                 // of weights at most
constexpr int64_t SHARE_OF_REST = 2;                // a thread takes its share of what is left over this: the last pieces are small, none waits long for them
constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;   // below this, waking other threads costs more than they bring
constexpr int64_t ROUNDED_ALONE = 16 << 10;         // activations that the calling thread rounds before it starts the others
constexpr int64_t LINE = 64;                        // bytes of a cache line: vectors that straddle two cost twice

int64_t row_bytes(BlockType type, int64_t k) { return k / shape_of(type).weights * shape_of(type).bytes; }

int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Rows of weights that one thread takes at once.
struct Piece {
    WeightRows weights;
    int64_t first;  // counted from the first row that is asked for
};

// Rows [begin, end) of a matrix in pieces of one format and order each, which begin where a strip does and get smaller towards the end.
class Pieces {
  public:
    Pieces(const std::vector<Segment>& segments, int64_t k, int64_t begin, int64_t end, int threads)
        : segments_(segments), k_(k), begin_(begin), end_(end), threads_(threads), next_(start(threads)) {}

    // run(piece, behind) for one thread's pieces, `behind` being its next one, without rows where it has no other. The first piece of each thread is its
    // own without asking, so that it is known beforehand.
    template <typename Run>
    void share(const Share& thread, Run run) {
        int own = thread.index;
        for (Piece piece = at(start(own)), behind; piece.weights.count; piece = behind) {
            own += thread.count;  // there may be fewer threads than were asked for
            run(piece, behind = at(own < threads_ ? start(own) : take()));
        }
    }

    // Piece number i.
    Piece operator[](int i) const { return at(start(i)); }

  private:
    // The piece that begins with this row of the matrix; one without rows behind the last.
    Piece at(int64_t row) const {
        if (row >= end_) return {};
        const Segment* segment = segments_.data();
        int64_t start = 0;
        for (; row >= start + segment->count; segment++) start += segment->count;
        const int64_t bytes = row_bytes(segment->type, k_), first = row - start, strip = first / STRIP * STRIP;
        const int64_t most = std::min({PIECE_BYTES / bytes, PIECE_ROWS, (end_ - row) / (SHARE_OF_REST * threads_)});
        const int64_t end = std::min({strip + std::max(STRIP, most / STRIP * STRIP), segment->count, end_ - start}), from = segment->interleaved ? strip : first;
        return {{segment->type, segment->interleaved, segment->rows + from * bytes, first - from, end - first}, row - begin_};
    }

    // The first row of piece number i, or `end`.
    int64_t start(int i) const {
        int64_t row = begin_;
        while (i-- > 0 && row < end_) row += at(row).weights.count;
        return row;
    }

    // The first row of a piece that no thread has been given, or `end`.
    int64_t take() {
        int64_t row = next_.load(std::memory_order_relaxed);
        while (row < end_ && !next_.compare_exchange_weak(row, row + at(row).weights.count, std::memory_order_relaxed)) {}
        return row;
    }

    const std::vector<Segment>& segments_;
    const int64_t k_, begin_, end_, threads_;
    alignas(LINE) std::atomic<int64_t> next_;
};

// Room for rounded rows, kept by the calling thread between calls.
class Rounded {
  public:
    Activations room(int64_t rows, int64_t k) {
        const int64_t numbers = rows * 2 * k, groups = whole_lines(rows * k / 32 * 4), halves = whole_lines(rows * k / 16 * 4);
        const int64_t bytes = numbers + 3 * groups + halves + LINE;
        if (int64_t(memory_.size()) < bytes) memory_.resize(size_t(bytes));
        uint8_t* at = memory_.data() + (LINE - int64_t(reinterpret_cast<uintptr_t>(memory_.data()) % LINE)) % LINE;
        const auto take = [&](int64_t size) { return reinterpret_cast<void*>(std::exchange(at, at + size)); };
        return {static_cast<int16_t*>(take(numbers)), static_cast<float*>(take(groups)), static_cast<float*>(take(groups)),
                static_cast<int32_t*>(take(groups)),  static_cast<int32_t*>(take(halves)), rows};
    }

  private:
    std::vector<uint8_t> memory_;
};

void to_bf16(const float* from, int64_t count, uint16_t* to) {  // to nearest even; sums of finite numbers are no NaN that the carry could turn into zero
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        to[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

}  // namespace

QuantizedWeight::QuantizedWeight(std::vector<Segment> segments, int64_t in_features) : in_features_(in_features) {
    // what lies behind the last segment in memory too becomes a part of it: looking for the rows of one of many experts takes a step for each segment
    const auto append = [&](const Segment& more) {
        Segment* last = segments_.empty() ? nullptr : &segments_.back();
        const bool joins = last && last->type == more.type && last->interleaved == more.interleaved && last->rows + last->count * row_bytes(more.type, in_features) == more.rows;
        if (joins) last->count += more.count;
        else segments_.push_back(more);
    };
    for (const Segment& segment : segments) {
        const int64_t unit = shape_of(segment.type).weights;
        if (in_features <= 0 || in_features % unit) throw std::invalid_argument("rows of " + std::to_string(in_features) + " weights are not whole blocks of " + std::to_string(unit));
        out_features_ += segment.count;
        bytes_ += segment.count * row_bytes(segment.type, in_features);
        has_blocks_ |= segment.type != BlockType::BF16;
        const int64_t strips = segment.interleaved ? segment.count / STRIP * STRIP : 0;
        if (strips) append({segment.rows, strips, segment.type, true});
        if (strips < segment.count) append({segment.rows + strips * row_bytes(segment.type, in_features), segment.count - strips, segment.type, false});
    }
}

void QuantizedWeight::multiply(const Isa& isa, const void* x, bool x_bf16, void* out, bool out_bf16, int64_t rows, int64_t begin, int64_t end) const {
    static thread_local Rounded rounded;
    const int64_t k = in_features_, out_features = end - begin;
    if (!rows || !out_features) return;
    const int threads = threads_for(begin, end, most_threads());
    const bool alone = threads == 1;
    Pieces pieces(segments_, k, begin, end, threads);
    const Activations activations = has_blocks_ ? rounded.room(rows, k) : Activations{};
    const auto row = [&](int64_t r) { return static_cast<const uint8_t*>(x) + r * k * (x_bf16 ? 2 : 4); };
    const bool rounded_alone = has_blocks_ && (alone || rows * k <= ROUNDED_ALONE);
    if (rounded_alone)
        for (int64_t r = 0; r < rows; r++) isa.products.round(row(r), x_bf16, 0, k, activations.from(r));
    const int64_t times = (rows + MAX_ROWS - 1) / MAX_ROWS, together = (rows + times - 1) / times;

    in_parallel(threads, [&](const Share& thread) {
        if (has_blocks_ && !rounded_alone) {
            constexpr int64_t unit = 512;  // numbers of all rows that one thread rounds: they lie beside one another
            const int64_t units = (k + unit - 1) / unit;
            thread.each(rows * units, [&](int64_t i) {
                isa.products.round(row(i % rows), x_bf16, i / rows * unit, std::min(k, i / rows * unit + unit), activations.from(i % rows));
            });
            thread.wait_for_all();
        }
        alignas(LINE) float sums[MAX_ROWS * PIECE_ROWS];
        // the piece behind this one is taken before this one is worked on, so that the kernel can ask the memory for it in time
        pieces.share(thread, [&](const Piece& piece, const Piece& behind) {
            const auto [weights, first] = piece;
            const uint8_t* ahead = behind.weights.data ? behind.weights.data : thread.upcoming();
            if (!ahead) ahead = weights.data;
            for (int64_t r = 0; r < rows; r += together) {
                const int count = int(std::min(together, rows - r));
                float* y = out_bf16 ? sums : static_cast<float*>(out) + r * out_features + first;
                const int64_t stride = out_bf16 ? weights.count : out_features;
                if (weights.type == BlockType::BF16) isa.products.multiply_bf16(weights.data, weights.count, k, row(r), x_bf16, count, y, stride, ahead);
                else isa.products.multiply(weights, k, activations.from(r), count, y, stride, ahead);
                for (int j = 0; out_bf16 && j < count; j++) to_bf16(sums + j * stride, weights.count, static_cast<uint16_t*>(out) + (r + j) * out_features + first);
            }
        });
    });
}

int QuantizedWeight::threads_for(int64_t begin, int64_t end, int most) const { return bytes_ / out_features_ * (end - begin) < SINGLE_THREAD_BYTES ? 1 : most; }

Run QuantizedWeight::first_of(int64_t begin, int64_t end, int thread, int threads) const {
    const int sharing = threads_for(begin, end, threads);
    if (thread >= sharing) return {};
    const WeightRows first = Pieces(segments_, in_features_, begin, end, sharing)[thread].weights;
    return {first.data, first.data + (first.skip + first.count) * row_bytes(first.type, in_features_)};
}

void QuantizedWeight::decode(const Isa& isa, int64_t begin, int64_t end, void* to, bool bf16) const {
    Pieces pieces(segments_, in_features_, begin, end, most_threads());
    in_parallel(most_threads(), [&](const Share& thread) {
        pieces.share(thread, [&](const Piece& piece, const Piece&) {
            isa.products.decode(piece.weights, in_features_, static_cast<uint8_t*>(to) + piece.first * in_features_ * (bf16 ? 2 : 4), bf16);
        });
    });
}

}  // namespace kvshare
