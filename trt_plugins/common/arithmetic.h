/// The arithmetic of quest::TimestepQuantize, for the GPU and for the CPU.
///
/// exactCode is the definition (exporters/ops/timestep_quantize.py), operation by operation. fastCode gives the same code without a
/// division wherever it can tell that it does; the kernels fall back on exactCode where it cannot. timestep_quantize/README.md has the
/// proof.
#pragma once

#include "common/host_device.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace quest {

/// One bucket's row of the tables.
struct Row {
    float scale;
    float low;
    float high;
    float offset;
};

/// scale * channel, rounded once: what the definition divides by.
QUEST_HOST_DEVICE float stepOf(float scale, float channel) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(scale, channel);
#else
    return scale * channel;
#endif
}

/// clamp(round(x / step), low, high) + offset as the definition computes it: IEEE division, halves to even, and QuantizeLinear's own
/// rounding and saturation at the end. A NaN gives low.
QUEST_HOST_DEVICE int8_t exactCode(float x, float step, const Row& row) {
#ifdef __CUDA_ARCH__
    const float ratio = __fdiv_rn(x, step);
#else
    const float ratio = x / step;
#endif
    const float clipped = fminf(fmaxf(rintf(ratio), row.low), row.high) + row.offset;
    return static_cast<int8_t>(fminf(fmaxf(rintf(clipped), -128.F), 127.F));
}

/// What fastCode needs of a row.
struct FastRow {
    float low;
    float high;
    /// 1.5 * 2^23 + offset: added to a small number, it leaves that number's nearest integer, plus offset, in the last bits.
    float magic;
    /// A ratio that lies further than this from its nearest integer may round otherwise when divided exactly.
    float farthest;
};

QUEST_HOST_DEVICE bool isInteger(float value, float limit) { return fabsf(value) <= limit && rintf(value) == value; }

/// A row whose bounds are not integers within int8 gets a negative \p farthest: all its elements are computed exactly.
QUEST_HOST_DEVICE FastRow fastRow(const Row& row) {
    constexpr float kMagic = 12582912.F;
    constexpr float kLimit = 32768.F;
    constexpr float kError = 1.F / (1 << 22);
    const bool integers = isInteger(row.low, kLimit) && isInteger(row.high, kLimit) && isInteger(row.offset, kLimit);
    const bool fits = row.low <= row.high && row.low + row.offset >= -128.F && row.high + row.offset <= 127.F;
    const float largest = fmaxf(fabsf(row.low), fabsf(row.high));
    const float farthest = integers && fits ? 0.5F - (largest + 2.F) * kError : -1.F;
    return {row.low, row.high, kMagic + row.offset, farthest};
}

/// Whether 1 / step is an ordinary number, so that the error of an estimate by it is bounded.
QUEST_HOST_DEVICE bool isOrdinary(float step) { return fabsf(step) >= 0x1p-100F && fabsf(step) <= 0x1p100F; }

/// 1 / step within one unit in the last place.
QUEST_HOST_DEVICE float reciprocalOf(float step) {
#ifdef __CUDA_ARCH__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(step));
    return result;
#else
    return 1.F / step;
#endif
}

/// A number whose last byte is the code of \p x, if \p distance comes out at most FastRow::farthest.
///
/// \param reciprocal 1 / step within one unit in the last place, of an ordinary step.
/// \param distance how far the estimated ratio lies from the integer that it was rounded to, at most 0.5.
QUEST_HOST_DEVICE uint32_t fastCode(float x, float reciprocal, const FastRow& row, float& distance) {
#ifdef __CUDA_ARCH__
    const float ratio = fminf(fmaxf(__fmul_rn(x, reciprocal), row.low), row.high);
    const float sum = __fadd_rn(ratio, row.magic);
    distance = fabsf(__fsub_rn(ratio, __fsub_rn(sum, row.magic)));
    return __float_as_uint(sum);
#else
    const float ratio = std::fmin(std::fmax(x * reciprocal, row.low), row.high);
    const float sum = ratio + row.magic;
    distance = std::fabs(ratio - (sum - row.magic));
    uint32_t bits = 0;
    std::memcpy(&bits, &sum, sizeof(bits));
    return bits;
#endif
}

/// The activation of GEGLU, value * gelu(gate), with gelu by the error function.
QUEST_HOST_DEVICE float geglu(float value, float gate) {
    constexpr float kInverseSqrt2 = 0.70710678118654752F;
    return value * (0.5F * gate * (1.F + erff(gate * kInverseSqrt2)));
}

}  // namespace quest
