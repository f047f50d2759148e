/// The operands that every quantizing op takes besides what it quantizes.
#pragma once

#include <cstdint>

namespace quest {

/// The operands that pick and hold the scales.
struct Tables {
    const void* bucket;  ///< [samples], int32 or int64
    bool bucketIsInt64;
    const float* scale;   ///< [buckets]
    const float* low;     ///< [buckets]
    const float* high;    ///< [buckets]
    const float* offset;  ///< [buckets]
    int32_t buckets;
    const float* channel;  ///< [channels]
    int32_t channels;      ///< C, or 1 for a channel vector of one number
};

}  // namespace quest
