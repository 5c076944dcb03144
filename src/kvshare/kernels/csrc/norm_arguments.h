// How Python spells a norm.
#pragma once
#include <tuple>

#include "address.h"
#include "small_ops_calls.h"

namespace kvshare {

using NormArguments = std::tuple<uintptr_t, bool, float, float>;  // weight or 0, whether that is bfloat16, offset, eps or -1

inline Norm norm_of(const NormArguments& given) {
    return {at<const void>(std::get<0>(given)), std::get<1>(given), std::get<2>(given), std::get<3>(given)};
}

}  // namespace kvshare
