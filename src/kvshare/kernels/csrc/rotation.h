// The rotation of heads that the codecs rot8, rot4, rot3 and rot2 store (kvshare.cache.codecs.rotated): signs, a normalised Walsh-Hadamard transform
// over the power of two in the width, and a matrix over the odd rest of it.
#pragma once
#include <cmath>
#include <utility>
#include <vector>

#include "kernels.h"

namespace kvshare {

class Rotation {
  public:
    // `signs` [width], 1 or -1; `matrix` [odd, odd], orthonormal.
    Rotation(std::vector<float> signs, std::vector<float> matrix)
        : signs_(std::move(signs)), matrix_(std::move(matrix)), odd_(int(std::lround(std::sqrt(double(matrix_.size()))))) {}

    void apply(const Isa& isa, float* x) const {  // [width], in place
        for (size_t i = 0; i < signs_.size(); i++) x[i] *= signs_[i];
        transform(isa, x);
        mix(x, [this](int i, int j) { return matrix_[size_t(i * odd_ + j)]; });
    }

    void undo(const Isa& isa, float* x) const {
        mix(x, [this](int i, int j) { return matrix_[size_t(j * odd_ + i)]; });
        transform(isa, x);
        for (size_t i = 0; i < signs_.size(); i++) x[i] *= signs_[i];
    }

  private:
    void transform(const Isa& isa, float* x) const {
        const int size = int(signs_.size()) / odd_;
        for (int part = 0; part < odd_; part++) isa.rows.hadamard(x + part * size, size);
    }

    template <typename Entry>
    void mix(float* x, Entry entry) const {
        if (odd_ == 1) return;
        const int size = int(signs_.size()) / odd_;
        std::vector<float> column(static_cast<size_t>(odd_));
        for (int c = 0; c < size; c++) {
            for (int i = 0; i < odd_; i++) {
                column[size_t(i)] = 0;
                for (int j = 0; j < odd_; j++) column[size_t(i)] += entry(i, j) * x[j * size + c];
            }
            for (int i = 0; i < odd_; i++) x[i * size + c] = column[size_t(i)];
        }
    }

    std::vector<float> signs_, matrix_;
    int odd_;
};

}  // namespace kvshare
