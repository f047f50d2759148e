/// One run of quest::TimestepQuantize, for the GPU's kernel and for the CPU's scalar reference.
#pragma once

#include "common/layout.h"
#include "common/tables.h"

#include <cstdint>

namespace quest {

/// x as [samples, outer, C, inner] with the channel vector along C; a linear layout on both sides takes any of these, another layout
/// takes outer = 1.
struct TimestepQuantizeProblem {
    const void* x;
    FloatType type;
    Layout xLayout;  ///< of [samples, outer * C, inner]
    int8_t* codes;
    Layout codesLayout;
    int32_t samples;
    int32_t outer;
    int32_t channels;
    int64_t inner;
    Tables tables;
};

}  // namespace quest
