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

constexpr int64_t CACHED_BYTES = 192 << 10;         // of weights that a thread takes at once where its cache is to keep them for further rows of activations
constexpr int64_t MOST_SUMS = 2048;                 // that a thread computes at once
constexpr int64_t SHARE_OF_REST = 2;                // a thread takes what is left of its run over this,
constexpr int64_t LEAST_BYTES = 32 << 10;           // but not less, which it would be slow to begin with
constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;   // below this, waking other threads costs more than they bring
constexpr int64_t ROUNDED_ALONE = 16 << 10;         // activations that the calling thread rounds before it starts the others
constexpr int64_t LINE = 64;                        // bytes of a cache line: vectors that straddle two cost twice

int64_t row_bytes(BlockType type, int64_t k) { return k / shape_of(type).weights * shape_of(type).bytes; }

int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

struct Rows {
    int64_t begin, end;

    int64_t count() const { return end - begin; }
};

// Rows of weights that one thread takes at once.
struct Piece {
    WeightRows weights;
    int64_t first;  // counted from the first row that is asked for
};

// Rows of a matrix, cut in pieces of one format and order each, which begin where a strip does. Every thread has a run of rows of its own and goes through
// it from the front, as memory likes to be read; one that is done takes from the back of another's run. Pieces get smaller towards the end of a run, so
// that no thread waits long for the last one.
class Pieces {
  public:
    Pieces(const std::vector<Segment>& segments, int64_t k, Rows rows, int threads, int64_t most_rows, int64_t most_bytes)
        : segments_(segments), k_(k), rows_(rows), threads_(threads), most_rows_(most_rows), most_bytes_(most_bytes) {}

    // Before pieces are taken: room for what is left of the runs is the calling thread's, and used until its next call.
    void begin() {
        static thread_local std::vector<Left> kept;
        if (kept.size() < size_t(threads_)) kept = std::vector<Left>(size_t(threads_));
        left_ = kept.data();
        for (int i = 0; i < threads_; i++) left_[i].rows.store(packed(run_of(i)), std::memory_order_relaxed);
    }

    // The next piece for a thread; one without rows where nothing is left.
    Piece take(int thread) {
        for (int i = 0; i < threads_; i++) {
            std::atomic<uint64_t>& left = left_[(thread + i) % threads_].rows;
            uint64_t seen = left.load(std::memory_order_relaxed);
            for (Rows rows = unpacked(seen); rows.count(); rows = unpacked(seen)) {
                const Rows taken = i ? back(rows) : front(rows);
                if (left.compare_exchange_weak(seen, packed(i ? Rows{rows.begin, taken.begin} : Rows{taken.end, rows.end}), std::memory_order_relaxed)) return piece(taken);
            }
        }
        return {};
    }

    // What a thread reads first: its run, as far as it is of one format.
    Run beginning(int thread) const {
        const Rows run = run_of(thread);
        if (!run.count()) return {};
        const auto [segment, start] = find(run.begin);
        const WeightRows rows = piece({run.begin, std::min(run.end, start + segment->count)}).weights;
        return {rows.data, rows.data + (rows.skip + rows.count) * row_bytes(rows.type, k_)};
    }

  private:
    struct Left {
        alignas(LINE) std::atomic<uint64_t> rows;  // the first one, and their end in the upper half
    };
    struct Place {
        const Segment* segment;
        int64_t start;  // of the segment in the matrix
    };

    uint64_t packed(Rows rows) const { return uint64_t(rows.begin - rows_.begin) | uint64_t(rows.end - rows_.begin) << 32; }
    Rows unpacked(uint64_t rows) const { return {rows_.begin + int64_t(rows & UINT32_MAX), rows_.begin + int64_t(rows >> 32)}; }

    Place find(int64_t row) const {
        Place place{segments_.data(), 0};
        for (; row >= place.start + place.segment->count; place.segment++) place.start += place.segment->count;
        return place;
    }

    int64_t border(int i) const {  // where thread i's run begins
        const int64_t even = rows_.begin + rows_.count() * i / threads_;
        if (i == 0 || even == rows_.end) return even;
        const Place place = find(even);
        return std::max(rows_.begin, even - (even - place.start) % STRIP);
    }
    Rows run_of(int thread) const { return {border(thread), border(thread + 1)}; }

    // How many of the rows left in a run are taken at once, in whole strips.
    int64_t size(Rows left, const Segment& segment) const {
        const int64_t bytes = row_bytes(segment.type, k_), most = std::min(most_rows_, most_bytes_ / bytes), least = std::min(most, LEAST_BYTES / bytes);
        return std::max(STRIP, std::clamp(left.count() / SHARE_OF_REST, least, most) / STRIP * STRIP);
    }
    Rows front(Rows left) const {
        const auto [segment, start] = find(left.begin);
        const int64_t strip = left.begin - (left.begin - start) % STRIP;
        return {left.begin, std::min({strip + size(left, *segment), start + segment->count, left.end})};
    }
    Rows back(Rows left) const {
        const auto [segment, start] = find(left.end - 1);
        const int64_t begin = left.end - size(left, *segment);
        return {std::max({begin - (begin - start) % STRIP, start, left.begin}), left.end};
    }

    Piece piece(Rows rows) const {
        const auto [segment, start] = find(rows.begin);
        const int64_t first = rows.begin - start, skip = segment->interleaved ? first % STRIP : 0;
        return {{segment->type, segment->interleaved, segment->rows + (first - skip) * row_bytes(segment->type, k_), skip, rows.count()}, rows.begin - rows_.begin};
    }

    const std::vector<Segment>& segments_;
    const int64_t k_;
    const Rows rows_;
    const int threads_;
    const int64_t most_rows_, most_bytes_;
    Left* left_ = nullptr;
};

// Room for rounded rows, kept by the calling thread between calls.
class Rounded {
  public:
    Activations room(int64_t rows, int64_t k, int number_bytes) {
        const int64_t numbers = whole_lines(rows * number_bytes * k), groups = whole_lines(rows * k / 32 * 4), halves = whole_lines(rows * k / 16 * 4);
        const int64_t bytes = numbers + 3 * groups + halves + LINE;
        if (int64_t(memory_.size()) < bytes) memory_.resize(size_t(bytes));
        uint8_t* at = memory_.data() + (LINE - int64_t(reinterpret_cast<uintptr_t>(memory_.data()) % LINE)) % LINE;
        const auto take = [&](int64_t size) { return reinterpret_cast<void*>(std::exchange(at, at + size)); };
        return {static_cast<int8_t*>(take(numbers)), static_cast<float*>(take(groups)), static_cast<float*>(take(groups)),
                static_cast<int32_t*>(take(groups)),  static_cast<int32_t*>(take(halves)), rows, number_bytes};
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

QuantizedWeight::QuantizedWeight(std::vector<Segment> segments, int64_t in_features, int activation_bytes)
    : in_features_(in_features), activation_bytes_(activation_bytes) {
    if (activation_bytes != 1 && activation_bytes != 2) throw std::invalid_argument("activations of " + std::to_string(activation_bytes) + " bytes");
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
        (segment.type == BlockType::BF16 ? has_bf16_ : has_blocks_) = true;
        const int64_t strips = segment.interleaved ? segment.count / STRIP * STRIP : 0;
        if (strips) append({segment.rows, strips, segment.type, true});
        if (strips < segment.count) append({segment.rows + strips * row_bytes(segment.type, in_features), segment.count - strips, segment.type, false});
    }
}

void QuantizedWeight::multiply(const Isa& isa, const void* x, bool x_bf16, void* out, bool out_bf16, int64_t rows, int64_t begin, int64_t end) const {
    static thread_local Rounded rounded;
    const int64_t k = in_features_, out_features = end - begin;
    if (!rows || !out_features) return;
    const int threads = threads_for(out_features, most_threads());
    const int64_t most = has_blocks_ || k < LONG_ROW ? MAX_ROWS : 2 * MAX_ROWS, times = (rows + most - 1) / most, together = (rows + times - 1) / times;
    Pieces pieces(segments_, k, {begin, end}, threads, MOST_SUMS / together, times > 1 ? CACHED_BYTES : INT64_MAX);
    pieces.begin();
    const Activations activations = has_blocks_ ? rounded.room(rows, k, activation_bytes_) : Activations{};
    const auto row = [&](int64_t r) { return static_cast<const uint8_t*>(x) + r * k * (x_bf16 ? 2 : 4); };
    const bool rounded_alone = has_blocks_ && (threads == 1 || rows * k <= ROUNDED_ALONE);
    if (rounded_alone)
        for (int64_t r = 0; r < rows; r++) isa.products.round(row(r), x_bf16, 0, k, activations.from(r));

    in_parallel(threads, [&](const Share& thread) {
        if (has_blocks_ && !rounded_alone) {
            constexpr int64_t unit = 512;  // numbers of all rows that one thread rounds: they lie beside one another
            const int64_t units = (k + unit - 1) / unit;
            thread.each(rows * units, [&](int64_t i) {
                isa.products.round(row(i % rows), x_bf16, i / rows * unit, std::min(k, i / rows * unit + unit), activations.from(i % rows));
            });
            thread.wait_for_all();
        }
        int64_t padded = 0;
        const uint8_t* arranged = has_bf16_ ? static_cast<const uint8_t*>(isa.products.arrange(x, x_bf16, rows, k, together, &padded)) : nullptr;
        alignas(LINE) float sums[MOST_SUMS];
        // the piece behind this one is taken before this one is worked on, so that the kernel can ask the memory for it in time
        for (Piece piece = pieces.take(thread.index), behind; piece.weights.count; piece = behind) {
            behind = pieces.take(thread.index);
            const auto [weights, first] = piece;
            const uint8_t* ahead = behind.weights.count ? behind.weights.data : weights.data;
            for (int64_t r = 0; r < rows; r += together) {
                const int count = int(std::min(together, rows - r));
                float* y = out_bf16 ? sums : static_cast<float*>(out) + r * out_features + first;
                const int64_t stride = out_bf16 ? weights.count : out_features;
                if (weights.type == BlockType::BF16) isa.products.multiply_bf16(weights.data, weights.count, k, arranged + r * padded * (x_bf16 ? 2 : 4), x_bf16, count, y, stride, ahead);
                else isa.products.multiply(weights, k, activations.from(r), count, y, stride, ahead);
                for (int j = 0; out_bf16 && j < count; j++) to_bf16(sums + j * stride, weights.count, static_cast<uint16_t*>(out) + (r + j) * out_features + first);
            }
        }
    });
}

int QuantizedWeight::threads_for(int64_t rows_of_weights, int most) const { return bytes_ / out_features_ * rows_of_weights < SINGLE_THREAD_BYTES ? 1 : most; }

Run QuantizedWeight::first_read(int64_t begin, int64_t end, int thread, int threads) const {
    const int taking = threads_for(end - begin, threads);
    if (begin == end || thread >= taking) return {};
    return Pieces(segments_, in_features_, {begin, end}, taking, MOST_SUMS, INT64_MAX).beginning(thread);
}

void QuantizedWeight::decode(const Isa& isa, int64_t begin, int64_t end, void* to, bool bf16) const {
    const int threads = most_threads();
    Pieces pieces(segments_, in_features_, {begin, end}, threads, MOST_SUMS, CACHED_BYTES);
    pieces.begin();
    in_parallel(threads, [&](const Share& thread) {
        for (Piece piece = pieces.take(thread.index); piece.weights.count; piece = pieces.take(thread.index))
            isa.products.decode(piece.weights, in_features_, static_cast<uint8_t*>(to) + piece.first * in_features_ * (bf16 ? 2 : 4), bf16);
    });
}

}  // namespace kvshare
