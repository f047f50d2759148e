/// What the scalar references share.
#pragma once

#include "common/arithmetic.h"
#include "common/half.h"
#include "common/layout.h"
#include "common/tables.h"

#include <algorithm>

namespace quest {

/// Element \p place of \p x, as a float.
inline float elementOf(const void* x, FloatType type, int64_t place) {
    switch (type) {
        case FloatType::kFloat32:
            return static_cast<const float*>(x)[place];
        case FloatType::kFloat16:
            return floatFromHalf(static_cast<const uint16_t*>(x)[place]);
        case FloatType::kBfloat16:
            return floatFromBfloat16(static_cast<const uint16_t*>(x)[place]);
    }
    return 0.F;
}

/// The tables' row of sample \p n, its bucket clamped to the tables.
inline Row referenceRow(const Tables& tables, int32_t n) {
    const int64_t given =
        tables.bucketIsInt64 ? static_cast<const int64_t*>(tables.bucket)[n] : static_cast<const int32_t*>(tables.bucket)[n];
    const int64_t bucket = std::clamp<int64_t>(given, 0, tables.buckets - 1);
    return {tables.scale[bucket], tables.low[bucket], tables.high[bucket], tables.offset[bucket]};
}

}  // namespace quest
