// The small operations.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "avx512.h"
namespace kvshare::avx512 {
namespace {
#include "floats.h"
#include "vectors_avx512.h"
#include "small_ops.h"
}  // namespace
const SmallOps small = small_ops;
}  // namespace kvshare::avx512
