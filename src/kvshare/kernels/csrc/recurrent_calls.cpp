#include "recurrent_calls.h"

#include <omp.h>

#include <stdexcept>
#include <vector>

#include "over.h"

namespace kvshare {

namespace {

float as_float(const void* x, bool bf16, int64_t i) {
    if (!bf16) return static_cast<const float*>(x)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(x)[i]) << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

void from_float(float v, bool bf16, void* to, int64_t i) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (!bf16) static_cast<float*>(to)[i] = v;
    else static_cast<uint16_t*>(to)[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

const uint8_t* at_number(const void* x, bool bf16, int64_t i) { return static_cast<const uint8_t*>(x) + i * (bf16 ? 2 : 4); }
uint8_t* at_number(void* x, bool bf16, int64_t i) { return static_cast<uint8_t*>(x) + i * (bf16 ? 2 : 4); }

// The entry of a block that its last token has completed, in float32.
void pool_block(const Isa& isa, const CompressorTask& task, const State& values, const State& gates, bool has_before, float* out) {
    static thread_local std::vector<float> kept;
    static thread_local std::vector<const float*> rows;
    const int64_t lead = task.overlap ? task.ratio : 0, projected = task.overlap ? 2 * task.width : task.width, size = 4 * task.width;
    const int64_t first = has_before ? 0 : lead, slots = lead + task.ratio - first;
    kept.resize(size_t(2 * slots * task.width));
    rows.resize(size_t(2 * slots));
    for (int64_t j = 0; j < slots; j++) {
        const int64_t row = first + j, from = 4 * (row * projected + (row < lead || !task.overlap ? 0 : task.width));  // its own block: the second half
        rows[size_t(j)] = static_cast<const float*>(values.view(from, size, kept.data() + 2 * j * task.width));
        rows[size_t(slots + j)] = static_cast<const float*>(gates.view(from, size, kept.data() + (2 * j + 1) * task.width));
    }
    isa.small.recurrent.pool({rows.data(), rows.data() + slots, slots, task.width, out});
}

}  // namespace

void run_compressor(const Isa& isa, const StepSpans& step, const CompressorTask& task, const Norm& norm, bool bf16) {
    static thread_local std::vector<float> row, norm_factors;
    const int64_t lead = task.overlap ? task.ratio : 0, projected = task.overlap ? 2 * task.width : task.width, row_bytes = 4 * projected;
    row.resize(size_t(task.ratio * projected));
    for (const StepSpan& span : step) {
        const State values(task.values, span), gates(task.gates, span);
        const int64_t place = span.first % task.ratio, sequence = span.row;
        for (int64_t i = 0; i < projected; i++) row[size_t(i)] = as_float(task.x, bf16, sequence * task.x_stride + i);
        values.write((lead + place) * row_bytes, row_bytes, row.data());
        for (int64_t i = 0; i < projected; i++) row[size_t(i)] = as_float(task.gate, bf16, sequence * task.gate_stride + i) + task.place_bias[place * projected + i];
        gates.write((lead + place) * row_bytes, row_bytes, row.data());
        void* out = at_number(task.out, bf16, sequence * task.width);
        if (place != task.ratio - 1) {
            memset(out, 0, size_t(task.width * (bf16 ? 2 : 4)));
            continue;
        }
        pool_block(isa, task, values, gates, span.first >= task.ratio, row.data());
        for (int64_t i = 0; i < task.width; i++) from_float(row[size_t(i)], bf16, out, i);
        const HeadsTask turn = {out, out, task.width, task.width, 1, task.width, factors(norm, task.width, norm_factors), norm.eps,
                                static_cast<const float*>(task.cos) + sequence * task.pairs, static_cast<const float*>(task.sin) + sequence * task.pairs, true, task.pairs, true};
        isa.small.heads(turn, bf16, 0, 1);
        for (const State* state : {&values, &gates}) {
            if (!task.overlap) continue;
            state->read(lead * row_bytes, lead * row_bytes, row.data());
            state->write(0, lead * row_bytes, row.data());
        }
    }
}

void run_cca(const Isa& isa, const StepSpans& step, const CcaTask& task, bool bf16) {
    if (task.width > WIDEST_UNIT) throw std::invalid_argument("heads too wide");
    static thread_local std::vector<uint8_t> memory;
    const int64_t size = bf16 ? 2 : 4, heads = task.query_heads + task.kv_heads, channels = heads * task.width, tail = task.taps + task.grouped_taps - 2;
    const int64_t state_size = task.state_bf16 ? 2 : 4, inputs = task.grouped_taps * task.width, total = channels + 2 * task.half;
    const int64_t sizes[] = {(tail + 1) * channels * size, step.count * heads * inputs * size, step.count * channels * size, tail * channels * state_size, task.half * state_size};
    int64_t bytes = 64;
    for (const int64_t each : sizes) bytes += (each + 63) / 64 * 64;
    memory.resize(std::max(memory.size(), size_t(bytes)));
    uint8_t* parts[5];
    uint8_t* next = memory.data();
    for (int i = 0; i < 5; i++, next += (sizes[i - 1] + 63) / 64 * 64) parts[i] = next;
    auto [window, grouped, mixed, tails, before] = parts;

    for (const StepSpan& span : step) {
        const void* x = at_number(task.x, bf16, span.row * total);
        const State conv(task.conv, span);
        conv.read(0, tail * channels * state_size, tails);
        for (int64_t tap = 0; tap < tail; tap++)
            for (int64_t c = 0; c < channels; c++) from_float(as_float(tails, task.state_bf16, c * tail + tap), bf16, window, tap * channels + c);
        memcpy(window + tail * channels * size, x, size_t(channels * size));
        for (int64_t tap = 0; tap < tail; tap++)
            for (int64_t c = 0; c < channels; c++) from_float(as_float(window, bf16, (tap + 1) * channels + c), task.state_bf16, tails, c * tail + tap);
        conv.write(0, tail * channels * state_size, tails);
        isa.small.recurrent.depthwise({window, task.depthwise, task.depthwise_bias, grouped + span.row * heads * inputs * size, task.taps, task.grouped_taps, heads, task.width}, bf16);

        const State delayed(task.delayed, span);
        void* values = at_number(task.values, bf16, span.row * 2 * task.half);
        delayed.read(0, task.half * state_size, before);
        const bool first = span.first == 0 && task.first_delayed;
        for (int64_t i = 0; i < task.half; i++) {
            from_float(as_float(x, bf16, channels + i), bf16, values, i);
            from_float(first ? as_float(task.first_delayed, bf16, i) : as_float(before, task.state_bf16, i), bf16, values, task.half + i);
            from_float(as_float(x, bf16, channels + task.half + i), task.state_bf16, before, i);
        }
        delayed.write(0, task.half * state_size, before);
    }
    run_spread(isa, {grouped, heads * inputs, inputs, task.grouped, inputs * task.width, task.grouped_bias, mixed, channels, task.width, step.count, inputs, task.width}, heads, bf16);
    for (const StepSpan& span : step)
        isa.small.recurrent.unit({at_number(task.x, bf16, span.row * total), mixed + span.row * channels * size, task.temperature, at_number(task.heads, bf16, span.row * channels),
                                  task.query_heads, task.kv_heads, task.width}, bf16);
}

void run_spread(const Isa& isa, const SpreadTask& task, int64_t groups, bool bf16) {
    over(groups, task.inputs * task.outputs, [&](int64_t begin, int64_t end) { isa.small.recurrent.spread(task, bf16, begin, end); });
}

void run_channels(const Isa& isa, const ChannelsTask& task, bool bf16, int64_t rows) {
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.recurrent.channels(task, bf16, begin, end); });
}

void run_layer_norm(const Isa& isa, const LayerNormTask& task, bool bf16, int64_t rows) {
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.recurrent.layer_norm(task, bf16, begin, end); });
}

void run_residual(const Isa& isa, const ResidualTask& task, bool bf16, int64_t rows) {
    over(rows, task.width, [&](int64_t begin, int64_t end) { isa.small.recurrent.residual(task, bf16, begin, end); });
}

void run_groups(const Isa& isa, const QuantizedWeight& weight, const GroupsTask& task, bool bf16) {
    constexpr int64_t LARGE = 1 << 19;  // numbers of a group that are worth all threads
    const int64_t size = bf16 ? 2 : 4, k = weight.in_features();
    const auto one = [&](int64_t group) {
        static thread_local std::vector<uint8_t> gathered, summed;
        const uint8_t* x = static_cast<const uint8_t*>(task.x) + group * task.x_group * size;
        uint8_t* out = static_cast<uint8_t*>(task.out) + group * task.outputs * size;
        const int64_t begin = task.first + group * task.step, end = begin + task.outputs;
        if (task.rows == 1) {
            weight.multiply(isa, x, bf16, out, bf16, 1, begin, end);
            return;
        }
        gathered.resize(size_t(task.rows * k * size));
        summed.resize(size_t(task.rows * task.outputs * size));
        for (int64_t row = 0; row < task.rows; row++) memcpy(gathered.data() + row * k * size, x + row * task.x_row * size, size_t(k * size));
        weight.multiply(isa, gathered.data(), bf16, summed.data(), bf16, task.rows, begin, end);
        for (int64_t row = 0; row < task.rows; row++)
            memcpy(out + row * task.groups * task.outputs * size, summed.data() + row * task.outputs * size, size_t(task.outputs * size));
    };
    if (task.outputs * k >= LARGE) {
        for (int64_t group = 0; group < task.groups; group++) one(group);
        return;
    }
    over(task.groups, task.outputs * k, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; group++) one(group);
    });
}

}  // namespace kvshare
