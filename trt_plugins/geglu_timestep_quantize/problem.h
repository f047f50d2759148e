/// One run of quest::GegluTimestepQuantize, for the GPU's kernel and for the CPU's scalar reference.
#pragma once

#include "common/layout.h"
#include "common/tables.h"

#include <cstdint>

namespace quest {

/// x as [samples, rows, 2 * C]: C values and their C gates; codes [samples, rows, C]; the channel vector along C. All linear.
struct GegluTimestepQuantizeProblem {
    const void* x;
    FloatType type;
    int8_t* codes;
    int32_t samples;
    int32_t rows;
    int32_t channels;
    Tables tables;
};

}  // namespace quest
