#include "experts.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "over.h"

namespace kvshare {

namespace {

// What lies between the products, kept by the calling thread between calls: at the start of a cache line, as products like it.
class Buffer {
  public:
    uint8_t* room(int64_t bytes) {
        constexpr int64_t line = 64;
        if (int64_t(memory_.size()) < bytes + line) memory_.resize(size_t(bytes + line));
        return memory_.data() + (line - int64_t(reinterpret_cast<uintptr_t>(memory_.data()) % line)) % line;
    }

  private:
    std::vector<uint8_t> memory_;
};

}  // namespace

void run_experts(const Isa& isa, const QuantizedWeight& gate_up, const QuantizedWeight& down, const ExpertsTask& task) {
    static thread_local Buffer gathered_rows, gates, activated, products, summed;
    static thread_local std::vector<int64_t> places, first_of, next;  // of the places that chose an expert, the first one, and the one behind each
    constexpr int64_t NONE = -1;
    const int64_t hidden = gate_up.in_features(), width = down.in_features(), count = task.rows * task.k, size = task.bf16 ? 2 : 4, row_bytes = hidden * size;
    for (int64_t i = 0; i < count; i++)
        if (task.chosen[i] < 0 || task.chosen[i] > task.num_experts)
            throw std::out_of_range("expert " + std::to_string(task.chosen[i]) + " of " + std::to_string(task.num_experts));
    const auto x = [&](int64_t place) { return static_cast<const uint8_t*>(task.x) + place / task.k * row_bytes; };
    // a token may name the same expert more than once
    uint8_t *rows = gathered_rows.room(count * row_bytes), *gate = gates.room(count * 2 * width * size), *act = activated.room(count * width * size);
    uint8_t *out = products.room(count * row_bytes), *y = summed.room(count * row_bytes);
    first_of.assign(size_t(task.num_experts + 1), NONE);
    next.resize(size_t(count));
    for (int64_t i = count - 1; i >= 0; i--) next[size_t(i)] = std::exchange(first_of[size_t(task.chosen[i])], i);
    for (int64_t first = 0; first < count; first++) {
        const int64_t expert = task.chosen[first];
        if (first_of[size_t(expert)] != first) continue;
        places.clear();
        for (int64_t i = first; i != NONE; i = next[size_t(i)]) places.push_back(i);
        const int64_t together = int64_t(places.size());
        if (expert == task.num_experts) {
            for (const int64_t place : places) memset(y + place * row_bytes, 0, size_t(row_bytes));
            continue;
        }
        const uint8_t* from = x(first);
        if (together > 1) {
            for (int64_t i = 0; i < together; i++) memcpy(rows + i * row_bytes, x(places[size_t(i)]), size_t(row_bytes));
            from = rows;
        }
        gate_up.multiply(isa, from, task.bf16, gate, task.bf16, together, expert * 2 * width, (expert + 1) * 2 * width);
        const GateTask activate = {gate, gate + width * size, act, 2 * width, 2 * width, width, task.activation};
        over(together, width, [&](int64_t begin, int64_t end) { isa.small.gate(activate, task.bf16, begin, end); });
        uint8_t* to = together > 1 ? out : y + first * row_bytes;
        down.multiply(isa, act, task.bf16, to, task.bf16, together, expert * hidden, (expert + 1) * hidden);
        for (int64_t i = 0; together > 1 && i < together; i++) memcpy(y + places[size_t(i)] * row_bytes, out + i * row_bytes, size_t(row_bytes));
    }
    const CombineTask combine = {y, task.weights, task.weights_bf16, task.beside, task.out, task.k, hidden, task.scale};
    over(task.rows, task.k * hidden, [&](int64_t begin, int64_t end) { isa.small.combine(combine, task.bf16, begin, end); });
}

}  // namespace kvshare
