// Products of weights in blocks with activations of one byte.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "avx512.h"
namespace kvshare::avx512 {
namespace {
#include "floats.h"
#include "interleave.h"
#include "vectors_avx512.h"
#include "strips_avx512.h"
#include "product_avx512.h"
}  // namespace
void multiply_bytes(const WeightRows& weights, int64_t k, const Activations& x, int rows, float* y, int64_t stride, const uint8_t* ahead) {
    multiply_avx512<1>(weights, k, x, rows, y, stride, ahead);
}
}  // namespace kvshare::avx512
