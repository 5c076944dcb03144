#include "quantized_weight.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvshare {

static constexpr int64_t PIECE_BYTES = 48 << 10;      // weights that a thread takes at once: they stay in its cache for further rows of activations
static constexpr int64_t SINGLE_THREAD_BYTES = 64 << 10;  // below this, waking other threads costs more than they bring

static int64_t row_bytes(BlockType type, int64_t k) { return k / shape_of(type).weights * shape_of(type).bytes; }

QuantizedWeight::QuantizedWeight(std::vector<Segment> segments, int64_t in_features) : segments_(std::move(segments)), in_features_(in_features) {
    for (const Segment& segment : segments_) {
        const int64_t unit = shape_of(segment.type).weights;
        if (in_features <= 0 || in_features % unit) throw std::invalid_argument("rows of " + std::to_string(in_features) + " weights are not whole blocks of " + std::to_string(unit));
        out_features_ += segment.count;
        bytes_ += segment.count * row_bytes(segment.type, in_features);
    }
}

std::vector<QuantizedWeight::Piece> QuantizedWeight::pieces(int64_t begin, int64_t end) const {
    std::vector<Piece> all;
    int64_t start = 0;
    for (const Segment& segment : segments_) {
        const int64_t bytes = row_bytes(segment.type, in_features_), step = std::max<int64_t>(1, PIECE_BYTES / bytes);
        const int64_t low = std::max(begin, start), high = std::min(end, start + segment.count);
        for (int64_t n = low; n < high; n += step) all.push_back({segment.rows + (n - start) * bytes, n - begin, std::min(step, high - n), segment.type});
        start += segment.count;
    }
    return all;
}

namespace {

constexpr size_t LINE = 64;  // bytes of a cache line: vectors that straddle two cost twice

template <typename T>
T* aligned(T* p) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + LINE - 1) / LINE * LINE);
}

// Buffers for rounded rows, kept by the calling thread between calls. A row is the sum of two of 8 bits: itself, and what rounding left of it.
// Together they are as exact as 16 bits, and where memory is the limit the second costs little: the same weights are in the registers.
struct Rounded {
    std::vector<int8_t> q;
    std::vector<float> floats;
    std::vector<Activations> rows;   // [2 count]: each row, and behind it what is left of it
    std::vector<Activations> exact;  // [count]: each row only, for weights that are multiplied with the row before rounding

    void resize(int64_t count, int64_t k) {
        const int64_t each = k + 2 * (k / 32) + k / 16;
        q.resize(size_t(2 * count * k) + LINE);
        floats.resize(size_t(2 * count * each) + LINE);
        int8_t* first_q = aligned(q.data());
        float* first_float = aligned(floats.data());
        rows.resize(size_t(2 * count));
        exact.resize(size_t(count));
        for (int64_t r = 0; r < 2 * count; r++) {
            float *numbers = first_float + r * each, *scale = numbers + k, *sum = scale + k / 32, *sum16 = sum + k / 32;
            rows[size_t(r)] = {first_q + r * k, scale, sum, sum16, numbers};
            if (r % 2 == 0) exact[size_t(r / 2)] = rows[size_t(r)];
        }
    }
};

void store(const float* from, int64_t count, void* to, bool bf16, int64_t at) {
    if (!bf16) {
        memcpy(static_cast<float*>(to) + at, from, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < count; i++) {  // to nearest even; sums of finite numbers are no NaN that the carry could turn into zero
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        out[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

}  // namespace

void QuantizedWeight::multiply(const Isa& isa, const void* x, void* out, bool bf16, int64_t rows, int64_t begin, int64_t end) const {
    static thread_local Rounded rounded;
    static thread_local std::vector<Piece> work;
    const int64_t padded = (in_features_ + PADDED - 1) / PADDED * PADDED, unit = 2048;
    rounded.resize(rows, padded);
    work = pieces(begin, end);
    const Activations *doubled = rounded.rows.data(), *exact = rounded.exact.data();  // a thread_local is another one inside the parallel region
    const Piece* piece = work.data();
    const int64_t num_pieces = int64_t(work.size()), out_features = end - begin, units = (padded + unit - 1) / unit;
    std::atomic<int64_t> next{0};
    const bool alone = bytes_ / std::max<int64_t>(1, out_features_) * out_features < SINGLE_THREAD_BYTES;

#pragma omp parallel num_threads(alone ? 1 : omp_get_max_threads())
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * units; i++) {
            const int64_t r = i / units, from = i % units * unit;
            const auto* row = static_cast<const uint8_t*>(x) + r * in_features_ * (bf16 ? 2 : 4);
            const int64_t to = std::min(from + unit, padded);
            const Activations &whole = doubled[2 * r], &left = doubled[2 * r + 1];
            isa.round(row, bf16, from, to, in_features_, whole);
            for (int64_t at = from; at < to; at++) left.exact[at] = whole.exact[at] - whole.scale[at / 32] * float(whole.q[at]);
            isa.round(left.exact, false, from, to, padded, left);
        }
        std::vector<float> sums;
        for (int64_t i = next++; i < num_pieces; i = next++) {
            const Piece& taken = piece[i];
            sums.resize(size_t(MAX_ROWS * taken.count));
            const int64_t parts = taken.type == BlockType::BF16 ? 1 : 2;
            for (int64_t r = 0; r < rows; r += MAX_ROWS / parts) {
                const int64_t together = std::min(MAX_ROWS / parts, rows - r);
                const Activations* taken_rows = parts == 1 ? exact + r : doubled + 2 * r;
                isa.multiply(taken.type, taken.rows, taken.count, in_features_, taken_rows, int(together * parts), sums.data(), taken.count);
                for (int64_t j = 0; j < together; j++) {
                    float* y = sums.data() + j * parts * taken.count;
                    if (parts == 2)
                        for (int64_t n = 0; n < taken.count; n++) y[n] += y[taken.count + n];
                    store(y, taken.count, out, bf16, (r + j) * out_features + taken.first);
                }
            }
        }
    }
}

void QuantizedWeight::decode(const Isa& isa, int64_t begin, int64_t end, void* to, bool bf16) const {
    const std::vector<Piece> work = pieces(begin, end);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(work.size()); i++)
        isa.decode(work[size_t(i)].type, work[size_t(i)].rows, work[size_t(i)].count, in_features_,
                   static_cast<uint8_t*>(to) + work[size_t(i)].first * in_features_ * (bf16 ? 2 : 4), bf16);
}

}  // namespace kvshare
