/// The scalar references with C linkage, for the Python tests: tests/trt_plugins/ loads this with ctypes.

#include "geglu_timestep_quantize/reference.h"
#include "timestep_quantize/reference.h"

#include "common/arithmetic.h"
#include "common/half.h"

#include <cmath>
#include <limits>

extern "C" {

void quest_timestep_quantize(const void* x, int32_t type, const void* bucket, bool bucketIsInt64, const float* scale, const float* low,
                             const float* high, const float* offset, int32_t buckets, const float* channel, int32_t channelCount,
                             int32_t samples, int32_t outer, int32_t channels, int64_t inner, int8_t* codes) {
    const quest::Layout layout = quest::linear(outer * channels, inner);
    const quest::Tables tables{bucket, bucketIsInt64, scale, low, high, offset, buckets, channel, channelCount};
    quest::referenceTimestepQuantize(
        {x, static_cast<quest::FloatType>(type), layout, codes, layout, samples, outer, channels, inner, tables});
}

void quest_geglu_timestep_quantize(const void* x, int32_t type, const void* bucket, bool bucketIsInt64, const float* scale,
                                   const float* low, const float* high, const float* offset, int32_t buckets, const float* channel,
                                   int32_t channelCount, int32_t samples, int32_t rows, int32_t channels, int8_t* codes,
                                   float* activations) {
    const quest::Tables tables{bucket, bucketIsInt64, scale, low, high, offset, buckets, channel, channelCount};
    quest::referenceGegluTimestepQuantize({x, static_cast<quest::FloatType>(type), codes, samples, rows, channels, tables}, activations);
}

/// The codes that the kernels' short way gives, with a reciprocal \p ulps units in the last place beside the right one.
///
/// \param undecided set for the elements that the kernels compute exactly after all.
void quest_fast_codes(const float* x, int64_t count, float step, float low, float high, float offset, int32_t ulps, int8_t* codes,
                      bool* undecided) {
    const quest::Row row{0.F, low, high, offset};
    const quest::FastRow fast = quest::fastRow(row);
    float reciprocal = quest::reciprocalOf(step);
    for (int32_t i = 0; i < std::abs(ulps); ++i) {
        reciprocal =
            std::nextafter(reciprocal, ulps > 0 ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity());
    }
    for (int64_t i = 0; i < count; ++i) {
        float distance = 0.F;
        codes[i] = static_cast<int8_t>(quest::fastCode(x[i], reciprocal, fast, distance) & 0xffU);
        undecided[i] = !quest::isOrdinary(step) || distance > fast.farthest;
    }
}

void quest_exact_codes(const float* x, int64_t count, float step, float low, float high, float offset, int8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = quest::exactCode(x[i], step, {0.F, low, high, offset});
}

void quest_float_from_half(const uint16_t* from, int64_t count, bool bfloat16, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = bfloat16 ? quest::floatFromBfloat16(from[i]) : quest::floatFromHalf(from[i]);
}

}  // extern "C"
