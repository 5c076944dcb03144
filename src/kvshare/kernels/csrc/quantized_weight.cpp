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
constexpr int64_t PIECES_A_THREAD = 8;              // at least, where there are enough rows, so that a thread that is held up keeps none waiting
constexpr int64_t UNIT = 2 * STRIP;                 // rows of weights that a piece holds multiples of
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

// Rows [begin, end) of a matrix in pieces of one format and order each, which begin where a strip does.
class Pieces {
  public:
    Pieces(const std::vector<Segment>& segments, int64_t k, int64_t begin, int64_t end, int64_t threads)
        : segments_(segments), k_(k), begin_(begin), end_(end), shared_((end - begin) / (PIECES_A_THREAD * threads)) {
        int64_t start = 0;
        for (const Segment& segment : segments_) {
            count_ += pieces_of(segment, start);
            start += segment.count;
        }
    }
    int64_t count() const { return count_; }

    Piece operator[](int64_t i) const {
        int64_t start = 0;
        for (const Segment& segment : segments_) {
            const int64_t here = pieces_of(segment, start);
            if (i < here) {
                const int64_t from = low(start), each = step(segment), strip = from / STRIP * STRIP + i * each, first = std::max(from, strip);
                const int64_t count = std::min(strip + each, high(segment, start)) - first, row = segment.interleaved ? strip : first;
                return {{segment.type, segment.interleaved, segment.rows + row * row_bytes(segment.type, k_), first - row, count}, start + first - begin_};
            }
            i -= here;
            start += segment.count;
        }
        return {};
    }

  private:
    // the rows of a segment that are asked for
    int64_t low(int64_t start) const { return std::max<int64_t>(0, begin_ - start); }
    int64_t high(const Segment& segment, int64_t start) const { return std::min(segment.count, end_ - start); }
    int64_t pieces_of(const Segment& segment, int64_t start) const {
        const int64_t from = low(start), to = high(segment, start);
        return from < to ? (to - from / STRIP * STRIP + step(segment) - 1) / step(segment) : 0;
    }
    int64_t step(const Segment& segment) const {
        const int64_t most = std::min({PIECE_BYTES / row_bytes(segment.type, k_), PIECE_ROWS, shared_});
        return std::max(UNIT, most / UNIT * UNIT);
    }

    const std::vector<Segment>& segments_;
    int64_t k_, begin_, end_, shared_, count_ = 0;
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
    const bool alone = bytes_ / out_features_ * out_features < SINGLE_THREAD_BYTES;
    const Pieces pieces(segments_, k, begin, end, alone ? 1 : most_threads());
    const Activations activations = has_blocks_ ? rounded.room(rows, k) : Activations{};
    const auto row = [&](int64_t r) { return static_cast<const uint8_t*>(x) + r * k * (x_bf16 ? 2 : 4); };
    const bool rounded_alone = has_blocks_ && (alone || rows * k <= ROUNDED_ALONE);
    if (rounded_alone)
        for (int64_t r = 0; r < rows; r++) isa.products.round(row(r), x_bf16, 0, k, activations.from(r));
    const int64_t times = (rows + MAX_ROWS - 1) / MAX_ROWS, together = (rows + times - 1) / times;
    alignas(LINE) std::atomic<int64_t> next{0};

    in_parallel(alone ? 1 : most_threads(), [&](const Share& thread) {
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
        for (int64_t i = next++, behind; i < pieces.count(); i = behind) {
            behind = next++;
            const auto [weights, first] = pieces[i];
            const uint8_t* ahead = behind < pieces.count() ? pieces[behind].weights.data : weights.data;
            for (int64_t r = 0; r < rows; r += together) {
                const int count = int(std::min(together, rows - r));
                float* y = out_bf16 ? sums : static_cast<float*>(out) + r * out_features + first;
                const int64_t stride = out_bf16 ? weights.count : out_features;
                if (weights.type == BlockType::BF16) isa.products.multiply_bf16(weights.data, weights.count, k, row(r), x_bf16, count, y, stride, ahead);
                else isa.products.multiply(weights, k, activations.from(r), count, y, stride, ahead);
                for (int j = 0; out_bf16 && j < count; j++) to_bf16(sums + j * stride, weights.count, static_cast<uint16_t*>(out) + (r + j) * out_features + first);
            }
        }
    });
}

void QuantizedWeight::decode(const Isa& isa, int64_t begin, int64_t end, void* to, bool bf16) const {
    const Pieces pieces(segments_, in_features_, begin, end, most_threads());
    in_turn(pieces.count(), [&](int64_t i) {
        const auto [weights, first] = pieces[i];
        isa.products.decode(weights, in_features_, static_cast<uint8_t*>(to) + first * in_features_ * (bf16 ? 2 : 4), bf16);
    });
}

}  // namespace kvshare
