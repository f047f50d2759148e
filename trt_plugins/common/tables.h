//! The operands that every quantizing op takes besides what it quantizes.
#pragma once

#include <cstdint>

namespace quest
{

//! The operands that pick and hold the scales.
struct Tables
{
    void const* bucket; //!< [samples], int32 or int64
    bool bucketIsInt64;
    float const* scale;  //!< [buckets]
    float const* low;    //!< [buckets]
    float const* high;   //!< [buckets]
    float const* offset; //!< [buckets]
    int32_t buckets;
    float const* channel; //!< [channels]
    int32_t channels;     //!< C, or 1 for a channel vector of one number
};

} // namespace quest
